"""Variational autoencoders written as probabilistic programs on Pyro."""

from pyro_vae import (
    data,
    estimators,
    evaluation,
    handlers,
    likelihoods,
    networks,
    posteriors,
    priors,
    programs,
    schedules,
    training,
)
from pyro_vae.expressions import build
from pyro_vae.programs import VAE
from pyro_vae.runs import load
from pyro_vae.training import fit

__version__ = "0.1.0"
__all__ = [
    "VAE",
    "build",
    "data",
    "estimators",
    "evaluation",
    "fit",
    "handlers",
    "likelihoods",
    "load",
    "networks",
    "posteriors",
    "priors",
    "programs",
    "schedules",
    "training",
]
