"""Priors p(z): modules whose `forward()` returns a distribution over latents."""

from pyro_vae.priors import learned, others, vectors
from pyro_vae.priors.learned import *
from pyro_vae.priors.others import *
from pyro_vae.priors.vectors import *

# What a file offers is offered here: a new one costs a line in its own file, and nothing else.
__all__ = [
    *learned.__all__,
    *others.__all__,
    *vectors.__all__,
]
