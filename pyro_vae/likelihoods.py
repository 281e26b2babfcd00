"""Likelihoods p(x given z): modules whose `forward(z)` returns a distribution over data."""

from __future__ import annotations

from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.distributions import SoftBernoulli
from pyro_vae.networks import split_parameters

__all__ = ["Bernoulli"]


class Bernoulli(nn.Module):
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

    num_params = 1

    def __init__(self, net: nn.Module, event_shape: Sequence[int]):
        super().__init__()
        self.net = net
        self.event_shape = tuple(event_shape)

    def forward(self, z: Tensor) -> dist.Distribution:
        """The likelihood p(x given z)."""
        (logits,) = split_parameters(self.net(z), z.shape[:-1], self.num_params, self.event_shape)
        return SoftBernoulli(logits=logits).to_event(len(self.event_shape))

    def start_at(self, mean: Tensor) -> None:
        """Set the network's output bias so that it starts from the data's mean, of shape `event_shape`.

        Raises:
            ValueError: If the network has no `output_bias` of that size.
        """
        bias = getattr(self.net, "output_bias", None)
        if bias is None or bias.numel() != mean.numel():
            raise ValueError(
                f"{type(self.net).__name__}: expected an output_bias of {mean.numel()} values to start at the mean"
            )
        with torch.no_grad():
            # Where data are all 0 or all 1 the bias would be infinite, and one in a thousand is as good a start.
            bias.copy_(torch.logit(mean.clamp(1e-3, 1 - 1e-3)).reshape(bias.shape))
