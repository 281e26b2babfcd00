"""A convolutional network over images whose outputs at a value see only the values before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["PixelCNN"]


class PixelCNN(nn.Module):
    r"""A gated residual convolutional network whose outputs at each value of an image see the values before it.

    .. math:: v_0 = A_0 x + c, \quad v_l = v_{l-1} + g(A_l v_{l-1}), \quad
              h_0 = B_0 x, \quad h_l = h_{l-1} + g(B_l h_{l-1} + L_l v_l), \quad g(a, b) = \tanh(a) \odot \sigma(b)

    Values are in raster order of their positions, and in the order of the channels at one position. The vertical stack
    `v` sees the rows above a position, to both sides, and the horizontal stack `h` the positions to the left, and `v`:
    so no value before is in a blind spot. With `R = (blocks + 1) * (kernel_size // 2)` the receptive field reaches
    `R + 1` rows up, there at least `R` positions to both sides, and `R + 1` to the left in its own row. The channels
    before at the position itself enter in the last layers, of which each channel has its own.

    A block adds at most one to each feature, so that depth does not blow up what the network starts from. Weights start
    at Glorot and Bengio's uniform, the last at a tenth of it: the network starts near `output_bias`, which is zero.

    Args:
        event_shape: Shape `(C, H, W)` of one image.
        num_params: Number of outputs `P` of each value of the image.
        channels: Number of features of each stack, and of the channels of the context `c`.
        blocks: Number of gated residual blocks.
        kernel_size: Width of the kernels, odd, at least 3.

    Returns:
        From `forward(x, context)`, with images `x` of shape `(*, C, H, W)`, of values around -1 to 1, and a context of
        shape `(*, channels, H, W)`, a tensor of shape `(*, P, C, H, W)`.

    Raises:
        ValueError: Sizes that are not positive, an even kernel; from `forward`, inputs of another size.

    Reference:
        van den Oord et al., 2016. Conditional image generation with PixelCNN decoders. Salimans et al., 2017.
        PixelCNN++: improving the PixelCNN with discretized logistic mixture likelihood and other modifications.

    Example:
        >>> net = PixelCNN((1, 8, 8), num_params=2, channels=4)
        >>> net(torch.zeros(5, 3, 1, 8, 8), torch.zeros(5, 3, 4, 8, 8)).shape
        torch.Size([5, 3, 2, 1, 8, 8])
    """

    def __init__(
        self, event_shape: Sequence[int], num_params: int, channels: int = 16, blocks: int = 2, kernel_size: int = 5
    ):
        super().__init__()
        self.event_shape = tuple(event_shape)
        self.num_params = num_params
        self.channels = channels
        self.blocks = blocks
        self.kernel_size = kernel_size
        if len(self.event_shape) != 3 or min(*self.event_shape, num_params, channels, blocks) < 1:
            raise ValueError(
                f"PixelCNN: expected an event shape (C, H, W) and positive sizes, got {event_shape=}, {num_params=}, "
                f"{channels=}, {blocks=}"
            )
        if kernel_size < 3 or kernel_size % 2 == 0:
            raise ValueError(f"PixelCNN: expected an odd kernel_size of at least 3, got {kernel_size}")

        colours = self.event_shape[0]
        self.first_above = _above(colours, channels, kernel_size, strictly=True)
        self.first_left = _left(colours, channels, kernel_size, strictly=True)
        self.gates = nn.ModuleList(_Gates(channels, kernel_size) for _ in range(blocks))
        self.heads = nn.ModuleList(_head(channels + before, channels, num_params) for before in range(colours))
        self.output_bias = nn.Parameter(torch.zeros(num_params, *self.event_shape))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """The outputs, of shape `(*, P, C, H, W)`."""
        leading, size = x.shape[:-3], self.event_shape[1:]
        if x.shape[-3:] != self.event_shape or context.shape != (*leading, self.channels, *size):
            raise ValueError(
                f"PixelCNN: expected images {('*', *self.event_shape)} and a context {('*', self.channels, *size)}, "
                f"got {tuple(x.shape)} and {tuple(context.shape)}"
            )
        x, context = x.reshape(-1, *self.event_shape), context.reshape(-1, *context.shape[-3:])
        features = self.left_of(x, self.above(x, context))
        outputs = torch.stack([self.outputs(c, features, x) for c in range(len(self.heads))], 2) + self.output_bias
        return outputs.reshape(*leading, *outputs.shape[1:])

    def above(self, x: Tensor, context: Tensor) -> list[Tensor]:
        """What each block knows of the rows above, and of the context: the vertical stack.

        Rows may be cut off below, and images and context then have fewer than the network's own.
        """
        gates: Any
        stream, links = self.first_above(x) + context, []
        for gates in self.gates:
            stream = stream + _gated(gates.above(stream))
            links.append(gates.link(stream))
        return links

    def left_of(self, x: Tensor, links: Sequence[Tensor]) -> Tensor:
        """Features of all that comes before a position, of shape `(N, channels, ...)`: the horizontal stack.

        Rows stand for themselves, and columns may be cut off on the right.
        """
        gates: Any
        stream = self.first_left(x)
        for gates, link in zip(self.gates, links, strict=True):
            stream = stream + _gated(gates.left(stream) + link)
        return stream

    def outputs(self, channel: int, features: Tensor, x: Tensor) -> Tensor:
        """Outputs of one channel, less the bias, of shape `(N, P, ...)`, at any positions."""
        return self.heads[channel](torch.cat([features, x[:, :channel]], 1))

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return f"event_shape={self.event_shape}, num_params={self.num_params}"


class _Gates(nn.Module):
    """The convolutions of a block, from features to the two halves of a gate."""

    def __init__(self, channels: int, kernel_size: int):
        super().__init__()
        self.above = _above(channels, 2 * channels, kernel_size)
        self.left = _left(channels, 2 * channels, kernel_size)
        self.link = _initialized(nn.Conv2d(channels, 2 * channels, 1, bias=False))


def _gated(halves: Tensor) -> Tensor:
    value, gate = halves.chunk(2, 1)
    return torch.tanh(value) * torch.sigmoid(gate)


def _above(inputs: int, outputs: int, kernel_size: int, strictly: bool = False) -> nn.Sequential:
    """A convolution over the rows above and, unless `strictly`, a position's own."""
    # A shift and a smaller kernel see what a masked kernel sees, for half of the work.
    side, rows = kernel_size // 2, kernel_size // 2 + 1
    pad = nn.ZeroPad2d((side, side, rows - 1 + strictly, -int(strictly)))
    return nn.Sequential(pad, _initialized(nn.Conv2d(inputs, outputs, (rows, kernel_size))))


def _left(inputs: int, outputs: int, kernel_size: int, strictly: bool = False) -> nn.Sequential:
    """A convolution over the positions to the left in the row and, unless `strictly`, a position itself."""
    columns = kernel_size // 2 + 1
    pad = nn.ZeroPad2d((columns - 1 + strictly, -int(strictly), 0, 0))
    return nn.Sequential(pad, _initialized(nn.Conv2d(inputs, outputs, (1, columns))))


def _head(inputs: int, channels: int, num_params: int) -> nn.Sequential:
    last = _initialized(nn.Conv2d(channels, num_params, 1, bias=False), gain=0.1)
    return nn.Sequential(_initialized(nn.Conv2d(inputs, channels, 1)), nn.ELU(), last)


def _initialized(layer: nn.Conv2d, gain: float = 1.0) -> nn.Conv2d:
    nn.init.xavier_uniform_(layer.weight, gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
