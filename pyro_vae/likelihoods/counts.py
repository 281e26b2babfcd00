"""Likelihoods of counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.util import is_validation_enabled
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_vae.distributions import in_float64
from pyro_vae.likelihoods.factorized import Factorized
from pyro_vae.networks import positive, split_parameters

__all__ = ["Binomial", "NegativeBinomial", "Poisson", "ZeroInflatedNegativeBinomial", "ZeroInflatedPoisson"]


class Binomial(Factorized):
    r"""Successes among `total_count` trials.

    .. math:: p(x \mid z) = \prod_d \binom{n}{x_d} \pi_d^{x_d} (1 - \pi_d)^{n - x_d}

    Args:
        net: A network from `(*, latent)` to logits, `prod(event_shape)` values.
        event_shape: Shape of one datum.
        total_count: Number of trials `n`.

    Raises:
        ValueError: If `total_count` is not positive; from `forward`, if the network's output is of another size.

    Example:
        >>> from pyro_vae import networks
        >>> Binomial(networks.MLP(2, 3), (3,), total_count=16)(torch.zeros(5, 2)).event_shape
        torch.Size([3])
    """

    support = constraints.nonnegative_integer

    def __init__(self, net: nn.Module, event_shape: Sequence[int], total_count: int):
        super().__init__(net, event_shape)
        if total_count < 1:
            raise ValueError(f"Binomial: expected total_count > 0, got {total_count}")
        self.total_count = total_count

    def distribution(self, logits: Tensor) -> Any:
        """Binomial with these logits."""
        return in_float64(lambda logits: dist.Binomial(self.total_count, logits=logits), logits)

    def first_parameter(self, mean: Tensor) -> Tensor:
        """The logit of the mean's share of the trials."""
        return torch.logit((mean / self.total_count).clamp(1e-3, 1 - 1e-3))


class _Counts(Factorized):
    """Counts with a rate from the network's first outputs, perhaps times an exposure."""

    support = constraints.nonnegative_integer

    def __init__(self, net: nn.Module, event_shape: Sequence[int], exposure: bool = False):
        super().__init__(net, event_shape)
        self.exposure = exposure

    def forward(self, z: Tensor, exposure: Tensor | None = None) -> dist.Distribution:
        """The likelihood p(x given z), of counts over an exposure of shape `(B,)` (1 where it is left out)."""
        return self.from_outputs(self.net(z), z.shape[:-1], exposure)

    def from_outputs(
        self, outputs: Tensor, leading: Sequence[int], exposure: Tensor | None = None
    ) -> dist.Distribution:
        """The likelihood of the network's outputs, which have the leading shape `leading`."""
        log_rate, *others = split_parameters(outputs, leading, self.num_params, self.event_shape)
        rate = positive(log_rate, bound=20.0)
        if exposure is not None:
            if exposure.numel() != math.prod(exposure.shape[:1]):
                raise ValueError(f"exposure: expected one value a datum, got shape {tuple(exposure.shape)}")
            # As Pyro's own checks of values, it can be turned off, and is while a step is compiled.
            if is_validation_enabled() and not (exposure > 0).all():
                raise ValueError(f"exposure: expected values above 0, got {exposure.min().item():g}")
            rate = rate * exposure.reshape(*exposure.shape[:1], *[1] * len(self.event_shape))
        return self.distribution(rate, *others).to_event(len(self.event_shape))

    def first_parameter(self, mean: Tensor) -> Tensor:
        """Log of the mean."""
        return mean.clamp(min=1e-3).log()


class Poisson(_Counts):
    r"""Counts at a rate.

    .. math:: p(x \mid z) = \prod_d \text{Poisson}(x_d; e\, \lambda_d)

    Args:
        net: A network from `(*, latent)` to log rates, `prod(event_shape)` values.
        event_shape: Shape of one datum.
        exposure: Whether data come as `(x, e)` with an exposure (time at risk, size factor) `e` of shape `(B,)`.

    Raises:
        ValueError: From `forward`, if the network's output is of another size or an exposure is not positive.

    Example:
        >>> from pyro_vae import networks
        >>> likelihood = Poisson(networks.MLP(2, 3), (3,), exposure=True)
        >>> likelihood(torch.zeros(5, 2), torch.ones(5)).event_shape
        torch.Size([3])
    """

    def distribution(self, rate: Tensor) -> Any:
        """Poisson with this rate."""
        return in_float64(dist.Poisson, rate)


class NegativeBinomial(_Counts):
    r"""Counts that vary more than Poisson's: a mean, and a dispersion that is the smaller the more they vary.

    .. math:: p(x \mid z) = \prod_d \text{NB}(x_d; m_d e, r_d), \quad
              E[x_d] = m_d e, \quad \operatorname{Var}[x_d] = m_d e + (m_d e)^2 / r_d

    Args:
        net: A network from `(*, latent)` to log means and log dispersions, `2 * prod(event_shape)` values.
        event_shape: Shape of one datum.
        exposure: Whether data come as `(x, e)` with an exposure (time at risk, size factor) `e` of shape `(B,)`.

    Raises:
        ValueError: From `forward`, if the network's output is of another size or an exposure is not positive.

    Reference:
        Lopez et al., 2018. Deep generative modeling for single-cell transcriptomics.

    Example:
        >>> from pyro_vae import networks
        >>> NegativeBinomial(networks.MLP(2, 2 * 3), (3,))(torch.zeros(5, 2)).event_shape
        torch.Size([3])
    """

    num_params = 2

    def distribution(self, rate: Tensor, log_dispersion: Tensor) -> Any:
        """Negative binomial with this mean and log dispersion."""
        return in_float64(_negative_binomial, rate, positive(log_dispersion))


def _negative_binomial(mean: Tensor, dispersion: Tensor) -> Any:
    return dist.NegativeBinomial(dispersion, logits=mean.log() - dispersion.log())


class _ZeroInflated(_Counts):
    """Counts that are zero more often: the last output is the logit of the gate."""

    def first_parameter(self, mean: Tensor) -> Tensor:
        """Log of twice the mean, since the gate starts at a half."""
        return super().first_parameter(2 * mean)


class _Gated(dist.ZeroInflatedDistribution):
    """Pyro's, but the gate's probability is not kept: beside its logits `expand` refuses it, and densities lose by it.

    Pyro's own for Poisson and negative binomial have parameters that are checked, and fail, where float32 rounds to 1.
    """

    @property
    def gate(self) -> Tensor:
        return torch.sigmoid(self.gate_logits)


class ZeroInflatedPoisson(_ZeroInflated):
    r"""Counts at a rate, with more zeros than Poisson's.

    .. math:: p(x \mid z) = \prod_d g_d\, [x_d = 0] + (1 - g_d)\, \text{Poisson}(x_d; e\, \lambda_d)

    Args:
        net: A network from `(*, latent)` to log rates and logits of the gate, `2 * prod(event_shape)` values.
        event_shape: Shape of one datum.
        exposure: Whether data come as `(x, e)` with an exposure (time at risk, size factor) `e` of shape `(B,)`.

    Raises:
        ValueError: From `forward`, if the network's output is of another size or an exposure is not positive.

    Reference:
        Lambert, 1992. Zero-inflated Poisson regression, with an application to defects in manufacturing.

    Example:
        >>> from pyro_vae import networks
        >>> ZeroInflatedPoisson(networks.MLP(2, 2 * 3), (3,))(torch.zeros(5, 2)).event_shape
        torch.Size([3])
    """

    num_params = 2

    def distribution(self, rate: Tensor, gate_logits: Tensor) -> Any:
        """Zero-inflated Poisson with this rate."""
        return in_float64(lambda r, g: _Gated(dist.Poisson(r), gate_logits=g), rate, gate_logits.clamp(-15.0, 15.0))


class ZeroInflatedNegativeBinomial(_ZeroInflated):
    r"""Counts that vary more than Poisson's, with more zeros.

    .. math:: p(x \mid z) = \prod_d g_d\, [x_d = 0] + (1 - g_d)\, \text{NB}(x_d; m_d e, r_d)

    Args:
        net: A network from `(*, latent)` to log means, log dispersions and logits of the gate,
            `3 * prod(event_shape)` values.
        event_shape: Shape of one datum.
        exposure: Whether data come as `(x, e)` with an exposure (time at risk, size factor) `e` of shape `(B,)`.

    Raises:
        ValueError: From `forward`, if the network's output is of another size or an exposure is not positive.

    Reference:
        Lopez et al., 2018. Deep generative modeling for single-cell transcriptomics.

    Example:
        >>> from pyro_vae import networks
        >>> ZeroInflatedNegativeBinomial(networks.MLP(2, 3 * 3), (3,))(torch.zeros(5, 2)).event_shape
        torch.Size([3])
    """

    num_params = 3

    def distribution(self, rate: Tensor, log_dispersion: Tensor, gate_logits: Tensor) -> Any:
        """Zero-inflated negative binomial with this mean and log dispersion."""
        parameters = rate, positive(log_dispersion), gate_logits.clamp(-15.0, 15.0)
        return in_float64(lambda r, d, g: _Gated(_negative_binomial(r, d), gate_logits=g), *parameters)
