"""Networks that take any number of leading dimensions, and the maps from their output to parameters."""

from pyro_vae.networks import convolutional, heads, leading, mlp, residual, standardized
from pyro_vae.networks.convolutional import *
from pyro_vae.networks.heads import *
from pyro_vae.networks.leading import *
from pyro_vae.networks.mlp import *
from pyro_vae.networks.residual import *
from pyro_vae.networks.standardized import *

# What a file offers is offered here: a new one costs a line in its own file, and nothing else.
__all__ = [
    *convolutional.__all__,
    *heads.__all__,
    *leading.__all__,
    *mlp.__all__,
    *residual.__all__,
    *standardized.__all__,
]
