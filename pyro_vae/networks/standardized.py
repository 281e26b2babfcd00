"""Networks whose inputs are brought to one scale."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["Standardized"]


class Standardized(nn.Module):
    r"""A network of standardized inputs, for columns of a table that differ in unit and size.

    .. math:: y = f((x - m) / s)

    An encoder of raw columns starts far from the prior, since its first outputs are of the size of its inputs, and has
    eyes for the largest column only. Location and scale are constants, so that a datum's posterior depends on no batch.

    Args:
        net: A network :math:`f` of inputs `(*, features)`.
        loc: What is taken from each feature, `m`, in the feature's unit.
        scale: What each feature is then divided by, `s`, in the feature's unit, positive.

    Returns:
        From `forward`, what `net` returns.

    Raises:
        ValueError: If the scale is not positive and finite, or not of the size of the location; from `forward`, if the
            input is of another size.

    Reference:
        Nazabal, Olmos, Ghahramani and Valera, 2020. Handling incomplete heterogeneous data using VAEs (which normalizes
        batch by batch).

    Example:
        >>> Standardized(nn.Identity(), loc=(750.0, 1.0), scale=(300.0, 0.25))(torch.tensor([[1050.0, 0.5]]))
        tensor([[ 1., -2.]])
    """

    _loc: Tensor
    _scale: Tensor

    def __init__(self, net: nn.Module, loc: Sequence[float], scale: Sequence[float]):
        super().__init__()
        self.net = net
        self.loc = tuple(float(value) for value in loc)
        self.scale = tuple(float(value) for value in scale)
        if len(self.loc) != len(self.scale) or not all(0 < value < math.inf for value in self.scale):
            raise ValueError(f"Standardized: expected {len(self.loc)} scales above 0, got {self.scale}")
        # The arguments say it all, so that these are no state.
        self.register_buffer("_loc", torch.tensor(self.loc), persistent=False)
        self.register_buffer("_scale", torch.tensor(self.scale), persistent=False)

    @classmethod
    def of(cls, net: nn.Module, x: Tensor) -> Standardized:
        """With mean and standard deviation of data `x`, of shape `(N, features)`; a constant feature has scale 1.

        Example:
            >>> Standardized.of(nn.Identity(), torch.tensor([[0.0, 7.0], [10.0, 7.0]])).scale
            (5.0, 1.0)
        """
        loc, scale = x.double().mean(0), x.double().std(0, correction=0)
        return cls(net, loc.tolist(), torch.where(scale > 0, scale, 1.0).tolist())

    def forward(self, x: Tensor) -> Tensor:
        """What the network makes of the standardized inputs."""
        if x.shape[-1:] != (len(self.loc),):
            raise ValueError(f"Standardized: expected an input of shape (*, {len(self.loc)}), got {tuple(x.shape)}")
        return self.net((x - self._loc) / self._scale)
