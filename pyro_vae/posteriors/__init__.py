"""Amortized posteriors q(z given x): modules whose `forward(x)` returns a distribution over latents."""

from pyro_vae.posteriors import normal, others, semi_amortized
from pyro_vae.posteriors.normal import *
from pyro_vae.posteriors.others import *
from pyro_vae.posteriors.semi_amortized import *

# What a file offers is offered here: a new one costs a line in its own file, and nothing else.
__all__ = [
    *normal.__all__,
    *others.__all__,
    *semi_amortized.__all__,
]
