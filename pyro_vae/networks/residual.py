"""Residual networks: perceptrons, and convolutional networks from and to images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from pyro_vae.networks.convolutional import ImageDecoder, ImageEncoder, Upsampling
from pyro_vae.networks.layers import (
    activation_gain,
    activation_layer,
    check_sizes,
    convolution,
    group_norm,
    image_sizes,
    linear,
)
from pyro_vae.networks.leading import flat
from pyro_vae.networks.mlp import MLP

__all__ = ["ResNetDecoder", "ResNetEncoder", "ResidualMLP"]

_BRANCH = 0.1
"""What a block's branch adds at the start, as a share of its input.

The whole then starts near the linear map of its other layers, and a hundred blocks make a signal no more than
(1 + 0.01)^50 = 1.6 times as large. It is not zero, so that from the first step a gradient reaches every weight.
"""


class Residual(nn.Module):
    """The input plus a branch of it.

    Args:
        branch: A network whose outputs have the shape of its inputs.

    Example:
        >>> Residual(nn.Identity())(torch.ones(2))
        tensor([2., 2.])
    """

    def __init__(self, branch: nn.Module):
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        """The sum."""
        return x + self.branch(x)


def _block(
    affine: Callable[[float], nn.Module],
    activation: str,
    normalization: Callable[[], nn.Module] | None,
    dropout: nn.Module | None,
) -> Residual:
    """A pre-activation block of two layers `affine(gain)`."""
    gain = activation_gain(activation)
    norms: list[list[nn.Module]] = [[normalization()] if normalization else [] for _ in range(2)]
    return Residual(
        nn.Sequential(
            *norms[0],
            activation_layer(activation),
            affine(gain),
            *norms[1],
            activation_layer(activation),
            *([dropout] if dropout else []),
            affine(_BRANCH * gain),
        )
    )


class ResidualMLP(nn.Module):
    r"""A residual multilayer perceptron, of blocks with the activation first.

    .. math:: h_0 = W_0 x + b_0, \quad h_i = h_{i-1} + V_i\, a(W_i\, a(h_{i-1}) + b_i) + c_i, \quad y = W h_n + b

    The branches start at a tenth of what they are added to, so that the network starts near a linear map at any depth.
    Its first and last layer start as in `MLP`, biases at zero.

    Args:
        in_features: Number of inputs, or the shape of one input, as in `MLP`.
        out_features: Number of outputs.
        width: Width of the blocks.
        blocks: Number of blocks.
        activation: Name of an activation in `torch.nn`, in lower case.
        normalization: Whether inputs are normalized before each activation and the last layer (LayerNorm).
        dropout: Probability that a hidden unit of a branch is left out in training.

    Returns:
        From `forward`, a tensor of shape `(*, out_features)`.

    Raises:
        ValueError: Sizes that are not positive, an unknown activation, an input of another size.

    Reference:
        He, Zhang, Ren and Sun, 2016. Identity mappings in deep residual networks.
        De and Smith, 2020. Batch normalization biases residual blocks towards the identity function in deep networks.

    Example:
        >>> net = ResidualMLP((1, 28, 28), 2 * 20, width=200, blocks=3)
        >>> net(torch.rand(5, 3, 1, 28, 28)).shape
        torch.Size([5, 3, 40])
    """

    def __init__(
        self,
        in_features: int | Sequence[int],
        out_features: int,
        width: int = 400,
        blocks: int = 2,
        activation: str = "relu",
        normalization: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.in_features = in_features if isinstance(in_features, int) else tuple(in_features)
        self.out_features = out_features
        self.width = width
        self.blocks = blocks
        self.activation = activation
        self.normalization = normalization
        self.dropout = dropout
        check_sizes(self, in_features=self.in_features, out_features=out_features, width=width, blocks=blocks)

        layers: list[nn.Module] = [
            _block(
                lambda gain: linear(width, width, gain),
                activation,
                (lambda: nn.LayerNorm(width)) if normalization else None,
                nn.Dropout(dropout) if dropout else None,
            )
            for _ in range(blocks)
        ]
        if normalization:
            layers.append(nn.LayerNorm(width))
        features = self.in_features if isinstance(self.in_features, int) else math.prod(self.in_features)
        self.layers = nn.Sequential(linear(features, width), *layers, linear(width, out_features))

    @property
    def output_bias(self) -> Tensor:
        """Bias of the last layer, of shape `(out_features,)`."""
        return self.layers[-1].bias  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """The outputs, of shape `(*, out_features)`."""
        return self.layers(flat(self, x, self.in_features))


class ResNetEncoder(ImageEncoder):
    r"""A residual network from images: strided convolutions with residual blocks behind each, then a linear layer.

    .. math:: h \leftarrow W *_{\downarrow 2} h + b, \quad h \leftarrow h + V * a(U * a(h) + b') + b'', \quad \ldots,
        \quad y = \operatorname{MLP}(h)

    Each strided convolution halves height and width, rounded up. It and the blocks' first convolutions start with
    weights that keep the size of signals, the blocks' second at a tenth of that, biases at zero: see `ResidualMLP`.

    Args:
        in_shape: Shape of one input, `(channels, height, width)`.
        out_features: Number of outputs.
        channels: Channels of the strided convolutions' outputs, and of the blocks behind them.
        blocks: Number of blocks behind each strided convolution.
        kernel_size: Height and width of the kernels, odd.
        hidden: Widths of hidden layers between the blocks and the outputs.
        activation: Name of an activation in `torch.nn`, in lower case.
        normalization: Whether inputs are normalized before each activation, see `ConvEncoder`.
        dropout: Probability that a channel of a branch (or a hidden unit of the perceptron) is left out in training.

    Returns:
        From `forward(x)` with `x` of shape `(*, *in_shape)`, a tensor of shape `(*, out_features)`.

    Raises:
        ValueError: Sizes that are not positive, an even kernel, an unknown activation, an input of another shape.

    Reference:
        He, Zhang, Ren and Sun, 2016. Identity mappings in deep residual networks.

    Example:
        >>> net = ResNetEncoder((1, 8, 8), 2 * 20, channels=(8, 16))
        >>> net(torch.rand(5, 3, 1, 8, 8)).shape
        torch.Size([5, 3, 40])
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        out_features: int,
        channels: Sequence[int] = (32, 64),
        blocks: int = 1,
        kernel_size: int = 3,
        hidden: Sequence[int] = (),
        activation: str = "relu",
        normalization: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.in_shape = tuple(in_shape)
        self.out_features = out_features
        self.channels = tuple(channels)
        self.blocks = blocks
        self.kernel_size = kernel_size
        self.hidden = tuple(hidden)
        self.activation = activation
        self.normalization = normalization
        self.dropout = dropout
        check_sizes(
            self,
            in_shape=self.in_shape,
            out_features=out_features,
            channels=self.channels,
            blocks=blocks,
            kernel_size=kernel_size,
            hidden=self.hidden,
        )

        layers: list[nn.Module] = []
        for before, after in pairwise((self.in_shape[0], *self.channels)):
            layers.append(convolution(before, after, kernel_size, stride=2))
            layers += _image_blocks(blocks, after, kernel_size, activation, normalization, dropout)
        self.convolutions = nn.Sequential(*layers)
        features = self.channels[-1] * math.prod(image_sizes(self.in_shape[1:], len(self.channels))[-1])
        self.head = MLP(features, out_features, self.hidden, activation, False, normalization, dropout)


class ResNetDecoder(ImageDecoder):
    r"""A residual network to images: a linear layer, then residual blocks, each with a convolution that doubles sizes.

    .. math:: h = \operatorname{MLP}(z), \quad h \leftarrow h + V * a(U * a(h) + b') + b'',
        \quad h \leftarrow W * \operatorname{repeat}_2(h) + b, \quad \ldots

    The last bias has a value for each output. Sizes are doubled as in `ConvDecoder`, weights start as in
    `ResNetEncoder`, biases at zero.

    Args:
        in_features: Number of inputs.
        out_shape: Shape of one output, `(channels, height, width)`.
        channels: Channels of the blocks.
        blocks: Number of blocks before each doubling.
        kernel_size: Height and width of the kernels, odd.
        hidden: Widths of hidden layers between the inputs and the blocks.
        activation: Name of an activation in `torch.nn`, in lower case.
        normalization: Whether inputs are normalized before each activation, see `ConvEncoder`.
        dropout: Probability that a channel of a branch (or a hidden unit of the perceptron) is left out in training.

    Returns:
        From `forward(z)` with `z` of shape `(*, in_features)`, a tensor of shape `(*, *out_shape)`.

    Raises:
        ValueError: Sizes that are not positive, an even kernel, an unknown activation, an input of another size.

    Reference:
        He, Zhang, Ren and Sun, 2016. Identity mappings in deep residual networks.

    Example:
        >>> net = ResNetDecoder(20, (1, 8, 7), channels=(16, 8))
        >>> net(torch.randn(5, 3, 20)).shape
        torch.Size([5, 3, 1, 8, 7])
    """

    def __init__(
        self,
        in_features: int,
        out_shape: Sequence[int],
        channels: Sequence[int] = (64, 32),
        blocks: int = 1,
        kernel_size: int = 3,
        hidden: Sequence[int] = (),
        activation: str = "relu",
        normalization: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.in_features = in_features
        self.out_shape = tuple(out_shape)
        self.channels = tuple(channels)
        self.blocks = blocks
        self.kernel_size = kernel_size
        self.hidden = tuple(hidden)
        self.activation = activation
        self.normalization = normalization
        self.dropout = dropout
        check_sizes(
            self,
            in_features=in_features,
            out_shape=self.out_shape,
            channels=self.channels,
            blocks=blocks,
            kernel_size=kernel_size,
            hidden=self.hidden,
        )

        smallest, *sizes = reversed(image_sizes(self.out_shape[1:], len(self.channels)))
        image = (self.channels[0], *smallest)
        self.stem = MLP(in_features, math.prod(image), self.hidden, activation, False, normalization, dropout)
        layers: list[nn.Module] = [nn.Unflatten(-1, image)]
        for i, (before, after) in enumerate(pairwise((*self.channels, self.out_shape[0]))):
            layers += _image_blocks(blocks, before, kernel_size, activation, normalization, dropout)
            layers.append(Upsampling(before, after, sizes[i], kernel_size, bias=i + 1 < len(sizes)))
        self.convolutions = nn.Sequential(*layers)
        self.output_bias = nn.Parameter(torch.zeros(self.out_shape))


def _image_blocks(
    blocks: int, channels: int, kernel_size: int, activation: str, normalization: bool, dropout: float
) -> list[Residual]:
    return [
        _block(
            lambda gain: convolution(channels, channels, kernel_size, gain=gain),
            activation,
            (lambda: group_norm(channels)) if normalization else None,
            nn.Dropout2d(dropout) if dropout else None,
        )
        for _ in range(blocks)
    ]
