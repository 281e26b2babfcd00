"""Likelihoods p(x given z): modules whose `forward(z)` returns a distribution over data."""

from pyro_vae.likelihoods.autoregressive import Autoregressive
from pyro_vae.likelihoods.continuous import Beta, ContinuousBernoulli, Gamma, Gaussian, Laplace, LogNormal, StudentT
from pyro_vae.likelihoods.counts import (
    Binomial,
    NegativeBinomial,
    Poisson,
    ZeroInflatedNegativeBinomial,
    ZeroInflatedPoisson,
)
from pyro_vae.likelihoods.discrete import Bernoulli, Categorical
from pyro_vae.likelihoods.discretized import DiscretizedLogistic, DiscretizedLogisticMixture
from pyro_vae.likelihoods.heterogeneous import Heterogeneous

__all__ = [
    "Autoregressive",
    "Bernoulli",
    "Beta",
    "Binomial",
    "Categorical",
    "ContinuousBernoulli",
    "DiscretizedLogistic",
    "DiscretizedLogisticMixture",
    "Gamma",
    "Gaussian",
    "Heterogeneous",
    "Laplace",
    "LogNormal",
    "NegativeBinomial",
    "Poisson",
    "StudentT",
    "ZeroInflatedNegativeBinomial",
    "ZeroInflatedPoisson",
]
