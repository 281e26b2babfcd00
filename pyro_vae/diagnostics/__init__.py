"""Did the inference work? Checks that return numbers and a verdict, any of which can say no."""

from pyro_vae.diagnostics import verdict
from pyro_vae.diagnostics.verdict import *

# What a file offers is offered here: a new one costs a line in its own file, and nothing else.
__all__ = [
    *verdict.__all__,
]
