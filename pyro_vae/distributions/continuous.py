"""Continuous distributions with what torch's lack."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_vae.distributions.supports import open_unit_interval

__all__ = ["BatchNormal", "OpenBeta"]


class OpenBeta(dist.Beta):
    """A Beta distribution on the open interval (0, 1): at its ends the density is zero or infinite.

    Example:
        >>> bool(OpenBeta(torch.tensor(1e-3), torch.tensor(1e-3)).sample() < 1)
        True
    """

    support = open_unit_interval  # type: ignore[assignment]

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw, with a gradient; draws that were rounded to an end are moved inside."""
        value = super().rsample(sample_shape)
        info = torch.finfo(value.dtype)
        return value.clamp(info.tiny, 1 - info.eps)

    def expand(self, batch_shape: Any, _instance: Any = None) -> OpenBeta:
        """The same distribution over a larger batch."""
        return super().expand(batch_shape, self._get_checked_instance(OpenBeta, _instance))


class BatchNormal(dist.Normal):
    r"""A normal distribution whose density is taken at the one variance that suits the values best.

    .. math:: \log p(x) = \log N(x; \mu, s^2), \quad s^2 = \text{mean}((x - \mu)^2)

    The mean is over all values at once, so that this is a loss for training and no density. Samples have the scale that
    it was made with.

    Args:
        loc: Location.
        scale: Scale of samples.
        observe: Called with the variance, a scalar without gradient.

    Reference:
        Rybkin, Daniilidis and Levine, 2021. Simple and effective VAE training with calibrated decoders.

    Example:
        >>> BatchNormal(torch.zeros(2), torch.ones(2), print).log_prob(torch.tensor([3.0, -3.0]))
        tensor(9.)
        tensor([-2.5176, -2.5176])
    """

    def __init__(self, loc: Tensor, scale: Tensor, observe: Any, validate_args: bool | None = None):
        super().__init__(loc, scale, validate_args=validate_args)
        self.observe = observe

    def expand(self, batch_shape: Any, _instance: Any = None) -> BatchNormal:
        """The same distribution over a larger batch."""
        new = self._get_checked_instance(BatchNormal, _instance)
        new.observe = self.observe
        return super().expand(batch_shape, new)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density at the best variance of all values."""
        # At the best variance the loss is flat in it: its gradient is zero and may be left out.
        variance = (value - self.loc).detach().square().mean().clamp(min=1e-8)
        self.observe(variance)
        return dist.Normal(self.loc, variance.sqrt(), validate_args=self._validate_args).log_prob(value)
