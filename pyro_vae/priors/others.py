"""Priors over other things than real vectors: classes, bits, the simplex, the sphere."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae import distributions
from pyro_vae.distributions import (
    OneHotCategoricalGroups,
    OneHotGroups,
    RelaxedOneHotCategoricalGroups,
    boolean_vector,
    check_temperature,
    simplices,
)
from pyro_vae.priors.latent import Latent

__all__ = ["Bernoulli", "OneHotCategorical", "RelaxedOneHotCategorical", "UniformSphere"]


class Bernoulli(Latent):
    r"""Independent fair bits.

    .. math:: p(z) = 2^{-\text{latent}}, \quad z \in \{0, 1\}^\text{latent}

    Args:
        latent: Number of bits.

    Raises:
        ValueError: If `latent` is not positive.

    Example:
        >>> Bernoulli(20)().event_shape
        torch.Size([20])
    """

    support = boolean_vector
    logits: Tensor

    def __init__(self, latent: int):
        super().__init__(latent)
        self.register_buffer("logits", torch.zeros(latent), persistent=False)

    def forward(self) -> dist.Distribution:
        """The prior p(z)."""
        return dist.Bernoulli(logits=self.logits).to_event(1)


class _Groups(nn.Module):
    """Groups of equally likely classes."""

    support: Any
    logits: Tensor

    def __init__(self, latent: int, classes: int | None = None):
        super().__init__()
        self.latent = latent
        self.classes = classes or latent
        if latent < 2 or self.classes < 2 or latent % self.classes:
            raise ValueError(
                f"{type(self).__name__}: expected latent to be groups of at least 2 classes, "
                f"got latent={latent}, classes={classes}"
            )
        self.register_buffer("logits", torch.zeros(latent // self.classes, self.classes), persistent=False)

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return f"latent={self.latent}, classes={self.classes}"


class OneHotCategorical(_Groups):
    r"""Groups of equally likely classes, each a one-hot vector, side by side.

    .. math:: p(z) = \text{classes}^{-\text{groups}}

    Args:
        latent: Length of the vector: groups times classes.
        classes: Classes in a group (default: one group).

    Raises:
        ValueError: If `latent` is no multiple of `classes`, or there are fewer than two.

    Example:
        >>> OneHotCategorical(20, classes=10)().sample().sum()
        tensor(2.)
    """

    support = OneHotGroups()

    def forward(self) -> dist.Distribution:
        """The prior p(z)."""
        return OneHotCategoricalGroups(self.logits)


class RelaxedOneHotCategorical(_Groups):
    r"""Groups of equally likely classes, relaxed to the simplex: the prior of the Gumbel-softmax posterior.

    .. math:: z_g = \operatorname{softmax}(\gamma_g / T), \quad \gamma_{gc} \sim \text{Gumbel}(0, 1)

    Against the prior of exact classes, the density of a relaxed posterior would be compared with a probability, and the
    ELBO be no bound.

    Args:
        latent: Length of the vector: groups times classes.
        classes: Classes in a group (default: one group).
        temperature: The temperature `T`, at least 1/3 (below, float32 has too few digits).

    Raises:
        ValueError: If `latent` is no multiple of `classes`, or `temperature` is below 1/3.

    Reference:
        Maddison, Mnih and Teh, 2017. The Concrete distribution.

    Example:
        >>> RelaxedOneHotCategorical(20, classes=10)().event_shape
        torch.Size([20])
    """

    support = simplices

    def __init__(self, latent: int, classes: int | None = None, temperature: float = 0.5):
        super().__init__(latent, classes)
        check_temperature(temperature)
        self.temperature = temperature

    def forward(self) -> dist.Distribution:
        """The prior p(z)."""
        return RelaxedOneHotCategoricalGroups(self.logits, self.logits.new_tensor(self.temperature))


class UniformSphere(Latent):
    r"""The uniform distribution on the unit sphere, prior of the hyperspherical autoencoder.

    .. math:: p(z) = \frac{\Gamma(d / 2)}{2 \pi^{d / 2}}, \quad \lVert z \rVert = 1

    Args:
        latent: Dimensions `d` of the space around the sphere, at least 2.

    Raises:
        ValueError: If `latent` is less than 2.

    Reference:
        Davidson et al., 2018. Hyperspherical variational auto-encoders.

    Example:
        >>> UniformSphere(3)().event_shape
        torch.Size([3])
    """

    support = distributions.UniformSphere.support
    like: Tensor

    def __init__(self, latent: int):
        super().__init__(latent, least=2)
        self.register_buffer("like", torch.zeros(()), persistent=False)

    def forward(self) -> dist.Distribution:
        """The prior p(z)."""
        return distributions.UniformSphere(self.latent, like=self.like)
