"""Priors over real vectors in closed form, fixed or learned."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import nn

from pyro_vae.distributions import mixture
from pyro_vae.networks import positive, scale
from pyro_vae.priors.latent import Latent

__all__ = ["ARD", "DiagonalNormal", "GaussianMixture", "Laplace", "StandardNormal", "StudentT"]


class StandardNormal(Latent):
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

    def __init__(self, latent: int):
        super().__init__(latent)
        self._standardized()

    def forward(self) -> dist.Distribution:
        """The prior p(z)."""
        return dist.Normal(self.loc, self.scale).to_event(1)


class DiagonalNormal(Latent):
    r"""A normal prior with learned mean and scale of each dimension.

    .. math:: p(z) = \prod_d N(z_d; \mu_d, \sigma_d^2)

    Args:
        latent: Number of latent dimensions.

    Raises:
        ValueError: If `latent` is not positive.

    Example:
        >>> DiagonalNormal(20)().event_shape
        torch.Size([20])
    """

    def __init__(self, latent: int):
        super().__init__(latent)
        self.loc = nn.Parameter(torch.zeros(latent))
        self.log_variance = nn.Parameter(torch.zeros(latent))

    def forward(self) -> dist.Distribution:
        """The prior p(z)."""
        return dist.Normal(self.loc, scale(self.log_variance)).to_event(1)


class GaussianMixture(Latent):
    r"""A mixture of normal distributions with learned weights, means and scales.

    .. math:: p(z) = \sum_c \pi_c \prod_d N(z_d; \mu_{cd}, \sigma_{cd}^2)

    The means start as draws from the standard normal, the scales at one.

    Args:
        latent: Number of latent dimensions.
        components: Number of components.

    Raises:
        ValueError: If a size is not positive.

    Reference:
        Dilokthanakul et al., 2016. Deep unsupervised clustering with Gaussian mixture variational autoencoders.

    Example:
        >>> GaussianMixture(20, components=5)().event_shape
        torch.Size([20])
    """

    def __init__(self, latent: int, components: int = 10):
        super().__init__(latent)
        if components < 1:
            raise ValueError(f"GaussianMixture: expected components > 0, got {components}")
        self.components = components
        self.logits = nn.Parameter(torch.zeros(components))
        self.loc = nn.Parameter(torch.randn(components, latent))
        self.log_variance = nn.Parameter(torch.zeros(components, latent))

    def forward(self) -> dist.Distribution:
        """The prior p(z)."""
        components = dist.Normal(self.loc, scale(self.log_variance)).to_event(1)
        return mixture(self.logits, components)


class Laplace(Latent):
    r"""Independent Laplace distributions of scale one: sparser than the normal.

    .. math:: p(z) = \prod_d \tfrac12 e^{-|z_d|}

    Args:
        latent: Number of latent dimensions.

    Raises:
        ValueError: If `latent` is not positive.

    Example:
        >>> Laplace(20)().event_shape
        torch.Size([20])
    """

    def __init__(self, latent: int):
        super().__init__(latent)
        self._standardized()

    def forward(self) -> dist.Distribution:
        """The prior p(z)."""
        return dist.Laplace(self.loc, self.scale).to_event(1)


class StudentT(Latent):
    r"""Independent Student's t distributions of scale one, whose tails let outliers be far out.

    .. math:: p(z) = \prod_d t_\nu(z_d)

    Args:
        latent: Number of latent dimensions.
        df: Degrees of freedom :math:`\nu`.

    Raises:
        ValueError: If `latent` or `df` is not positive.

    Example:
        >>> StudentT(20)().event_shape
        torch.Size([20])
    """

    def __init__(self, latent: int, df: float = 5.0):
        super().__init__(latent)
        if not df > 0:
            raise ValueError(f"StudentT: expected df > 0, got {df}")
        self.df = df
        self._standardized()

    def forward(self) -> dist.Distribution:
        """The prior p(z)."""
        return dist.StudentT(self.scale * self.df, self.loc, self.scale).to_event(1)


class ARD(Latent):
    r"""Automatic relevance determination: a normal prior whose scales are latent themselves, one for all data.

    .. math:: p(z \mid s) = \prod_d N(z_d; 0, s_d^2), \quad s_d \sim \text{HalfCauchy}(1), \quad
              q(s) = \prod_d \text{LogNormal}(s_d; m_d, v_d^2)

    The scales are a global site "z_scale", which `forward` samples in the model and `guide` in the guide, both outside
    the plate. The program must therefore know the number of data: `VAE(..., size=len(train))`.

    Args:
        latent: Number of latent dimensions.

    Raises:
        ValueError: If `latent` is not positive.

    Reference:
        MacKay, 1994. Bayesian methods for backpropagation networks. Bishop, 1999. Bayesian PCA.

    Example:
        >>> ARD(20)().event_shape
        torch.Size([20])
    """

    def __init__(self, latent: int):
        super().__init__(latent)
        self._standardized()
        self.log_scale_loc = nn.Parameter(torch.zeros(latent))
        self.log_scale_scale = nn.Parameter(torch.full((latent,), -2.0))

    def forward(self) -> dist.Distribution:
        """The prior p(z given s), with s sampled."""
        z_scale = pyro.sample("z_scale", dist.HalfCauchy(self.scale).to_event(1))
        return dist.Normal(self.loc, z_scale).to_event(1)

    def guide(self) -> None:
        """Sample s from q(s)."""
        pyro.sample("z_scale", dist.LogNormal(self.log_scale_loc, positive(self.log_scale_scale)).to_event(1))
