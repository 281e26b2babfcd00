"""Posteriors that are not normal: heavy-tailed, on the sphere, over classes and bits, through flows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from pyro_vae import distributions
from pyro_vae.distributions import (
    FlowDistribution,
    OneHotCategoricalGroups,
    OneHotGroups,
    RelaxedOneHotCategoricalGroups,
    boolean_vector,
    check_temperature,
    import_zuko,
    simplices,
)
from pyro_vae.networks import positive, scale
from pyro_vae.posteriors.amortized import Amortized

__all__ = ["Bernoulli", "Flow", "Laplace", "OneHotCategorical", "RelaxedOneHotCategorical", "VonMisesFisher"]


class Laplace(Amortized):
    r"""Independent Laplace distributions, from location and log-variance heads.

    .. math:: q(z \mid x) = \prod_d \frac{1}{2 b_d} e^{-|z_d - \mu_d| / b_d}

    Args:
        net: A network from data to `2 * latent` outputs, locations first.
        latent: Number of latent dimensions.

    Raises:
        ValueError: From `forward`, if the network's output is of another size.

    Example:
        >>> from pyro_vae import networks
        >>> Laplace(networks.MLP(784, 2 * 20), 20)(torch.rand(5, 784)).event_shape
        torch.Size([20])
    """

    num_params = 2

    def distribution(self, outputs: Tensor) -> Any:
        """Laplace with these locations, then log-variances."""
        loc, log_variance = outputs.chunk(2, -1)
        return dist.Laplace(loc, scale(log_variance)).to_event(1)


class Flow(Amortized):
    r"""A normalizing flow of zuko on top of a diagonal normal, conditioned on the data.

    .. math:: z = T(\mu + \sigma \epsilon;\, h), \quad (\mu, \log \sigma^2, h)(x) = f(x)

    The flow is run in the direction in which draws are fast: with `MAF` this is the inverse autoregressive flow, with
    `RealNVP` a coupling flow. Elsewhere than at its own draws, as under a `VampPrior`, the density of an inverse
    autoregressive flow takes as many passes as there are dimensions, that of a coupling flow one.

    Args:
        net: A network from data to means, log-variances and the context `h`: `2 * latent + context` outputs.
        latent: Number of latent dimensions, at least 2.
        flow: A class of `zuko.flows` such as `MAF` or `RealNVP`, or a `functools.partial` of it; called with the number
            of dimensions and `context`. None is `MAF(transforms=2)` with hidden layers of 128.
        context: Size of the context `h`.

    Raises:
        ValueError: If `latent` is less than 2 or `context` not positive; from `forward`, if the network's output is of
            another size.

    Reference:
        Kingma et al., 2016. Improved variational inference with inverse autoregressive flow.

    Example:
        >>> from pyro_vae import networks
        >>> Flow(networks.MLP(784, 2 * 20 + 32), 20)(torch.rand(5, 784)).event_shape
        torch.Size([20])
    """

    def __init__(self, net: nn.Module, latent: int, flow: Callable[..., nn.Module] | None = None, context: int = 32):
        super().__init__(net, latent)
        if latent < 2 or context < 1:
            raise ValueError(f"Flow: expected latent > 1 and context > 0, got {latent=}, {context=}")
        self.flow = flow
        self.context = context
        make = flow or import_zuko().flows.MAF
        options: Any = {} if flow else {"transforms": 2, "hidden_features": (128, 128)}
        self.transforms: Any = make(latent, context, **options).transform

    @property
    def num_outputs(self) -> int:
        """How many outputs the network must have."""
        return 2 * self.latent + self.context

    def distribution(self, outputs: Tensor) -> Any:
        """The flow from these means, log-variances and context."""
        loc, log_variance, context = outputs.split([self.latent, self.latent, self.context], -1)
        base = torch.distributions.Normal(loc, scale(log_variance))
        flow = import_zuko().distributions.NormalizingFlow(self.transforms(context).inv, base)
        return FlowDistribution(flow)


class Bernoulli(Amortized):
    r"""Independent bits, from logits.

    .. math:: q(z \mid x) = \prod_d \pi_d(x)^{z_d} (1 - \pi_d(x))^{1 - z_d}

    Its samples have no gradient: `Trace_ELBO` takes the score function's, which is noisy.

    Args:
        net: A network from data to `latent` logits.
        latent: Number of bits.

    Raises:
        ValueError: From `forward`, if the network's output is of another size.

    Example:
        >>> from pyro_vae import networks
        >>> Bernoulli(networks.MLP(784, 20), 20)(torch.rand(5, 784)).event_shape
        torch.Size([20])
    """

    support = boolean_vector

    def distribution(self, outputs: Tensor) -> Any:
        """Bernoulli with these logits."""
        return dist.Bernoulli(logits=outputs).to_event(1)


class _Groups(Amortized):
    """Groups of classes, from logits."""

    def __init__(self, net: nn.Module, latent: int, classes: int | None = None):
        super().__init__(net, latent)
        self.classes = classes or latent
        if self.classes < 2 or latent % self.classes:
            raise ValueError(
                f"{type(self).__name__}: expected latent to be groups of at least 2 classes, "
                f"got latent={latent}, classes={classes}"
            )

    def _logits(self, outputs: Tensor) -> Tensor:
        return outputs.unflatten(-1, (-1, self.classes))


class OneHotCategorical(_Groups):
    r"""Groups of classes, each a one-hot vector, side by side.

    .. math:: q(z \mid x) = \prod_g \prod_c \pi_{gc}(x)^{z_{gc}}

    Its samples have no gradient: `Trace_ELBO` takes the score function's, which is noisy.

    Args:
        net: A network from data to `latent` logits, group by group.
        latent: Length of the vector: groups times classes.
        classes: Classes in a group (default: one group).

    Raises:
        ValueError: If `latent` is no multiple of `classes`; from `forward`, if the network's output is of another size.

    Example:
        >>> from pyro_vae import networks
        >>> OneHotCategorical(networks.MLP(784, 20), 20, classes=10)(torch.rand(5, 784)).event_shape
        torch.Size([20])
    """

    support = OneHotGroups()

    def distribution(self, outputs: Tensor) -> Any:
        """One-hot classes with these logits."""
        return OneHotCategoricalGroups(self._logits(outputs))


class RelaxedOneHotCategorical(_Groups):
    r"""Groups of classes relaxed to the simplex (Gumbel-softmax), at a temperature that may fall during training.

    .. math:: z_g = \operatorname{softmax}((l_g(x) + \gamma_g) / T), \quad \gamma_{gc} \sim \text{Gumbel}(0, 1)

    Args:
        net: A network from data to `latent` logits, group by group.
        latent: Length of the vector: groups times classes.
        classes: Classes in a group (default: one group).
        temperature: The temperature `T`, at least 1/3 (below, float32 has too few digits), or a schedule such as
            `schedules.Linear(1.0, start=1.0, end=0.5)`, which `fit` follows.

    Raises:
        ValueError: If `latent` is no multiple of `classes`, or a temperature is below 1/3; from `forward`, if the
            network's output is of another size.

    Reference:
        Jang, Gu and Poole, 2017. Categorical reparameterization with Gumbel-softmax. Maddison, Mnih and Teh, 2017. The
        Concrete distribution.

    Example:
        >>> from pyro_vae import networks
        >>> RelaxedOneHotCategorical(networks.MLP(784, 20), 20, classes=10)(torch.rand(5, 784)).event_shape
        torch.Size([20])
    """

    support = simplices
    current_temperature: Tensor

    def __init__(
        self,
        net: nn.Module,
        latent: int,
        classes: int | None = None,
        temperature: float | Callable[[float], float] = 0.5,
    ):
        super().__init__(net, latent, classes)
        self.temperature = temperature
        self.register_buffer("current_temperature", torch.ones(()))
        self.set_progress(0.0)

    def set_progress(self, progress: float) -> None:
        """Set the temperature of a point in training, from 0 to 1; `fit` calls this before each step."""
        temperature = self.temperature(progress) if callable(self.temperature) else self.temperature
        check_temperature(temperature)
        self.current_temperature.fill_(temperature)

    def distribution(self, outputs: Tensor) -> Any:
        """Relaxed one-hot classes with these logits."""
        # Further apart, a class's share underflows float32.
        logits = self._logits(outputs).clamp(-7.0, 7.0)
        return RelaxedOneHotCategoricalGroups(logits, self.current_temperature)


class VonMisesFisher(Amortized):
    r"""The von Mises-Fisher distribution on the unit sphere, its draws reparameterized.

    .. math:: q(z \mid x) \propto e^{\kappa(x)\, \mu(x)^T z}, \quad \lVert z \rVert = 1

    Args:
        net: A network from data to a vector, whose direction is the mean's, and the log concentration: `latent + 1`
            outputs.
        latent: Dimensions of the space around the sphere, at least 2.

    Raises:
        ValueError: If `latent` is less than 2; from `forward`, if the network's output is of another size.

    Reference:
        Davidson et al., 2018. Hyperspherical variational auto-encoders.

    Example:
        >>> from pyro_vae import networks
        >>> VonMisesFisher(networks.MLP(784, 3 + 1), 3)(torch.rand(5, 784)).event_shape
        torch.Size([3])
    """

    support = distributions.VonMisesFisher.support
    twice_differentiable = False

    def __init__(self, net: nn.Module, latent: int):
        super().__init__(net, latent)
        if latent < 2:
            raise ValueError(f"VonMisesFisher: expected latent > 1, got {latent}")

    @property
    def num_outputs(self) -> int:
        """How many outputs the network must have."""
        return self.latent + 1

    def distribution(self, outputs: Tensor) -> Any:
        """Von Mises-Fisher with this mean direction and log concentration."""
        direction, log_concentration = outputs.split([self.latent, 1], -1)
        # A zero vector has no direction: it gets that of (1, 0, ..., 0), towards which all are moved by a hair.
        direction = direction + 1e-6 * torch.eye(1, self.latent, dtype=direction.dtype, device=direction.device)[0]
        return distributions.VonMisesFisher(normalize(direction, dim=-1), positive(log_concentration).squeeze(-1))
