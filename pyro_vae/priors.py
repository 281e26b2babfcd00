"""Priors p(z): modules whose `forward()` returns a distribution over latents."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor, nn

__all__ = ["StandardNormal"]


class StandardNormal(nn.Module):
    r"""The standard normal prior.

    .. math:: p(z) = N(z; 0, I)

    Args:
        latent: Number of latent dimensions.

    Returns:
        From `forward`, a distribution of batch shape `()` and event shape `(latent,)`.

    Raises:
        ValueError: If `latent` is not positive.

    Reference:
        Kingma and Welling, 2014. Auto-encoding variational Bayes.

    Example:
        >>> StandardNormal(20)().event_shape
        torch.Size([20])
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, latent: int):
        super().__init__()
        if latent < 1:
            raise ValueError(f"StandardNormal: expected latent > 0, got {latent}")
        self.latent = latent
        self.register_buffer("loc", torch.zeros(latent), persistent=False)
        self.register_buffer("scale", torch.ones(latent), persistent=False)

    def forward(self) -> dist.Distribution:
        """The prior p(z)."""
        return dist.Normal(self.loc, self.scale).to_event(1)

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return f"latent={self.latent}"
