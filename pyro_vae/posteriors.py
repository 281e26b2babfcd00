"""Amortized posteriors q(z given x): modules whose `forward(x)` returns a distribution over latents."""

from __future__ import annotations

import pyro.distributions as dist
from torch import Tensor, nn

from pyro_vae.networks import scale, split_parameters

__all__ = ["DiagonalNormal"]


class DiagonalNormal(nn.Module):
    r"""A normal posterior with independent dimensions, from mean and log-variance heads.

    .. math:: q(z \mid x) = \prod_d N(z_d; \mu_d(x), \sigma_d(x)^2), \quad (\mu, \log \sigma^2)(x) = f(x)

    Args:
        net: A network :math:`f` from data to `2 * latent` outputs, means first.
        latent: Number of latent dimensions.

    Returns:
        From `forward(x)` with `x` of shape `(*, *event_shape)`, a distribution of batch shape `(*)` and event
        shape `(latent,)`.

    Raises:
        ValueError: From `forward`, if the network's output is of another size.

    Reference:
        Kingma and Welling, 2014. Auto-encoding variational Bayes.

    Example:
        >>> import torch
        >>> from pyro_vae import networks
        >>> posterior = DiagonalNormal(networks.MLP(784, 2 * 20), 20)
        >>> posterior(torch.rand(5, 1, 28, 28)).batch_shape
        torch.Size([5])
    """

    num_params = 2

    def __init__(self, net: nn.Module, latent: int):
        super().__init__()
        self.net = net
        self.latent = latent

    def forward(self, x: Tensor) -> dist.Distribution:
        """The posterior q(z given x)."""
        output = self.net(x)
        loc, log_variance = split_parameters(output, output.shape[:-1], self.num_params, (self.latent,))
        return dist.Normal(loc, scale(log_variance)).to_event(1)
