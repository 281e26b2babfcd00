"""Likelihoods of binary data and classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_vae.distributions import SoftBernoulli
from pyro_vae.likelihoods.factorized import Factorized

__all__ = ["Bernoulli", "Categorical"]


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


class Categorical(Factorized):
    r"""Classes, as numbers from 0 to `num_classes - 1`.

    .. math:: p(x \mid z) = \prod_d \pi_{d, x_d}, \quad \pi_d = \operatorname{softmax}(l_d)

    Args:
        net: A network from `(*, latent)` to logits, `num_classes * prod(event_shape)` values, class by class.
        event_shape: Shape of one datum.
        num_classes: Number of classes, at least 2.

    Raises:
        ValueError: If there are fewer than two classes; from `forward`, if the network's output is of another size.

    Example:
        >>> from pyro_vae import networks
        >>> Categorical(networks.MLP(2, 4 * 3), (3,), num_classes=4)(torch.zeros(5, 2)).event_shape
        torch.Size([3])
    """

    support = constraints.nonnegative_integer

    def __init__(self, net: nn.Module, event_shape: Sequence[int], num_classes: int):
        super().__init__(net, event_shape)
        if num_classes < 2:
            raise ValueError(f"Categorical: expected num_classes > 1, got {num_classes}")
        self.num_classes = self.num_params = num_classes

    def distribution(self, *logits: Tensor) -> Any:
        """Categorical with these logits, one tensor a class."""
        return dist.Categorical(logits=torch.stack(logits, -1))
