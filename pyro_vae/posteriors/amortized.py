"""What posteriors share whose parameters a network gives."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_vae.networks import at_least_float32

__all__ = ["Amortized"]


class Amortized(nn.Module):
    r"""A posterior whose parameters are the outputs of a network.

    .. math:: q(z \mid x) = q(z; f(x))

    A posterior of this kind says how many outputs it takes, and the `distribution(outputs)` that they give. It needs
    not be of this class (see `docs/extending.md`).

    Args:
        net: A network :math:`f` from data to `num_outputs` outputs.
        latent: Number of latent dimensions.

    Raises:
        ValueError: If `latent` is not positive; from `forward`, if the network's output is of another size.
    """

    num_params: int = 1
    support: Any = constraints.real_vector
    twice_differentiable = True  # whether draws have second derivatives, as `SemiAmortized` needs of its base

    def __init__(self, net: nn.Module, latent: int):
        super().__init__()
        if latent < 1:
            raise ValueError(f"{type(self).__name__}: expected latent > 0, got {latent}")
        self.net = net
        self.latent = latent

    @property
    def num_outputs(self) -> int:
        """How many outputs the network must have."""
        return self.num_params * self.latent

    def forward(self, x: Tensor) -> dist.Distribution:
        """The posterior q(z given x)."""
        return self.distribution(self.outputs(x))

    def outputs(self, x: Tensor) -> Tensor:
        """The network's outputs, of shape `(*leading, num_outputs)`."""
        outputs = self.net(x)
        if outputs.shape[-1] != self.num_outputs:
            raise ValueError(
                f"{type(self).__name__}: expected {self.num_outputs} values of the network for a datum, "
                f"got shape {tuple(outputs.shape)}"
            )
        # No location is a million away; beyond, the square of a distance in float32 would be infinite.
        return at_least_float32(outputs).clamp(-1e6, 1e6)

    def distribution(self, outputs: Tensor) -> Any:
        """The distribution of outputs of shape `(*leading, num_outputs)`."""
        raise NotImplementedError

    def _split(self, outputs: Tensor, *shapes: tuple[int, ...]) -> list[Tensor]:
        """The outputs as tensors of these shapes."""
        parts = outputs.split([math.prod(shape) for shape in shapes], -1)
        return [part.unflatten(-1, shape) for part, shape in zip(parts, shapes, strict=True)]

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return f"latent={self.latent}"
