"""Priors p(z): modules whose `forward()` returns a distribution over latents."""

from pyro_vae.priors.learned import Flow, VampPrior
from pyro_vae.priors.others import Bernoulli, OneHotCategorical, RelaxedOneHotCategorical, UniformSphere
from pyro_vae.priors.vectors import ARD, DiagonalNormal, GaussianMixture, Laplace, StandardNormal, StudentT

__all__ = [
    "ARD",
    "Bernoulli",
    "DiagonalNormal",
    "Flow",
    "GaussianMixture",
    "Laplace",
    "OneHotCategorical",
    "RelaxedOneHotCategorical",
    "StandardNormal",
    "StudentT",
    "UniformSphere",
    "VampPrior",
]
