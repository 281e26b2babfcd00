"""Variational autoencoders written as probabilistic programs on Pyro."""

from pyro_vae import (
    comparison,
    compilation,
    data,
    diagnostics,
    estimators,
    evaluation,
    export,
    handlers,
    likelihoods,
    networks,
    posteriors,
    priors,
    programs,
    schedules,
    training,
)
from pyro_vae.export import to_arviz
from pyro_vae.expressions import build
from pyro_vae.programs import VAE
from pyro_vae.runs import load
from pyro_vae.training import fit

__version__ = "0.1.0"
__all__ = [
    "VAE",
    "build",
    "comparison",
    "compilation",
    "data",
    "diagnostics",
    "estimators",
    "evaluation",
    "export",
    "fit",
    "handlers",
    "likelihoods",
    "load",
    "networks",
    "posteriors",
    "priors",
    "programs",
    "schedules",
    "to_arviz",
    "training",
]
