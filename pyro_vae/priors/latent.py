"""What priors share over vectors of so many dimensions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import constraints

__all__ = ["Latent"]


class Latent(nn.Module):
    """A prior over vectors of `latent` dimensions."""

    support: Any = constraints.real_vector
    loc: Tensor
    scale: Tensor

    def __init__(self, latent: int, least: int = 1):
        super().__init__()
        if latent < least:
            raise ValueError(f"{type(self).__name__}: expected latent > {least - 1}, got {latent}")
        self.latent = latent

    def _standardized(self) -> None:
        """Buffers of zeros and ones, which follow the module to its device and dtype."""
        self.register_buffer("loc", torch.zeros(self.latent), persistent=False)
        self.register_buffer("scale", torch.ones(self.latent), persistent=False)

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return f"latent={self.latent}"
