"""Multilayer perceptrons."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from pyro_vae.networks.layers import activation_layer, check_sizes, hidden_layer, linear
from pyro_vae.networks.leading import flat

__all__ = ["MLP"]


class MLP(nn.Module):
    r"""A multilayer perceptron.

    .. math:: h_0 = x, \quad h_i = a(W_i h_{i-1} + b_i), \quad y = W_{n+1} h_n + b_{n+1}

    Weights start at Glorot and Bengio's uniform, biases at zero. A gated layer is
    :math:`a(W_i h_{i-1} + b_i) \odot \operatorname{sigmoid}(V_i h_{i-1} + c_i)`; its :math:`W_i` starts at twice that,
    since its gate starts at a half.

    Args:
        in_features: Number of inputs, or the shape of one input, which is then flattened. Given a number,
            inputs are `(*, in_features)`, or `(B, ...)` with `in_features` values in a row of the batch.
        out_features: Number of outputs.
        hidden: Widths of the hidden layers.
        activation: Name of an activation in `torch.nn`, in lower case.
        gated: Whether hidden layers are gated.
        normalization: Whether hidden layers are normalized before the activation, each datum by itself (LayerNorm).
        dropout: Probability that a hidden unit is left out in training.

    Returns:
        From `forward`, a tensor of shape `(*, out_features)`.

    Raises:
        ValueError: Sizes that are not positive, an unknown activation, an input of another size.

    Reference:
        Glorot and Bengio, 2010. Understanding the difficulty of training deep feedforward neural networks.
        Dauphin, Fan, Auli and Grangier, 2017. Language modeling with gated convolutional networks.
        Tomczak and Welling, 2018. VAE with a VampPrior.

    Example:
        >>> import torch
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
        gated: bool = False,
        normalization: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.in_features = in_features if isinstance(in_features, int) else tuple(in_features)
        self.out_features = out_features
        self.hidden = tuple(hidden)
        self.activation = activation
        self.gated = gated
        self.normalization = normalization
        self.dropout = dropout
        check_sizes(self, in_features=self.in_features, out_features=out_features, hidden=self.hidden)
        activation_layer(activation)  # a wrong name is an error without hidden layers, too

        widths = (self.in_features if isinstance(self.in_features, int) else math.prod(self.in_features), *self.hidden)
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(widths):
            layers += hidden_layer(
                linear(fan_in, fan_out, 2.0 if gated else 1.0),  # a gate starts at a half
                activation,
                gate=linear(fan_in, fan_out) if gated else None,
                normalization=nn.LayerNorm(fan_out) if normalization else None,
                dropout=nn.Dropout(dropout) if dropout else None,
            )
        self.layers = nn.Sequential(*layers, linear(widths[-1], out_features))

    @property
    def output_bias(self) -> Tensor:
        """Bias of the last layer, of shape `(out_features,)`."""
        return self.layers[-1].bias  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """The outputs, of shape `(*, out_features)`."""
        return self.layers(flat(self, x, self.in_features))
