"""Likelihoods of continuous data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_vae.distributions import BatchNormal, OpenBeta, open_unit_interval
from pyro_vae.likelihoods.factorized import Factorized
from pyro_vae.networks import positive, scale

__all__ = ["Beta", "ContinuousBernoulli", "Gamma", "Gaussian", "Laplace", "LogNormal", "StudentT"]


def _location(output: Tensor) -> Tensor:
    """A location, bounded: beyond, the square of a distance in units of the scale is infinite in float32."""
    return output.clamp(-1e12, 1e12)


class Gaussian(Factorized):
    r"""Real data with normal noise, whose scale is learned value by value, or one for all.

    .. math:: p(x \mid z) = \prod_d N(x_d; \mu_d(z), \sigma_d^2)

    Args:
        net: A network from `(*, latent)` to the means and, for a learned scale, log-variances: `num_outputs` values.
        event_shape: Shape of one datum.
        scale: "learned": :math:`\sigma_d(z)` is a second head of the network. "global": one parameter for all
            values. A number: that number. "optimal" (the sigma-VAE): in training, the root mean square error of the
            batch, the scale of highest likelihood; in evaluation, its running average.

    Raises:
        ValueError: For another scale; from `forward`, if the network's output is of another size.

    Reference:
        Rybkin, Daniilidis and Levine, 2021. Simple and effective VAE training with calibrated decoders.

    Example:
        >>> from pyro_vae import networks
        >>> likelihood = Gaussian(networks.MLP(2, 64), (1, 8, 8), scale="optimal")
        >>> likelihood(torch.zeros(5, 2)).event_shape
        torch.Size([1, 8, 8])
    """

    support = constraints.real
    mean_square_error: Tensor
    num_batches: Tensor

    def __init__(self, net: nn.Module, event_shape: Sequence[int], scale: str | float = "learned"):
        super().__init__(net, event_shape)
        fixed = isinstance(scale, int | float) and not isinstance(scale, bool) and scale > 0
        if not fixed and scale not in ("learned", "global", "optimal"):
            raise ValueError(f'Gaussian: expected scale "learned", "global", "optimal" or a number > 0, got {scale!r}')
        self.scale = scale
        self.num_params = 2 if scale == "learned" else 1
        if scale == "global":
            self.log_variance = nn.Parameter(torch.zeros(()))
        if scale == "optimal":
            self.register_buffer("mean_square_error", torch.ones(()))
            self.register_buffer("num_batches", torch.tensor(0))

    def distribution(self, loc: Tensor, log_variance: Tensor | None = None) -> Any:
        """Normal with this mean and this log-variance, or the one that all values share."""
        loc = _location(loc)
        if log_variance is not None:
            return dist.Normal(loc, scale(log_variance))
        if self.scale == "global":
            return dist.Normal(loc, scale(self.log_variance).expand_as(loc))
        if self.scale != "optimal":
            return dist.Normal(loc, torch.full_like(loc, self.scale))  # type: ignore[arg-type]
        shared = self.mean_square_error.sqrt().to(loc).expand_as(loc)
        return BatchNormal(loc, shared, self._average) if self.training else dist.Normal(loc, shared)

    def _average(self, variance: Tensor) -> None:
        """Keep a running average, as batch normalization does; the first batches count alike."""
        self.num_batches += 1
        share = (1 / self.num_batches).clamp(min=0.01)
        self.mean_square_error.lerp_(variance.to(self.mean_square_error), share.to(self.mean_square_error))

    def first_parameter(self, mean: Tensor) -> Tensor:
        """The mean."""
        return mean


class Laplace(Factorized):
    r"""Real data with heavier tails than the normal's, and the median as location.

    .. math:: p(x \mid z) = \prod_d \frac{1}{2 b_d} e^{-|x_d - \mu_d| / b_d}

    Args:
        net: A network from `(*, latent)` to locations and log-variances, `2 * prod(event_shape)` values.
        event_shape: Shape of one datum.

    Example:
        >>> from pyro_vae import networks
        >>> Laplace(networks.MLP(2, 2 * 3), (3,))(torch.zeros(5, 2)).event_shape
        torch.Size([3])
    """

    num_params = 2
    support = constraints.real

    def distribution(self, loc: Tensor, log_variance: Tensor) -> Any:
        """Laplace with this location, and scale from the log-variance head."""
        return dist.Laplace(loc, scale(log_variance))

    def first_parameter(self, mean: Tensor) -> Tensor:
        """The location."""
        return mean


class StudentT(Factorized):
    r"""Real data with outliers: the tails' weight is learned, the variance stays finite.

    .. math:: p(x \mid z) = \prod_d t_{\nu_d}\!\left(\frac{x_d - \mu_d}{\sigma_d}\right) / \sigma_d, \quad \nu_d > 2

    Args:
        net: A network from `(*, latent)` to locations, log-variances and log degrees of freedom beyond 2:
            `3 * prod(event_shape)` values.
        event_shape: Shape of one datum.

    Reference:
        Takahashi et al., 2018. Student-t variational autoencoder for robust density estimation.

    Example:
        >>> from pyro_vae import networks
        >>> StudentT(networks.MLP(2, 3 * 3), (3,))(torch.zeros(5, 2)).event_shape
        torch.Size([3])
    """

    num_params = 3
    support = constraints.real

    def distribution(self, loc: Tensor, log_variance: Tensor, log_df: Tensor) -> Any:
        """Student's t with this location and scale, and `2 + positive(log_df)` degrees of freedom."""
        return dist.StudentT(2 + positive(log_df), _location(loc), scale(log_variance))

    def first_parameter(self, mean: Tensor) -> Tensor:
        """The location."""
        return mean


class LogNormal(Factorized):
    r"""Positive data whose logarithm is normal.

    .. math:: p(x \mid z) = \prod_d \frac{1}{x_d} N(\log x_d; \mu_d, \sigma_d^2)

    Args:
        net: A network from `(*, latent)` to means and log-variances of log x, `2 * prod(event_shape)` values.
        event_shape: Shape of one datum.

    Example:
        >>> from pyro_vae import networks
        >>> LogNormal(networks.MLP(2, 2 * 3), (3,))(torch.zeros(5, 2)).event_shape
        torch.Size([3])
    """

    num_params = 2
    support = constraints.positive

    def distribution(self, loc: Tensor, log_variance: Tensor) -> Any:
        """Log-normal with this mean of log x, and scale from the log-variance head."""
        # Bounded so that float32 holds what is drawn.
        return dist.LogNormal(loc.clamp(-20.0, 20.0), scale(log_variance.clamp(max=4.0)))

    def first_parameter(self, mean: Tensor) -> Tensor:
        """Log of the mean, less half the variance of log x."""
        return mean.clamp(min=1e-6).log() - 0.5


class Gamma(Factorized):
    r"""Positive data with a mean, and a concentration that says how they spread about it.

    .. math:: p(x \mid z) = \prod_d \text{Gamma}(x_d; k_d, k_d / m_d), \quad E[x_d] = m_d

    Args:
        net: A network from `(*, latent)` to log means and log concentrations, `2 * prod(event_shape)` values.
        event_shape: Shape of one datum.

    Example:
        >>> from pyro_vae import networks
        >>> Gamma(networks.MLP(2, 2 * 3), (3,))(torch.zeros(5, 2)).event_shape
        torch.Size([3])
    """

    num_params = 2
    support = constraints.positive

    def distribution(self, log_mean: Tensor, log_concentration: Tensor) -> Any:
        """Gamma with this log mean and log concentration."""
        concentration = positive(log_concentration)
        return dist.Gamma(concentration, concentration / positive(log_mean, bound=20.0))

    def first_parameter(self, mean: Tensor) -> Tensor:
        """Log of the mean."""
        return mean.clamp(min=1e-6).log()


class Beta(Factorized):
    r"""Data strictly between 0 and 1, with a mean, and a concentration that says how they spread about it.

    .. math:: p(x \mid z) = \prod_d \text{Beta}(x_d; m_d \nu_d, (1 - m_d) \nu_d), \quad E[x_d] = m_d

    Grey images touch 0 and 1, where the density is zero or infinite: dequantize them (`data.load(...,
    dequantize=256)`).

    Args:
        net: A network from `(*, latent)` to logits of means and log concentrations, `2 * prod(event_shape)` values.
        event_shape: Shape of one datum.

    Example:
        >>> from pyro_vae import networks
        >>> Beta(networks.MLP(2, 2 * 3), (3,))(torch.zeros(5, 2)).event_shape
        torch.Size([3])
    """

    num_params = 2
    support = open_unit_interval

    def distribution(self, logit_mean: Tensor, log_concentration: Tensor) -> Any:
        """Beta with this logit of the mean and log concentration."""
        logit_mean, concentration = logit_mean.clamp(-10.0, 10.0), positive(log_concentration)
        return OpenBeta(torch.sigmoid(logit_mean) * concentration, torch.sigmoid(-logit_mean) * concentration)

    def first_parameter(self, mean: Tensor) -> Tensor:
        """The logit of the mean."""
        return torch.logit(mean.clamp(1e-3, 1 - 1e-3))


class ContinuousBernoulli(Factorized):
    r"""Data in [0, 1], grey images among them: the Bernoulli's formula with the constant that makes it a density.

    .. math:: p(x \mid z) = \prod_d C(\lambda_d) \lambda_d^{x_d} (1 - \lambda_d)^{1 - x_d}, \quad
              C(\lambda) = \frac{2 \tanh^{-1}(1 - 2 \lambda)}{1 - 2 \lambda}

    Logits are bounded by 15: beyond, float32 knows no constant.

    Args:
        net: A network from `(*, latent)` to logits, `prod(event_shape)` values.
        event_shape: Shape of one datum.

    Reference:
        Loaiza-Ganem and Cunningham, 2019. The continuous Bernoulli: fixing a pervasive error in variational
        autoencoders.

    Example:
        >>> from pyro_vae import networks
        >>> ContinuousBernoulli(networks.MLP(2, 64), (1, 8, 8))(torch.zeros(5, 2)).event_shape
        torch.Size([1, 8, 8])
    """

    support = constraints.unit_interval

    def distribution(self, logits: Tensor) -> Any:
        """Continuous Bernoulli with these logits."""
        return dist.ContinuousBernoulli(logits=logits.clamp(-15.0, 15.0))

    def first_parameter(self, mean: Tensor) -> Tensor:
        """The logit whose distribution has this mean, by bisection of the mean's formula."""
        mean = mean.double().clamp(0.07, 0.93)  # the means of logits in [-15, 15], less a margin
        low, high = torch.full_like(mean, -15.0), torch.full_like(mean, 15.0)
        for _ in range(40):
            middle = 0.5 * (low + high)
            below = dist.ContinuousBernoulli(logits=middle).mean < mean
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return 0.5 * (low + high)
