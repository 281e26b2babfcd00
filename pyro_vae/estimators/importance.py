"""Bounds that are functions of log-weights, and better gradients of them, for reparameterized guides."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor

from pyro_vae.estimators.gradients import WeightedEstimator, Weights

__all__ = ["CIWAE", "IWAE", "MIWAE", "PIWAE", "Bound", "DReG", "Renyi", "StickingTheLanding"]


class Bound(WeightedEstimator):
    """A bound on the log evidence that is differentiated as it stands; what a subclass defines is `bound`."""

    @abstractmethod
    def bound(self, log_weights: Tensor) -> Tensor:
        """The bound of each datum, of shape `(B,)`, from log-weights of shape `(K, B)`."""

    def weigh(self, log_weights: Tensor) -> tuple[Tensor, Weights]:
        """The bound, and its derivatives with respect to the log-weights."""
        with torch.enable_grad():
            log_weights = log_weights.detach().requires_grad_()
            bound = self.bound(log_weights)
            (weights,) = torch.autograd.grad(bound.sum(), log_weights)
        return bound.detach(), Weights(model=weights, path=weights, score=weights)


class IWAE(Bound):
    def bound(self, log_weights: Tensor) -> Tensor:
        return log_mean_exp(log_weights)


class Renyi(Bound):
    def __init__(self, alpha: float, num_particles: int = 2, *, chunk: int | None = None):
        super().__init__(num_particles, chunk=chunk)
        self.alpha = alpha

    def bound(self, log_weights: Tensor) -> Tensor:
        if self.alpha == 1:
            return log_weights.mean(0)
        return log_mean_exp((1 - self.alpha) * log_weights) / (1 - self.alpha)


class CIWAE(Bound):
    def __init__(self, beta: float, num_particles: int = 2, *, chunk: int | None = None):
        super().__init__(num_particles, chunk=chunk)
        self.beta = beta

    def bound(self, log_weights: Tensor) -> Tensor:
        return self.beta * log_weights.mean(0) + (1 - self.beta) * log_mean_exp(log_weights)


class MIWAE(Bound):
    def __init__(self, m: int, k: int, *, chunk: int | None = None):
        super().__init__(m * k, chunk=chunk)
        self.m, self.k = m, k

    def bound(self, log_weights: Tensor) -> Tensor:
        return log_mean_exp(log_weights.unflatten(0, (self.m, self.k)), 1).mean(0)


class PIWAE(MIWAE):
    def weigh(self, log_weights: Tensor) -> tuple[Tensor, Weights]:
        _, guide = super().weigh(log_weights)
        return log_mean_exp(log_weights), guide._replace(model=log_weights.softmax(0))


class StickingTheLanding(WeightedEstimator):
    def __init__(self, num_particles: int = 1, bound: Bound | None = None, *, chunk: int | None = None):
        if bound is not None:
            if num_particles not in (1, bound.num_particles):
                raise ValueError(
                    f"StickingTheLanding: expected num_particles={bound.num_particles}, which its bound has, "
                    f"got {num_particles}"
                )
            num_particles, chunk = bound.num_particles, chunk or bound.chunk
        super().__init__(num_particles, chunk=chunk)
        self.bound = bound

    def weigh(self, log_weights: Tensor) -> tuple[Tensor, Weights]:
        bound, weights = (self.bound or Renyi(1.0)).weigh(log_weights)
        return bound, weights._replace(score=None)

    @property
    def importance_weighted(self) -> bool:
        return self.bound is not None and self.bound.importance_weighted


class DReG(IWAE):
    def weigh(self, log_weights: Tensor) -> tuple[Tensor, Weights]:
        weights = log_weights.softmax(0)
        return self.bound(log_weights), Weights(model=weights, path=weights**2)


def log_mean_exp(log_weights: Tensor, dim: int = 0) -> Tensor:
    """The logarithm of the mean of weights."""
    return log_weights.logsumexp(dim) - math.log(log_weights.shape[dim])
