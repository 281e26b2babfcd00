"""Normal posteriors: of independent dimensions, of low rank, full, and mixed."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.distributions import PathwiseMixture
from pyro_vae.networks import scale
from pyro_vae.posteriors.amortized import Amortized

__all__ = ["DiagonalNormal", "FullNormal", "LowRankNormal", "Mixture"]


class DiagonalNormal(Amortized):
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
        >>> from pyro_vae import networks
        >>> posterior = DiagonalNormal(networks.MLP(784, 2 * 20), 20)
        >>> posterior(torch.rand(5, 1, 28, 28)).batch_shape
        torch.Size([5])
    """

    num_params = 2

    def distribution(self, outputs: Tensor) -> Any:
        """Normal with these means, then log-variances."""
        loc, log_variance = outputs.chunk(2, -1)
        return dist.Normal(loc, scale(log_variance)).to_event(1)


class FullNormal(Amortized):
    r"""A normal posterior with a full covariance, from its Cholesky factor.

    .. math:: q(z \mid x) = N(z; \mu, L L^T), \quad L = \operatorname{diag}(\sigma)\, (I + M)

    with `M` strictly lower triangular, its entries bounded by 10: rows in units of their own scale.

    Args:
        net: A network from data to means, log-variances and the entries of `10 M` row by row (so that it starts nearly
            diagonal): `2 * latent + latent * (latent - 1) / 2` outputs.
        latent: Number of latent dimensions.

    Raises:
        ValueError: From `forward`, if the network's output is of another size.

    Reference:
        Kingma and Welling, 2019. An introduction to variational autoencoders (full-covariance posterior).

    Example:
        >>> from pyro_vae import networks
        >>> FullNormal(networks.MLP(784, 20 + 20 + 190), 20)(torch.rand(5, 784)).event_shape
        torch.Size([20])
    """

    rows: Tensor
    columns: Tensor

    def __init__(self, net: nn.Module, latent: int):
        super().__init__(net, latent)
        rows, columns = torch.tril_indices(latent, latent, -1)
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("columns", columns, persistent=False)

    @property
    def num_outputs(self) -> int:
        """How many outputs the network must have."""
        return 2 * self.latent + len(self.rows)

    def distribution(self, outputs: Tensor) -> Any:
        """Multivariate normal with these means, log-variances and entries of `10 M`."""
        loc, log_variance, entries = outputs.split([self.latent, self.latent, len(self.rows)], -1)
        unit = torch.eye(self.latent, dtype=loc.dtype, device=loc.device).repeat(*loc.shape[:-1], 1, 1)
        unit[..., self.rows, self.columns] = (0.1 * entries).clamp(-10.0, 10.0)
        return dist.MultivariateNormal(loc, scale_tril=scale(log_variance).unsqueeze(-1) * unit)


class LowRankNormal(Amortized):
    r"""A normal posterior whose covariance is diagonal plus one of low rank.

    .. math:: q(z \mid x) = N(z; \mu, S (I + W W^T) S), \quad S = \operatorname{diag}(\sigma), \quad
              W \in R^{\text{latent} \times r}

    with entries of `W` bounded by 30, rows in units of their own scale.

    Args:
        net: A network from data to means, log-variances and `10 W` (so that it starts nearly diagonal):
            `(2 + rank) * latent` outputs.
        latent: Number of latent dimensions.
        rank: The rank `r`.

    Raises:
        ValueError: If `rank` is not positive; from `forward`, if the network's output is of another size.

    Reference:
        Rezende, Mohamed and Wierstra, 2014. Stochastic backpropagation and approximate inference in deep generative
        models.

    Example:
        >>> from pyro_vae import networks
        >>> LowRankNormal(networks.MLP(784, 4 * 20), 20, rank=2)(torch.rand(5, 784)).event_shape
        torch.Size([20])
    """

    def __init__(self, net: nn.Module, latent: int, rank: int = 2):
        super().__init__(net, latent)
        if rank < 1:
            raise ValueError(f"LowRankNormal: expected rank > 0, got {rank}")
        self.rank = rank
        self.num_params = 2 + rank

    def distribution(self, outputs: Tensor) -> Any:
        """Low-rank normal with these means, log-variances and columns of `W`."""
        loc, log_variance, *columns = outputs.chunk(self.num_params, -1)
        diagonal = scale(log_variance)
        # With more of the low rank beside the diagonal, float32 has nothing of the latter.
        factor = diagonal.unsqueeze(-1) * (0.1 * torch.stack(columns, -1)).clamp(-30.0, 30.0)
        return dist.LowRankMultivariateNormal(loc, factor, diagonal.square())


class Mixture(Amortized):
    r"""A mixture of normal distributions with independent dimensions, its samples reparameterized.

    .. math:: q(z \mid x) = \sum_c \pi_c(x) \prod_d N(z_d; \mu_{cd}(x), \sigma_{cd}(x)^2)

    Args:
        net: A network from data to means and log-variances of all components and their logits:
            `components * (2 * latent + 1)` outputs.
        latent: Number of latent dimensions.
        components: Number of components.

    Raises:
        ValueError: If a size is not positive; from `forward`, if the network's output is of another size.

    Reference:
        Figurnov, Mohamed and Mnih, 2018. Implicit reparameterization gradients.

    Example:
        >>> from pyro_vae import networks
        >>> Mixture(networks.MLP(784, 3 * 41), 20, components=3)(torch.rand(5, 784)).event_shape
        torch.Size([20])
    """

    twice_differentiable = False

    def __init__(self, net: nn.Module, latent: int, components: int = 3):
        super().__init__(net, latent)
        if components < 1:
            raise ValueError(f"Mixture: expected components > 0, got {components}")
        self.components = components

    @property
    def num_outputs(self) -> int:
        """How many outputs the network must have."""
        return self.components * (2 * self.latent + 1)

    def distribution(self, outputs: Tensor) -> Any:
        """The mixture of these means, log-variances and logits."""
        shape = (self.components, self.latent)
        loc, log_variance, logits = self._split(outputs, shape, shape, (self.components,))
        return PathwiseMixture(loc, scale(log_variance), logits)
