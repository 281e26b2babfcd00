"""A Bernoulli for grey targets."""

from __future__ import annotations

import pyro.distributions as dist
from torch.distributions import constraints

__all__ = ["SoftBernoulli"]


class SoftBernoulli(dist.Bernoulli):
    r"""A Bernoulli whose `log_prob` takes targets in [0, 1], the negative binary cross-entropy.

    .. math:: \log p(x) = x \log \pi + (1 - x) \log(1 - \pi)

    On {0, 1} it is the Bernoulli distribution; in between it is a loss and no likelihood, since it does not
    integrate to one (Loaiza-Ganem and Cunningham, 2019. The continuous Bernoulli: fixing a pervasive error in
    variational autoencoders).

    Example:
        >>> import torch
        >>> SoftBernoulli(logits=torch.tensor(0.0)).log_prob(torch.tensor(0.5))
        tensor(-0.6931)
    """

    support = constraints.unit_interval
