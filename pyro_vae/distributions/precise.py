"""Distributions that are computed in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Size, Tensor

__all__ = ["Precise", "in_float64"]


def in_float64(make: Callable[..., Any], *parameters: Tensor) -> TorchDistribution:
    """The distribution of the parameters, computed in float64, with values and log-probabilities of their dtype.

    A count's log-probability is a small difference of large logarithms of factorials, of which float32 leaves little:
    it is nats off at a million.

    Args:
        make: From parameters to a distribution.
        *parameters: The parameters.

    Example:
        >>> import pyro.distributions as dist
        >>> in_float64(dist.Poisson, torch.tensor(1e7)).log_prob(torch.tensor(1e7))
        tensor(-8.9780)
    """
    if parameters[0].device.type == "mps":  # Apple's devices have no float64
        return make(*parameters)
    return Precise(make(*(parameter.double() for parameter in parameters)), parameters[0].dtype)


class Precise(TorchDistribution):
    """A distribution of float64 parameters, with values and log-probabilities of another dtype.

    Args:
        base_dist: The distribution, not reparameterized.
        dtype: The dtype to the outside.

    Example:
        >>> import pyro.distributions as dist
        >>> Precise(dist.Poisson(torch.tensor(3.0).double()), torch.float32).mean
        tensor(3.)
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 (as torch has it)

    def __init__(self, base_dist: Any, dtype: torch.dtype, validate_args: bool | None = None):
        self.base_dist = base_dist
        self.dtype = dtype
        super().__init__(base_dist.batch_shape, base_dist.event_shape, validate_args=validate_args)

    @property
    def support(self) -> Any:
        """The distribution's."""
        return self.base_dist.support

    @property
    def mean(self) -> Tensor:
        """The mean."""
        return self.base_dist.mean.to(self.dtype)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Precise:
        """The same distribution over a larger batch."""
        return Precise(self.base_dist.expand(Size(batch_shape)), self.dtype, validate_args=False)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw."""
        return self.base_dist.sample(Size(sample_shape)).to(self.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability."""
        return self.base_dist.log_prob(value.double()).to(self.dtype)
