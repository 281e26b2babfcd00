"""What likelihoods share whose values are independent given the latent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.networks import flat_output_bias, split_parameters

__all__ = ["Factorized"]


class Factorized(nn.Module):
    r"""Values that are independent given the latent, each with `num_params` parameters from the network.

    .. math:: p(x \mid z) = \prod_d p(x_d \mid \theta_d), \quad \theta = f(z)

    A likelihood of this kind says how many parameters a value has, and `distribution(*parameters)` of them. It needs
    not be of this class (see `docs/extending.md`).

    Args:
        net: A network :math:`f` from `(*, latent)` to `num_params * prod(event_shape)` outputs in any layout, the first
            parameter of all values first.
        event_shape: Shape of one datum.

    Raises:
        ValueError: From `forward`, if the network's output is of another size.
    """

    num_params: int = 1
    support: ClassVar[Any]
    distribution: Any  # a method: from parameters, each of shape (*leading, *event_shape), to their distribution

    def __init__(self, net: nn.Module, event_shape: Sequence[int]):
        super().__init__()
        self.net = net
        self.event_shape = tuple(event_shape)

    @property
    def num_outputs(self) -> int:
        """How many outputs the network must have."""
        return self.num_params * math.prod(self.event_shape)

    def forward(self, z: Tensor) -> dist.Distribution:
        """The likelihood p(x given z)."""
        return self.from_outputs(self.net(z), z.shape[:-1])

    def from_outputs(self, outputs: Tensor, leading: Sequence[int]) -> dist.Distribution:
        """The likelihood of the network's outputs, which have the leading shape `leading`."""
        parameters = split_parameters(outputs, leading, self.num_params, self.event_shape)
        return self.distribution(*parameters).to_event(len(self.event_shape))

    def first_parameter(self, mean: Tensor) -> Tensor:
        """The first parameter of a likelihood with this mean, the others being zero; zero where none is known."""
        return torch.zeros_like(mean)

    def start_at(self, mean: Tensor) -> None:
        """Set the network's output bias so that it starts from the data's mean, of shape `event_shape`.

        Raises:
            ValueError: If the network has no `output_bias` of the size of its outputs.
        """
        bias = flat_output_bias(self.net, self.num_outputs)
        first = self.first_parameter(mean.to(bias)).reshape(-1)
        bias[: first.numel()] = first

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return f"event_shape={self.event_shape}"
