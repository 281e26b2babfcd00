"""Likelihoods p(x given z): modules whose `forward(z)` returns a distribution over data."""

from pyro_vae.likelihoods import autoregressive, continuous, counts, discrete, discretized, heterogeneous
from pyro_vae.likelihoods.autoregressive import *
from pyro_vae.likelihoods.continuous import *
from pyro_vae.likelihoods.counts import *
from pyro_vae.likelihoods.discrete import *
from pyro_vae.likelihoods.discretized import *
from pyro_vae.likelihoods.heterogeneous import *

# What a file offers is offered here: a new one costs a line in its own file, and nothing else.
__all__ = [
    *autoregressive.__all__,
    *continuous.__all__,
    *counts.__all__,
    *discrete.__all__,
    *discretized.__all__,
    *heterogeneous.__all__,
]
