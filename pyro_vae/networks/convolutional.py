"""Convolutional networks from images and to images of any size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_vae.networks.layers import (
    activation_gain,
    check_sizes,
    convolution,
    group_norm,
    hidden_layer,
    image_sizes,
    start_weights,
)
from pyro_vae.networks.leading import batched
from pyro_vae.networks.mlp import MLP

__all__ = ["ConvDecoder", "ConvEncoder"]


class Upsampling(nn.Module):
    r"""A convolution of the image that is twice as large, each pixel repeated: nearest-neighbour upsampling, in one.

    .. math:: y = w * \operatorname{repeat}_2(x) + b = (w * 1_{2 \times 2}) *_{\uparrow 2} x + b

    A constant image gives a constant image (but for the border), whatever the weights, so that no weights show the
    checkerboard of a free transposed convolution. The right-hand side is a transposed convolution of stride 2 whose
    kernel is `w` summed over windows of 2 x 2: the same result with 16 products for 4 pixels in place of 36.

    Args:
        in_channels: Channels of the input.
        channels: Channels of the output.
        size: Height and width of the output: twice the input's, or one less, where the last row or column is left off.
        kernel_size: Height and width of `w`, odd.
        gain: Gain of the weights at the start, see `activation_gain`.
        bias: Whether there is a bias `b`, one value a channel.

    Reference:
        Odena, Dumoulin and Olah, 2016. Deconvolution and checkerboard artifacts.

    Example:
        >>> Upsampling(4, 2, (7, 8))(torch.zeros(5, 4, 4, 4)).shape
        torch.Size([5, 2, 7, 8])
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        size: Sequence[int],
        kernel_size: int = 3,
        gain: float = 1.0,
        bias: bool = True,
    ):
        super().__init__()
        self.size = tuple(size)
        self.weight = nn.Parameter(torch.empty(in_channels, channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None
        start_weights(self.weight, in_channels * kernel_size**2, gain)

    def forward(self, x: Tensor) -> Tensor:
        """The image of shape `(B, channels, *size)`."""
        summed = F.avg_pool2d(F.pad(self.weight, (1, 1, 1, 1)), 2, stride=1, divisor_override=1)
        y = F.conv_transpose2d(x, summed, self.bias, stride=2, padding=self.weight.shape[-1] // 2)
        return y[..., : self.size[0], : self.size[1]]

    def extra_repr(self) -> str:
        """What `repr` shows."""
        in_channels, channels, kernel_size, _ = self.weight.shape
        return f"{in_channels}, {channels}, size={self.size}, {kernel_size=}, bias={self.bias is not None}"


class ImageEncoder(nn.Module):
    """What networks from images share: the image's shape, convolutions, and a perceptron as their head.

    A subclass keeps its arguments, `in_shape` among them, and sets `convolutions` and `head`.
    """

    in_shape: tuple[int, ...]
    convolutions: nn.Module
    head: MLP

    @property
    def output_bias(self) -> Tensor:
        """Bias of the last layer, of shape `(out_features,)`."""
        return self.head.output_bias

    def forward(self, x: Tensor) -> Tensor:
        """The outputs, of shape `(*, out_features)`."""
        if tuple(x.shape[-3:]) != self.in_shape:
            expected = ("*", *self.in_shape)
            raise ValueError(f"{type(self).__name__}: expected an input of shape {expected}, got {tuple(x.shape)}")
        return self.head(batched(self.convolutions, x, 3).flatten(-3))


class ImageDecoder(nn.Module):
    """What networks to images share: a perceptron as their stem, convolutions, and a bias for each output value.

    The last convolution has no bias of its own: a bias for each channel cannot say that an image's border is dark, and
    a bias for each value is where a likelihood writes the data's mean image. A subclass keeps its arguments, and sets
    `stem`, `convolutions`, which start by giving the stem's outputs the shape of an image, and `output_bias`.
    """

    stem: MLP
    convolutions: nn.Module
    output_bias: nn.Parameter

    def forward(self, z: Tensor) -> Tensor:
        """The images, of shape `(*, *out_shape)`."""
        return batched(self.convolutions, self.stem(z), 1) + self.output_bias


class ConvEncoder(ImageEncoder):
    r"""A network from images: strided convolutions, then a multilayer perceptron.

    .. math:: h_0 = x, \quad h_i = a(W_i *_{\downarrow 2} h_{i-1} + b_i), \quad y = \operatorname{MLP}(h_n)

    Each convolution halves height and width, rounded up, so that images of any size do. Its weights start at He's
    variance with the gain of the activation, so that signals keep their size at any depth; biases start at zero.

    Args:
        in_shape: Shape of one input, `(channels, height, width)`.
        out_features: Number of outputs.
        channels: Channels of the convolutions' outputs.
        kernel_size: Height and width of the kernels, odd.
        hidden: Widths of hidden layers between the convolutions and the outputs.
        activation: Name of an activation in `torch.nn`, in lower case.
        gated: Whether hidden layers are gated, see `MLP`.
        normalization: Whether hidden layers are normalized before the activation, each datum by itself: convolutions by
            groups of channels, others as in `MLP`.
        dropout: Probability that a channel (or a hidden unit of the perceptron) is left out in training.

    Returns:
        From `forward(x)` with `x` of shape `(*, *in_shape)`, a tensor of shape `(*, out_features)`.

    Raises:
        ValueError: Sizes that are not positive, an even kernel, an unknown activation, an input of another shape.

    Reference:
        He, Zhang, Ren and Sun, 2015. Delving deep into rectifiers.
        Wu and He, 2018. Group normalization.
        Tompson, Goroshin, Jain, LeCun and Bregler, 2015. Efficient object localization using convolutional networks.

    Example:
        >>> net = ConvEncoder((1, 28, 28), 2 * 20)
        >>> net(torch.rand(5, 3, 1, 28, 28)).shape
        torch.Size([5, 3, 40])
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        out_features: int,
        channels: Sequence[int] = (32, 64),
        kernel_size: int = 3,
        hidden: Sequence[int] = (),
        activation: str = "relu",
        gated: bool = False,
        normalization: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.in_shape = tuple(in_shape)
        self.out_features = out_features
        self.channels = tuple(channels)
        self.kernel_size = kernel_size
        self.hidden = tuple(hidden)
        self.activation = activation
        self.gated = gated
        self.normalization = normalization
        self.dropout = dropout
        check_sizes(
            self,
            in_shape=self.in_shape,
            out_features=out_features,
            channels=self.channels,
            kernel_size=kernel_size,
            hidden=self.hidden,
        )

        gain = activation_gain(activation, gated)
        layers: list[nn.Module] = []
        for before, after in pairwise((self.in_shape[0], *self.channels)):
            layers += hidden_layer(
                convolution(before, after, kernel_size, 2, gain),
                activation,
                gate=convolution(before, after, kernel_size, 2) if gated else None,
                normalization=group_norm(after) if normalization else None,
                dropout=nn.Dropout2d(dropout) if dropout else None,
            )
        self.convolutions = nn.Sequential(*layers)
        features = self.channels[-1] * math.prod(image_sizes(self.in_shape[1:], len(self.channels))[-1])
        self.head = MLP(features, out_features, self.hidden, activation, gated, normalization, dropout)


class ConvDecoder(ImageDecoder):
    r"""A network to images: a multilayer perceptron, then convolutions that double height and width.

    .. math:: h_0 = a(\operatorname{MLP}(z)), \quad h_i = a(W_i * \operatorname{repeat}_2(h_{i-1}) + b_i),
        \quad y = W_n * \operatorname{repeat}_2(h_{n-1}) + b

    The bias :math:`b` has a value for each output. Pixels are repeated before each convolution, since a transposed
    convolution draws checkerboards (see `Upsampling`, which costs no more than one); where a size is odd the
    last row or column is left off. Weights start as in `ConvEncoder`, biases at zero.

    Args:
        in_features: Number of inputs.
        out_shape: Shape of one output, `(channels, height, width)`.
        channels: Channels of the convolutions' inputs.
        kernel_size: Height and width of the kernels, odd.
        hidden: Widths of hidden layers between the inputs and the convolutions.
        activation: Name of an activation in `torch.nn`, in lower case.
        gated: Whether hidden layers are gated, see `MLP`; the first image of the convolutions is not.
        normalization: Whether hidden layers are normalized before the activation, as in `ConvEncoder`.
        dropout: Probability that a channel (or a hidden unit of the perceptron) is left out in training.

    Returns:
        From `forward(z)` with `z` of shape `(*, in_features)`, a tensor of shape `(*, *out_shape)`.

    Raises:
        ValueError: Sizes that are not positive, an even kernel, an unknown activation, an input of another size.

    Reference:
        Odena, Dumoulin and Olah, 2016. Deconvolution and checkerboard artifacts.

    Example:
        >>> net = ConvDecoder(20, (3, 28, 27))
        >>> net(torch.randn(5, 4, 20)).shape
        torch.Size([5, 4, 3, 28, 27])
    """

    def __init__(
        self,
        in_features: int,
        out_shape: Sequence[int],
        channels: Sequence[int] = (64, 32),
        kernel_size: int = 3,
        hidden: Sequence[int] = (),
        activation: str = "relu",
        gated: bool = False,
        normalization: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.in_features = in_features
        self.out_shape = tuple(out_shape)
        self.channels = tuple(channels)
        self.kernel_size = kernel_size
        self.hidden = tuple(hidden)
        self.activation = activation
        self.gated = gated
        self.normalization = normalization
        self.dropout = dropout
        check_sizes(
            self,
            in_features=in_features,
            out_shape=self.out_shape,
            channels=self.channels,
            kernel_size=kernel_size,
            hidden=self.hidden,
        )

        gain = activation_gain(activation, gated)
        smallest, *sizes, full = reversed(image_sizes(self.out_shape[1:], len(self.channels)))
        image = (self.channels[0], *smallest)
        self.stem = MLP(in_features, math.prod(image), self.hidden, activation, gated, normalization, dropout)
        layers = self._hidden(nn.Unflatten(-1, image), image[0])
        for (before, after), size in zip(pairwise(self.channels), sizes, strict=True):
            gate = Upsampling(before, after, size, kernel_size) if gated else None
            layers += self._hidden(Upsampling(before, after, size, kernel_size, gain), after, gate)
        last = Upsampling(self.channels[-1], self.out_shape[0], full, kernel_size, bias=False)
        self.convolutions = nn.Sequential(*layers, last)
        self.output_bias = nn.Parameter(torch.zeros(self.out_shape))

    def _hidden(self, layer: nn.Module, channels: int, gate: nn.Module | None = None) -> list[nn.Module]:
        return hidden_layer(
            layer,
            self.activation,
            gate=gate,
            normalization=group_norm(channels) if self.normalization else None,
            dropout=nn.Dropout2d(self.dropout) if self.dropout else None,
        )
