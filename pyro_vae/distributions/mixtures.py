"""Mixtures of normal distributions that are scored by matrix products."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

__all__ = ["DiagonalNormalMixture", "PathwiseMixture", "mixture"]


def mixture(logits: Tensor, components: Any) -> dist.Distribution:
    """The mixture of the components in the last batch dimension, in the fastest form that there is of it.

    Args:
        logits: Log-weights, of shape `(C,)`.
        components: A distribution of batch shape `(C,)`.

    Example:
        >>> components = dist.Normal(torch.zeros(5, 2), 1.0).to_event(1)
        >>> type(mixture(torch.zeros(5), components)).__name__
        'DiagonalNormalMixture'
    """
    diagonal = isinstance(components, dist.Independent) and type(components.base_dist) is dist.Normal
    cls = DiagonalNormalMixture if diagonal and len(components.event_shape) == 1 else _Mixture
    return cls(dist.Categorical(logits=logits), components)


class _Mixture(dist.MixtureSameFamily):
    """Torch's, with the support of its components, which has a bijection where torch's own constraint has none."""

    @property
    def support(self) -> Any:
        return self.component_distribution.support


class DiagonalNormalMixture(_Mixture):
    r"""A mixture of normal distributions with independent dimensions, the same for all values.

    .. math:: \log N(z; \mu_c, \sigma_c) = -\tfrac12 \sum_d \left( \frac{z_d^2}{\sigma_{cd}^2}
              - \frac{2 z_d \mu_{cd}}{\sigma_{cd}^2} + \frac{\mu_{cd}^2}{\sigma_{cd}^2} \right)
              - \sum_d \log \sigma_{cd} \sqrt{2 \pi}

    The sums are products of matrices: many times faster than the differences `z - mu` of all values and components.
    They cancel where scales are small, and are therefore taken in float64.

    Args:
        mixture_distribution: Categorical of batch shape `()` over `C` components.
        component_distribution: Independent normal of batch shape `(C,)` and event shape `(D,)`.

    Example:
        >>> components = dist.Normal(torch.zeros(5, 2), 1.0).to_event(1)
        >>> DiagonalNormalMixture(dist.Categorical(logits=torch.zeros(5)), components).log_prob(torch.zeros(3, 2))
        tensor([-1.8379, -1.8379, -1.8379])
    """

    def __init__(self, mixture_distribution: Any, component_distribution: Any, validate_args: bool | None = None):
        super().__init__(mixture_distribution, component_distribution, validate_args)
        self.once = mixture_distribution, component_distribution

    def expand(self, batch_shape: Any, _instance: Any = None) -> DiagonalNormalMixture:
        """The same distribution over a larger batch."""
        new = super().expand(batch_shape, self._get_checked_instance(DiagonalNormalMixture, _instance))
        new.once = self.once
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of values of shape `(*, D)`."""
        if self._validate_args:
            self._validate_sample(value)
        weights, components = self.once
        # Apple's devices have no float64.
        dtype = value.dtype if value.device.type == "mps" else torch.float64
        loc, scale, z = (t.to(dtype) for t in (components.base_dist.loc, components.base_dist.scale, value))
        precision = scale.square().reciprocal()
        constant = (0.5 * loc.square() * precision + scale.log()).sum(-1) + 0.5 * loc.shape[-1] * math.log(2 * math.pi)
        log_density = z @ (loc * precision).mT - 0.5 * z.square() @ precision.mT - constant
        log_density = (weights.logits + log_density).logsumexp(-1).to(value.dtype)
        return log_density.expand(torch.broadcast_shapes(log_density.shape, self.batch_shape))


class PathwiseMixture(_Mixture):
    r"""A mixture of normal distributions with independent dimensions whose draws have a gradient to all parameters.

    .. math:: \frac{\partial z_d}{\partial \theta} = -\frac{\partial F_d / \partial \theta}{p(z_d \mid z_{<d})}, \quad
              F_d = \sum_c w_c\, \Phi\!\left(\frac{z_d - \mu_{cd}}{\sigma_{cd}}\right), \quad
              w_c \propto \pi_c \prod_{e < d} N(z_e; \mu_{ce}, \sigma_{ce}^2)

    One dimension after another, the distribution function of a draw given the dimensions before it is held constant.
    The gradient is exact (that of Pyro's `MixtureOfDiagNormals` to the logits is not), and of first order only.

    Args:
        loc: Means, of shape `(*batch, components, D)`.
        scale: Scales, of the same shape.
        logits: Log-weights, of shape `(*batch, components)`.

    Reference:
        Figurnov, Mohamed and Mnih, 2018. Implicit reparameterization gradients.

    Example:
        >>> PathwiseMixture(torch.zeros(5, 3, 2), torch.ones(5, 3, 2), torch.zeros(5, 3)).rsample((4,)).shape
        torch.Size([4, 5, 2])
    """

    has_rsample = True

    def __init__(self, loc: Tensor, scale: Tensor, logits: Tensor, validate_args: bool | None = None):
        components = dist.Normal(loc, scale).to_event(1)
        super().__init__(dist.Categorical(logits=logits), components, validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> PathwiseMixture:
        """The same distribution over a larger batch."""
        return super().expand(batch_shape, self._get_checked_instance(PathwiseMixture, _instance))

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw, with a gradient."""
        drawn = self.sample(torch.Size(sample_shape))
        normal = self.component_distribution.base_dist
        log_weights = self.mixture_distribution.logits
        dimensions = []
        for d, z in enumerate(drawn.unbind(-1)):
            component = torch.distributions.Normal(normal.loc[..., d], normal.scale[..., d], validate_args=False)
            weights = log_weights.softmax(-1)
            cdf = (weights * component.cdf(z.unsqueeze(-1))).sum(-1)
            density = (weights * component.log_prob(z.unsqueeze(-1)).exp()).sum(-1).detach()
            # Its value is z, its gradient the implicit one.
            z = z - (cdf - cdf.detach()) / density.clamp(min=torch.finfo(z.dtype).tiny)
            log_weights = log_weights + component.log_prob(z.unsqueeze(-1))
            dimensions.append(z)
        return torch.stack(dimensions, -1)
