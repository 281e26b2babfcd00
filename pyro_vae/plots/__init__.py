"""Figures: numbers in, a matplotlib `Figure` out, without touching matplotlib's global state."""

from pyro_vae.plots import checks, gaps, posteriors, runs
from pyro_vae.plots.checks import *
from pyro_vae.plots.gaps import *
from pyro_vae.plots.posteriors import *
from pyro_vae.plots.runs import *

# What a file offers is offered here: a new one costs a line in its own file, and nothing else.
__all__ = [
    *checks.__all__,
    *gaps.__all__,
    *posteriors.__all__,
    *runs.__all__,
]
