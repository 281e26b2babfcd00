"""Amortized posteriors q(z given x): modules whose `forward(x)` returns a distribution over latents."""

from pyro_vae.posteriors.normal import DiagonalNormal, FullNormal, LowRankNormal, Mixture
from pyro_vae.posteriors.others import (
    Bernoulli,
    Flow,
    Laplace,
    OneHotCategorical,
    RelaxedOneHotCategorical,
    VonMisesFisher,
)
from pyro_vae.posteriors.semi_amortized import SemiAmortized

__all__ = [
    "Bernoulli",
    "DiagonalNormal",
    "Flow",
    "FullNormal",
    "Laplace",
    "LowRankNormal",
    "Mixture",
    "OneHotCategorical",
    "RelaxedOneHotCategorical",
    "SemiAmortized",
    "VonMisesFisher",
]
