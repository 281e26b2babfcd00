"""How a bound and its gradient are made of particles: each estimator is a value and four weights of particles."""

from __future__ import annotations

import itertools
import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.infer import ELBO
from torch import Tensor

from pyro_vae.estimators.particles import Particles, random_state, shared_draws

__all__ = ["Estimator", "WeightedEstimator", "Weights"]

TINY = 1e-25  # of weights that sum to one


class Weights(NamedTuple):
    r"""What each particle contributes to the gradient of a bound; tensors of shape `(K, B)`, or None for zeros.

    .. math:: \sum_k a_k \nabla_\theta \log p(x, z_k)
              + b_k \frac{\partial \log w_k}{\partial z_k} \nabla_\phi z_k
              - c_k \nabla_\phi \log q(z_k \mid x) + d_k \nabla_\phi \log q(z_k \mid x)

    with z fixed in all but the second term. To differentiate a bound as it stands is to have :math:`a = b = c`.

    Attributes:
        model: The weights `a`.
        path: The weights `b`; None for an estimator that stops gradients at the particles.
        score: The weights `c`, of the density that stands in the log-weights, and that `beta` weighs.
        reinforce: The weights `d`, of the density that particles are drawn from, whatever beta.
    """

    model: Tensor
    path: Tensor | None = None
    score: Tensor | None = None
    reinforce: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Weights:
        """A function of each; of those that were one tensor, it is one again."""
        changed = {id(weights): function(weights) for weights in self if weights is not None}
        return Weights._make(changed.get(id(weights)) for weights in self)


class Estimator(ELBO):
    """An ELBO of Pyro that is one differentiable loss: what a subclass defines is `differentiable_loss`.

    As with Pyro's own, the loss is minus the sum over all data that the plate "data" stands for, in nats.

    Args:
        num_particles: Number of particles a datum, at least 1.
    """

    def __init__(self, num_particles: int = 1):
        if not isinstance(num_particles, int) or num_particles < 1:
            raise ValueError(f"{type(self).__name__}: expected an integer num_particles >= 1, got {num_particles}")
        super().__init__(num_particles=num_particles)

    @abstractmethod
    def differentiable_loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Tensor:
        """The loss, a scalar tensor to differentiate."""

    @torch.no_grad()
    def loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """The loss as a number."""
        return self.differentiable_loss(model, guide, *args, **kwargs).item()

    def loss_and_grads(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """The loss as a number, after its gradients were added to those of the parameters."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward()
        return loss.item()

    def _get_trace(self, *args: Any) -> Any:
        raise NotImplementedError("particles are drawn by Particles, and not one trace after another")


class WeightedEstimator(Estimator):
    """An estimator that is a function of log-weights; what a subclass defines is `weigh`.

    Args:
        num_particles: Number `K` of particles a datum.
        chunk: Particles at once, where memory is short: the same loss and gradients, in twice the time. (Batch
            normalization, which sees one chunk at a time, makes a difference.)
    """

    reparameterized = True

    def __init__(self, num_particles: int = 1, *, chunk: int | None = None):
        super().__init__(num_particles)
        if chunk is not None and chunk < 1:
            raise ValueError(f"{type(self).__name__}: expected chunk >= 1, got {chunk}")
        self.chunk = chunk

    @abstractmethod
    def weigh(self, log_weights: Tensor) -> tuple[Tensor, Weights]:
        """The bound of each datum, of shape `(B,)`, and the particles' weights in its gradient.

        Args:
            log_weights: Log-weights of shape `(K, B)`, without gradient.
        """

    @property
    def importance_weighted(self) -> bool:
        """Whether it is a bound only as long as the log-weights are those of the model and the guide."""
        return self.num_particles > 1

    def differentiable_loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Tensor:
        """Minus the bound on the log evidence of all data, a scalar tensor with the estimator's gradient, in nats."""
        draw = partial(self._draw, model, guide, args, kwargs)
        if self.chunk is not None and self.chunk < self.num_particles:
            return -self._in_chunks(self.chunk, draw, shared_draws(guide, args, kwargs), random_state(args))
        particles = draw(self.num_particles)
        bound, weights = self.weigh(particles.log_weights.detach())
        value = _value(particles, bound)
        return -_with_gradient(value, _gradient(particles, weights)) if torch.is_grad_enabled() else -value

    def _draw(
        self, model: Callable, guide: Callable, args: Any, kwargs: Any, num_particles: int, **shared: Any
    ) -> Particles:
        particles = Particles(model, guide, args, kwargs, num_particles, reparameterized=self.reparameterized, **shared)
        if self.importance_weighted and particles.is_weighted:
            warnings.warn(
                f"{type(self).__name__} under beta != 1 is no bound on the evidence; beta belongs to Trace_ELBO, "
                "StickingTheLanding and the like",
                stacklevel=4,
            )
        return particles

    def _in_chunks(
        self, chunk: int, draw: Callable[..., Particles], shared: dict[str, Tensor], state: random_state
    ) -> Tensor:
        """The bound in two passes: one for all log-weights, and one, on the same random numbers, for gradients."""
        chunks = [min(chunk, self.num_particles - first) for first in range(0, self.num_particles, chunk)]
        leaves = {name: value.detach().requires_grad_(value.requires_grad) for name, value in shared.items()}
        with torch.no_grad():
            log_weights = torch.cat([(particles := draw(size, shared=leaves)).log_weights for size in chunks])
            bound, weights = self.weigh(log_weights)
            value = _value(particles, bound)
        if not torch.is_grad_enabled():
            return value
        state.restore()
        found: dict[Tensor, Tensor] = {}
        for last, size in zip(itertools.accumulate(chunks), chunks, strict=True):
            particles = draw(size, shared=leaves)
            gradient = _gradient(particles, weights.map(itemgetter(slice(last - size, last))), with_global=last == size)
            _accumulate(found, gradient)
        if not found:  # all is held fixed
            return value
        behind = {leaves[name]: value for name, value in shared.items()}  # the guide that global latents come from
        return _with_gradient(value, sum((behind.get(leaf, leaf) * grad).sum() for leaf, grad in found.items()))


def _value(particles: Particles, bound: Tensor) -> Tensor:
    """The bound on the log evidence of all data."""
    return (particles.scale * bound).sum() + particles.log_global()


def _with_gradient(value: Tensor, gradient: Any) -> Tensor:
    return value.detach() + (gradient - gradient.detach())


def _gradient(particles: Particles, weights: Weights, with_global: bool = True) -> Tensor:
    """A scalar whose gradient is that of the given weights; its value means nothing."""
    # Processors take many times as long for numbers near the smallest, and such weights do not count beside the others.
    model, path, score, reinforce = weights.map(lambda weights: weights.masked_fill(weights.abs() <= TINY, 0.0))
    # A particle that cannot be has no weight, and no part in this.
    log_joint = particles.log_joint.nan_to_num(nan=math.nan, posinf=math.inf, neginf=0.0)
    if path is None:
        total = model * log_joint
        if score is not None:
            total = total - score * particles.log_posterior_at_fixed(weighted=True)
    else:
        log_posterior = particles.log_posterior
        if path is not model:
            # Gradients come to z times the weights of the model. What the floor adds to these is far below rounding.
            model = model.clamp(min=TINY)
            particles.scale_path(path / model)
            log_posterior = particles.log_posterior_along_path()
        total = model * (log_joint - log_posterior)
        if score is not model:
            rest = model if score is None else model - score
            total = total + rest * particles.log_posterior_at_fixed(weighted=True)
    if reinforce is not None:
        total = total + reinforce * particles.log_posterior_at_fixed(weighted=False)
    total = (particles.scale * total.sum(0)).sum()
    return total + particles.log_global() if with_global else total


def _accumulate(found: dict[Tensor, Tensor], total: Tensor) -> None:
    """Add the gradients of `total` to those that were found for the leaves of its graph."""
    reached = list(leaves(total))
    if not reached:
        return
    for leaf, grad in zip(reached, torch.autograd.grad(total, reached), strict=True):
        found[leaf] = found[leaf] + grad if leaf in found else grad


def leaves(tensor: Tensor) -> Iterator[Tensor]:
    """The leaves that a tensor was computed from and that gradients are wanted of."""
    seen, waiting = set(), [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting.extend(before for before, _ in node.next_functions)
            if hasattr(node, "variable"):
                yield node.variable


def loss_to_differentiate(estimator: Any, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Tensor:
    """The loss of any ELBO of Pyro, one way for all: a scalar tensor to differentiate.

    Of an estimator that calls backward itself, it has no graph, and the parameters have their gradients already.
    """
    # An estimator is used by what its own class defines, and not by what that may have inherited beside it.
    ways = {"differentiable_loss", "loss_and_grads"}
    if "differentiable_loss" in next(vars(cls) for cls in type(estimator).__mro__ if ways & vars(cls).keys()):
        return estimator.differentiable_loss(model, guide, *args, **kwargs)
    with poutine.trace(param_only=True):  # where param sites are not collected, such estimators leave backward out
        loss = estimator.loss_and_grads(model, guide, *args, **kwargs)
    loss = sum(loss) if isinstance(loss, tuple) else loss
    return loss.detach() if isinstance(loss, Tensor) else torch.tensor(loss, dtype=torch.float64)
