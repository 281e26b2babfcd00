"""Estimators for any guide: gradients by the score of the density that particles are drawn from."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.estimators.gradients import WeightedEstimator, Weights
from pyro_vae.estimators.importance import log_mean_exp
from pyro_vae.estimators.particles import local_sites, log_prob, simulating

__all__ = ["VIMCO", "Reinforce", "ReweightedWakeSleep", "Thermodynamic"]


class VIMCO(WeightedEstimator):
    r"""The importance-weighted bound for discrete latents: each particle is praised for what it adds to the others.

    .. math:: \nabla_\phi = \sum_k \big(\hat L - \hat L_{-k}\big) \nabla_\phi \log q(z_k \mid x)
              - \tilde w_k \nabla_\phi \log q(z_k \mid x), \qquad
              \hat L_{-k} = \log \tfrac1K \Big(\sum_{j \ne k} w_j + \prod_{j \ne k} w_j^{1 / (K - 1)}\Big)

    where :math:`\hat L` is `IWAE`'s bound and :math:`\tilde w` are the normalized weights. The gradient is unbiased.

    Args:
        num_particles: Number `K` of particles a datum, at least 2.
        chunk: Particles at once, where memory is short.

    Raises:
        ValueError: If there is only one particle.

    Reference:
        Mnih and Rezende, 2016. Variational inference for Monte Carlo objectives.

    Example:
        >>> import pyro_vae
        >>> vae = pyro_vae.build((8, 8), latent=4, prior="Bernoulli()", posterior="Bernoulli()")
        >>> VIMCO(num_particles=4)(vae.model, vae.guide)(torch.ones(3, 8, 8)).backward()
    """

    reparameterized = False

    def __init__(self, num_particles: int = 8, *, chunk: int | None = None):
        super().__init__(num_particles, chunk=chunk)
        _check_baseline(self)

    def weigh(self, log_weights: Tensor) -> tuple[Tensor, Weights]:
        """The bound, normalized weights, and what each particle adds."""
        bound, weights = log_mean_exp(log_weights), log_weights.softmax(0)
        replaced = torch.logaddexp(_sum_of_others(log_weights), _mean_of_others(log_weights))
        baseline = replaced - math.log(self.num_particles)
        return bound, Weights(model=weights, score=weights, reinforce=bound - baseline)


class Reinforce(WeightedEstimator):
    r"""The ELBO for discrete latents, where the other particles are each particle's baseline.

    .. math:: \nabla_\phi = \tfrac1K \sum_k \Big(\log w_k - \tfrac{1}{K - 1} \sum_{j \ne k} \log w_j\Big)
              \nabla_\phi \log q(z_k \mid x)

    The gradient is unbiased.

    Args:
        num_particles: Number `K` of particles a datum, at least 2.
        chunk: Particles at once, where memory is short.

    Raises:
        ValueError: If there is only one particle.

    Reference:
        Williams, 1992. Simple statistical gradient-following algorithms for connectionist reinforcement learning. Kool,
        van Hoof and Welling, 2019. Buy 4 REINFORCE samples, get a baseline for free!

    Example:
        >>> import pyro_vae
        >>> vae = pyro_vae.build((8, 8), latent=4, prior="Bernoulli()", posterior="Bernoulli()")
        >>> Reinforce()(vae.model, vae.guide)(torch.ones(3, 8, 8)).backward()
    """

    reparameterized = False
    importance_weighted = False

    def __init__(self, num_particles: int = 2, *, chunk: int | None = None):
        super().__init__(num_particles, chunk=chunk)
        _check_baseline(self)

    def weigh(self, log_weights: Tensor) -> tuple[Tensor, Weights]:
        """The mean log-weight, equal weights, and each particle's advantage."""
        advantage = log_weights - _mean_of_others(log_weights)
        equal = torch.full_like(log_weights, 1 / self.num_particles)
        return log_weights.mean(0), Weights(model=equal, reinforce=equal * advantage)


class ReweightedWakeSleep(WeightedEstimator):
    r"""The model learns from the importance-weighted bound, the guide from KL divergences the other way round.

    .. math:: \nabla_\theta \log \tfrac1K \sum_k w_k, \qquad
              \nabla_\phi \Big(\lambda \sum_k \tilde w_k \log q(z_k \mid x)
              + (1 - \lambda)\, E_{p(x', z')}[\log q(z' \mid x')]\Big)

    Wake: the guide takes after the weighted particles of the data. Sleep: after latents of data that the model dreams,
    one a datum. It needs no baseline, and serves discrete latents. The value is the model's bound.

    Args:
        num_particles: Number `K` of particles a datum.
        insomnia: The share :math:`\lambda` of wake in [0, 1], as in Pyro's estimator of the same name. Below 1, the
            first tensor of a batch must be what the model observes at its site "x".
        chunk: Particles at once, where memory is short.

    Raises:
        ValueError: If `insomnia` is outside [0, 1].

    Reference:
        Bornschein and Bengio, 2015. Reweighted wake-sleep. Le et al., 2019. Revisiting reweighted wake-sleep for models
        with stochastic control flow.

    Example:
        >>> import pyro_vae
        >>> vae = pyro_vae.build((8, 8), latent=4, prior="Bernoulli()", posterior="Bernoulli()")
        >>> ReweightedWakeSleep(insomnia=0.5)(vae.model, vae.guide)(torch.ones(3, 8, 8)).backward()
    """

    reparameterized = False

    def __init__(self, num_particles: int = 8, insomnia: float = 1.0, *, chunk: int | None = None):
        if not 0 <= insomnia <= 1:
            raise ValueError(f"ReweightedWakeSleep: expected insomnia in [0, 1], got {insomnia}")
        super().__init__(num_particles, chunk=chunk)
        self.insomnia = insomnia

    def weigh(self, log_weights: Tensor) -> tuple[Tensor, Weights]:
        """The bound, and normalized weights for model and guide."""
        weights = log_weights.softmax(0)
        return log_mean_exp(log_weights), Weights(model=weights, reinforce=self.insomnia * weights)

    def differentiable_loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Tensor:
        """Minus the bound on the log evidence of all data, with the gradients of wake and sleep."""
        loss = super().differentiable_loss(model, guide, *args, **kwargs)
        if self.insomnia == 1 or not torch.is_grad_enabled():
            return loss
        sleep = (1 - self.insomnia) * _dreamt(model, guide, args, kwargs)
        return loss - (sleep - sleep.detach())


class Thermodynamic(WeightedEstimator):
    r"""The thermodynamic variational objective: an integral from the guide to the model, by a sum from the left.

    .. math:: \sum_{t=0}^{T-1} (\beta_{t+1} - \beta_t)\, E_{\pi_t}[\log w], \qquad
              \pi_t(z) \propto q(z \mid x)\, w(z)^{\beta_t}

    with :math:`\beta_0 = 0`, :math:`\beta_T = 1` and points between them that are evenly spaced on a logarithmic scale.
    The expectations, and the covariances in their gradients, are taken with normalized weights :math:`w^{\beta_t}`;
    both are therefore biased for finite K, and the sum is a bound in the limit.

    Args:
        num_particles: Number `K` of particles a datum.
        partitions: Number `T` of steps; 1 is the ELBO.
        first: The first point after zero, :math:`\beta_1` in (0, 1).
        chunk: Particles at once, where memory is short.

    Raises:
        ValueError: If `partitions` or `first` is out of range.

    Reference:
        Masrani, Le and Wood, 2019. The thermodynamic variational objective.

    Example:
        >>> import pyro_vae
        >>> vae = pyro_vae.build((8, 8), latent=2)
        >>> Thermodynamic(num_particles=4, partitions=2)(vae.model, vae.guide)(torch.ones(3, 8, 8)).backward()
    """

    reparameterized = False

    def __init__(self, num_particles: int = 8, partitions: int = 5, first: float = 0.025, *, chunk: int | None = None):
        if partitions < 1 or not 0 < first < 1:
            raise ValueError(
                f"Thermodynamic: expected partitions >= 1 and first in (0, 1), got {partitions} and {first}"
            )
        super().__init__(num_particles, chunk=chunk)
        self.partitions, self.first = partitions, first

    @property
    def importance_weighted(self) -> bool:
        """Whether it is other than the ELBO."""
        return self.num_particles > 1 and self.partitions > 1

    def weigh(self, log_weights: Tensor) -> tuple[Tensor, Weights]:
        """The sum, and weights of the gradients of its means and covariances."""
        between = (self.first ** (i / max(self.partitions - 1, 1)) for i in reversed(range(self.partitions)))
        bound, model, reinforce = (torch.zeros_like(log_weights) for _ in range(3))
        for left, right in itertools.pairwise([0.0, *between]):
            weights = (left * log_weights).softmax(0)
            mean = (weights * log_weights).sum(0)
            covariance = weights * (log_weights - mean)  # with the gradient of log pi, which is d log q + left d log w
            bound = bound + (right - left) * mean
            model = model + (right - left) * (weights + left * covariance)
            reinforce = reinforce + (right - left) * covariance
        return bound[0], Weights(model=model, score=model, reinforce=reinforce)


def _dreamt(model: Callable, guide: Callable, args: tuple, kwargs: Any) -> Tensor:
    """Log q of latents given data that the model dreams, summed over all data that the plate stands for."""
    with torch.no_grad():
        dream: Any = poutine.trace(simulating()(model)).get_trace(*args, **kwargs)
    if "x" not in dream.nodes:
        raise ValueError(f'insomnia < 1: expected a model that observes a site "x", got {list(dream.nodes)[1:-1]}')
    x = dream.nodes.pop("x")
    args = x["value"].reshape(args[0].shape), *args[1:]
    asleep: Any = poutine.trace(poutine.replay(guide, trace=dream)).get_trace(*args, **kwargs)
    return (x["scale"] * torch.as_tensor(sum(map(log_prob, local_sites(asleep, observed=False))))).sum()


def _mean_of_others(log_weights: Tensor) -> Tensor:
    before, after = _before_and_after(log_weights, torch.cumsum, 0.0)
    return (before + after) / (len(log_weights) - 1)


def _sum_of_others(log_weights: Tensor) -> Tensor:
    """The logarithm of the sum of the other weights."""
    return torch.logaddexp(*_before_and_after(log_weights, torch.logcumsumexp, -torch.inf))


def _before_and_after(values: Tensor, cumulate: Callable, nothing: float) -> tuple[Tensor, Tensor]:
    """Sums of the particles before each and after each: all less its own would cancel, or be infinity less infinity."""
    none = torch.full_like(values[:1], nothing)
    before = torch.cat([none, cumulate(values, 0)[:-1]])
    return before, torch.cat([cumulate(values.flip(0), 0).flip(0)[1:], none])


def _check_baseline(estimator: WeightedEstimator) -> None:
    if estimator.num_particles < 2:
        raise ValueError(
            f"{type(estimator).__name__}: expected num_particles >= 2, as the others are each particle's baseline, "
            f"got {estimator.num_particles}"
        )
