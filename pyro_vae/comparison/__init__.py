"""Programs side by side: by the evidence of data that none of them has seen, or by leave-one-out cross-validation."""

from pyro_vae.comparison import held_out, left_out
from pyro_vae.comparison.held_out import *
from pyro_vae.comparison.left_out import *

# What a file offers is offered here: a new one costs a line in its own file, and nothing else.
__all__ = [
    *held_out.__all__,
    *left_out.__all__,
]
