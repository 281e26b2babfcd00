"""Estimators that need no reparameterized guide: gradients by the score of the density that particles are drawn from."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from pyro_vae.estimators.gradients import WeightedEstimator, Weights
from pyro_vae.estimators.importance import log_mean_exp

__all__ = ["VIMCO", "Reinforce", "ReweightedWakeSleep", "Thermodynamic"]


class VIMCO(WeightedEstimator):
    reparameterized = False

    def __init__(self, num_particles: int = 8, *, chunk: int | None = None):
        super().__init__(num_particles, chunk=chunk)
        _check_at_least_two(self)

    def weigh(self, log_weights: Tensor) -> tuple[Tensor, Weights]:
        bound, weights = log_mean_exp(log_weights), log_weights.softmax(0)
        # In place of each weight the geometric mean of the others.
        replaced = torch.logaddexp(_sum_of_others(log_weights), _mean_of_others(log_weights))
        baseline = replaced - math.log(self.num_particles)
        return bound, Weights(model=weights, score=weights, reinforce=bound - baseline)


class Reinforce(WeightedEstimator):
    reparameterized = False
    importance_weighted = False

    def __init__(self, num_particles: int = 2, *, chunk: int | None = None):
        super().__init__(num_particles, chunk=chunk)
        _check_at_least_two(self)

    def weigh(self, log_weights: Tensor) -> tuple[Tensor, Weights]:
        advantage = log_weights - _mean_of_others(log_weights)
        mean = torch.full_like(log_weights, 1 / self.num_particles)
        return log_weights.mean(0), Weights(model=mean, reinforce=advantage * mean)


class ReweightedWakeSleep(WeightedEstimator):
    reparameterized = False

    def __init__(self, num_particles: int = 8, *, chunk: int | None = None):
        super().__init__(num_particles, chunk=chunk)

    def weigh(self, log_weights: Tensor) -> tuple[Tensor, Weights]:
        weights = log_weights.softmax(0)
        return log_mean_exp(log_weights), Weights(model=weights, reinforce=weights)


class Thermodynamic(WeightedEstimator):
    reparameterized = False

    def __init__(self, num_particles: int = 8, partitions: int = 5, first: float = 0.025, *, chunk: int | None = None):
        super().__init__(num_particles, chunk=chunk)
        self.partitions, self.first = partitions, first

    def weigh(self, log_weights: Tensor) -> tuple[Tensor, Weights]:
        points = [0.0, *(self.first ** (1 - i / (self.partitions - 1)) for i in range(self.partitions))]
        bound, model, reinforce = 0, 0, 0
        for left, right in itertools.pairwise(points):
            weights = (left * log_weights).softmax(0)
            mean = (weights * log_weights).sum(0)
            covariance = weights * (log_weights - mean)
            bound = bound + (right - left) * mean
            model = model + (right - left) * (weights + left * covariance)
            reinforce = reinforce + (right - left) * covariance
        return bound, Weights(model=model, score=model, reinforce=reinforce)


def _mean_of_others(log_weights: Tensor) -> Tensor:
    return (log_weights.sum(0) - log_weights) / (len(log_weights) - 1)


def _sum_of_others(log_weights: Tensor) -> Tensor:
    """The logarithm of the sum of the other weights, from sums of those before and those after."""
    nothing = torch.full_like(log_weights[:1], -torch.inf)
    before = torch.cat([nothing, log_weights.logcumsumexp(0)[:-1]])
    after = torch.cat([log_weights.flip(0).logcumsumexp(0).flip(0)[1:], nothing])
    return torch.logaddexp(before, after)


def _check_at_least_two(estimator: WeightedEstimator) -> None:
    if estimator.num_particles < 2:
        raise ValueError(
            f"{type(estimator).__name__}: expected num_particles >= 2, since each particle is the others' baseline; "
            f"got {estimator.num_particles}"
        )
