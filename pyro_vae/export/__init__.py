"""A fitted program's draws in the schema of ArviZ, in memory or on disk."""

from pyro_vae.export import arviz
from pyro_vae.export.arviz import *

# What a file offers is offered here: a new one costs a line in its own file, and nothing else.
__all__ = [
    *arviz.__all__,
]
