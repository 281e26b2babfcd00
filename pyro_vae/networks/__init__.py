"""Networks that take any number of leading dimensions, and the maps from their output to parameters."""

from pyro_vae.networks.heads import positive, scale, split_parameters
from pyro_vae.networks.mlp import MLP

__all__ = ["MLP", "positive", "scale", "split_parameters"]
