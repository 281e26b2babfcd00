"""Multilayer perceptrons."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

__all__ = ["MLP"]


class MLP(nn.Module):
    r"""A multilayer perceptron.

    .. math:: h_0 = x, \quad h_i = a(W_i h_{i-1} + b_i), \quad y = W_{n+1} h_n + b_{n+1}

    Weights start at Glorot and Bengio's uniform, biases at zero.

    Args:
        in_features: Number of inputs, or the shape of one input, which is then flattened. Given a number,
            inputs are `(*, in_features)`, or `(B, ...)` with `in_features` values in a row of the batch.
        out_features: Number of outputs.
        hidden: Widths of the hidden layers.
        activation: Name of an activation in `torch.nn`, in lower case.

    Returns:
        From `forward`, a tensor of shape `(*, out_features)`.

    Raises:
        ValueError: Sizes that are not positive, an unknown activation, an input of another size.

    Reference:
        Glorot and Bengio, 2010. Understanding the difficulty of training deep feedforward neural networks.

    Example:
        >>> net = MLP((1, 28, 28), 2 * 20, hidden=(400,))
        >>> net(torch.rand(5, 3, 1, 28, 28)).shape
        torch.Size([5, 3, 40])
    """

    def __init__(
        self,
        in_features: int | Sequence[int],
        out_features: int,
        hidden: Sequence[int] = (400,),
        activation: str = "relu",
    ):
        super().__init__()
        self.in_features = in_features if isinstance(in_features, int) else tuple(in_features)
        self.out_features = out_features
        self.hidden = tuple(hidden)
        self.activation = activation
        self._in_shape = (in_features,) if isinstance(in_features, int) else tuple(in_features)

        widths = (math.prod(self._in_shape), *self.hidden, out_features)
        if min(widths) < 1:
            raise ValueError(f"MLP: expected positive sizes, got {in_features=}, {out_features=}, {hidden=}")
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(widths):
            layers += [_linear(fan_in, fan_out), _activation(activation)]
        self.layers = nn.Sequential(*layers[:-1])

    @property
    def output_bias(self) -> Tensor:
        """Bias of the last layer, of shape `(out_features,)`."""
        return self.layers[-1].bias  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """The outputs, of shape `(*, out_features)`."""
        return self.layers(self._flatten(x))

    def _flatten(self, x: Tensor) -> Tensor:
        shape, wanted = tuple(x.shape), self._in_shape
        if shape[-len(wanted) :] == wanted:
            return x if len(wanted) == 1 else x.flatten(-len(wanted))
        # A number of features says nothing of the input's dimensions: only the first can then lead.
        if len(wanted) == 1 and math.prod(shape[1:]) == wanted[0]:
            return x.flatten(1)
        raise ValueError(f"MLP: expected an input of shape {('*', *wanted)}, got {shape}")


def _activation(name: str) -> nn.Module:
    not_elementwise = {"GLU", "MultiheadAttention", "Softmax", "Softmax2d", "LogSoftmax", "Softmin", "Threshold"}
    known = {cls.lower(): cls for cls in sorted(set(nn.modules.activation.__all__) - not_elementwise)}
    if name not in known:
        raise ValueError(f"activation: expected one of {', '.join(known)}; got {name!r}")
    return getattr(nn, known[name])()


def _linear(fan_in: int, fan_out: int) -> nn.Linear:
    layer = nn.Linear(fan_in, fan_out)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
