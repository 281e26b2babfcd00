"""Networks that take any number of leading dimensions, and the maps from their output to parameters."""

from pyro_vae.networks.convolutional import ConvDecoder, ConvEncoder
from pyro_vae.networks.heads import at_least_float32, flat_output_bias, positive, scale, split_parameters
from pyro_vae.networks.leading import AnyLeading
from pyro_vae.networks.mlp import MLP
from pyro_vae.networks.residual import ResidualMLP, ResNetDecoder, ResNetEncoder
from pyro_vae.networks.standardized import Standardized

__all__ = [
    "MLP",
    "AnyLeading",
    "ConvDecoder",
    "ConvEncoder",
    "ResNetDecoder",
    "ResNetEncoder",
    "ResidualMLP",
    "Standardized",
    "at_least_float32",
    "flat_output_bias",
    "positive",
    "scale",
    "split_parameters",
]
