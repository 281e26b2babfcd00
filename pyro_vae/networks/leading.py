"""Any leading dimensions for networks that take one batch dimension."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

__all__ = ["AnyLeading"]


class AnyLeading(nn.Module):
    r"""A network that takes one batch dimension, made to take any number of leading dimensions.

    .. math:: y_{k b} = f(x_{k b})

    All leading dimensions become one batch for the network, and are put back in its output. A network whose outputs
    depend on the rest of the batch, as with batch normalization, then sees particles and data as one batch.

    Args:
        net: The network :math:`f`, from `(N, *event)` to `(N, *output)`.
        event_dim: Number of dimensions of one input: 3 for images `(channels, height, width)`.

    Returns:
        From `forward(x)` with `x` of shape `(*, *event)`, a tensor of shape `(*, *output)`.

    Raises:
        ValueError: A negative `event_dim`, an input with fewer dimensions, a network that changes the batch's size.

    Example:
        >>> import torch
        >>> net = AnyLeading(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 6 * 6, 10)), event_dim=3)
        >>> net(torch.rand(5, 3, 1, 8, 8)).shape
        torch.Size([5, 3, 10])
    """

    def __init__(self, net: nn.Module, event_dim: int):
        super().__init__()
        if event_dim < 0:
            raise ValueError(f"AnyLeading: expected event_dim of 0 or more, got {event_dim}")
        self.net = net
        self.event_dim = event_dim

    @property
    def output_bias(self) -> Tensor:
        """The network's `output_bias`, where it has one."""
        return self.net.output_bias  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """The outputs, of shape `(*, *output)`."""
        return batched(self.net, x, self.event_dim)

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return f"event_dim={self.event_dim}"


def batched(net: nn.Module, x: Tensor, event_dim: int) -> Tensor:
    """Call `net` with all but the last `event_dim` dimensions of `x` as one batch dimension.

    Raises:
        ValueError: An input with fewer dimensions, a network that changes the batch's size.

    Example:
        >>> import torch
        >>> batched(nn.Linear(3, 2), torch.zeros(5, 4, 3), 1).shape
        torch.Size([5, 4, 2])
    """
    if x.dim() < event_dim:
        raise ValueError(f"expected an input of at least {event_dim} dimensions, got shape {tuple(x.shape)}")
    leading, event = x.shape[: x.dim() - event_dim], x.shape[x.dim() - event_dim :]
    size = math.prod(leading)
    output = net(x.reshape(size, *event))
    if output.shape[:1] != (size,):
        raise ValueError(f"{type(net).__name__}: expected outputs of shape {(size, '*')}, got {tuple(output.shape)}")
    return output.reshape(*leading, *output.shape[1:])


def flat(owner: nn.Module, x: Tensor, in_features: int | Sequence[int]) -> Tensor:
    """The inputs of the network `owner` with the dimensions of one input, `in_features`, flattened.

    Raises:
        ValueError: An input of another size.
    """
    shape, wanted = tuple(x.shape), (in_features,) if isinstance(in_features, int) else tuple(in_features)
    if shape[len(shape) - len(wanted) :] == wanted:
        return x if len(wanted) == 1 else x.reshape(*shape[: len(shape) - len(wanted)], math.prod(wanted))
    # A number of features says nothing of the input's dimensions: only the first can then lead.
    if shape and len(wanted) == 1 and math.prod(shape[1:]) == wanted[0]:
        return x.reshape(shape[0], wanted[0])
    raise ValueError(f"{type(owner).__name__}: expected an input of shape {('*', *wanted)}, got {shape}")
