"""A logistic distribution on a grid."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Size, Tensor
from torch.distributions import constraints
from torch.distributions.utils import broadcast_all
from torch.nn.functional import logsigmoid

from pyro_vae.distributions.supports import Grid

__all__ = ["DiscretizedLogistic"]


class DiscretizedLogistic(TorchDistribution):
    r"""A logistic distribution discretized to the grid `i / (bins - 1)`, its tails in the first and last bin.

    .. math:: P(x) = \sigma(b) - \sigma(a) = \sigma(b)\, \sigma(-a)\, (1 - e^{a - b}), \quad
              a, b = \frac{x \mp h - \mu}{s}, \quad h = \frac{1}{2 (\text{bins} - 1)}

    with `a` minus infinity in the first bin and `b` infinity in the last. The product has no cancellation, so that no
    bin is ever lost to rounding.

    Args:
        loc: Location, of any shape.
        scale: Scale, positive.
        bins: Number of grid values, at least 2.

    Reference:
        Kingma et al., 2016. Improved variational inference with inverse autoregressive flow. Salimans et al., 2017.
        PixelCNN++.

    Example:
        >>> grid = torch.arange(256) / 255
        >>> DiscretizedLogistic(torch.tensor(0.3), torch.tensor(0.05), 256).log_prob(grid).exp().sum()
        tensor(1.0000)
    """

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}  # noqa: RUF012

    def __init__(self, loc: Tensor, scale: Tensor, bins: int, validate_args: bool | None = None):
        self.loc, self.scale = broadcast_all(loc, scale)
        self.bins = bins
        super().__init__(self.loc.shape, validate_args=validate_args)

    @property
    def support(self) -> Any:
        """The grid."""
        return Grid(self.bins)

    def expand(self, batch_shape: Any, _instance: Any = None) -> DiscretizedLogistic:
        """The same distribution over a larger batch."""
        new = self._get_checked_instance(DiscretizedLogistic, _instance)
        new.loc, new.scale, new.bins = self.loc.expand(batch_shape), self.scale.expand(batch_shape), self.bins
        TorchDistribution.__init__(new, Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of values on the grid."""
        if self._validate_args:
            self._validate_sample(value)
        half = 0.5 / (self.bins - 1)
        lower, upper = (value - half - self.loc) / self.scale, (value + half - self.loc) / self.scale
        inside = torch.log(-torch.expm1(-2 * half / self.scale))
        log_upper, log_lower = logsigmoid(upper), logsigmoid(-lower)
        first, last = value < half, value > 1 - half
        return torch.where(first, log_upper, torch.where(last, log_lower, log_upper + log_lower + inside))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw: a logistic variate, rounded to the grid."""
        with torch.no_grad():
            uniform = torch.rand(self._extended_shape(Size(sample_shape)), dtype=self.loc.dtype, device=self.loc.device)
            tiny = torch.finfo(uniform.dtype).tiny
            logistic = self.loc + self.scale * torch.logit(uniform.clamp(tiny, 1 - torch.finfo(uniform.dtype).eps))
            return (logistic * (self.bins - 1)).round().clamp(0, self.bins - 1) / (self.bins - 1)

    @property
    def mean(self) -> Tensor:
        """The mean, a sum over the grid's edges: E[i] is the sum of P(i >= j)."""
        total = torch.zeros_like(self.loc)
        for edge in range(1, self.bins):  # one at a time: an image's values for all edges would not fit
            total += torch.sigmoid((self.loc - (edge - 0.5) / (self.bins - 1)) / self.scale)
        return total / (self.bins - 1)
