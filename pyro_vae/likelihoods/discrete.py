"""Likelihoods of binary data and classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_vae.distributions import SoftBernoulli
from pyro_vae.likelihoods.factorized import Factorized

__all__ = ["Bernoulli"]


class Bernoulli(Factorized):
    r"""Binary data, independent given the latent, from logits.

    .. math:: p(x \mid z) = \prod_d \pi_d(z)^{x_d} (1 - \pi_d(z))^{1 - x_d}, \quad \operatorname{logit} \pi(z) = f(z)

    Args:
        net: A network :math:`f` from `(*, latent)` to `prod(event_shape)` outputs in any layout.
        event_shape: Shape of one datum.

    Returns:
        From `forward(z)` with `z` of shape `(*, latent)`, a distribution of batch shape `(*)` and event shape
        `event_shape`.

    Raises:
        ValueError: From `forward`, if the network's output is of another size.

    Reference:
        Kingma and Welling, 2014. Auto-encoding variational Bayes.

    Example:
        >>> from pyro_vae import networks
        >>> likelihood = Bernoulli(networks.MLP(20, 784), (1, 28, 28))
        >>> likelihood(torch.zeros(5, 20)).event_shape
        torch.Size([1, 28, 28])
    """

    support = constraints.boolean

    def distribution(self, logits: Tensor) -> Any:
        """Bernoulli with these logits."""
        return SoftBernoulli(logits=logits)

    def first_parameter(self, mean: Tensor) -> Tensor:
        """The logits of the mean."""
        # Where data are all 0 or all 1 they would be infinite, and one in a thousand is as good a start.
        return torch.logit(mean.clamp(1e-3, 1 - 1e-3))
