"""The reconstruction less another penalty than the rate: free bits, a capacity, total correlation, kernel distance."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_vae.estimators.divergences import (
    by_dimension,
    counts,
    divergences,
    num_data,
    over_data,
    relative,
    side_by_side,
)
from pyro_vae.estimators.gradients import Estimator
from pyro_vae.estimators.kernels import RBF, squared_mmd
from pyro_vae.estimators.particles import Particles, local_sites, log_prob, same
from pyro_vae.handlers import data_frame
from pyro_vae.schedules import Schedule

__all__ = ["MMD", "BetaTC", "Capacity", "FreeBits"]


class _Programs(NamedTuple):
    """Model and guide with their arguments, to be run once more unseen by the handlers that watch the particles."""

    model: Callable
    guide: Callable
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def prior_draws(self, particles: Particles) -> Tensor:
        """Draws from the prior as `side_by_side(particles.latents)`; no decoder behind the last latent is run."""
        names = [site["name"] for site in particles.latents]
        given = particles.guide.copy()  # global latents, and which data a plate has drawn
        for name in names:
            given.remove_node(name)
        model = poutine.replay(pyro.plate("particles", particles.num_particles, dim=-2)(self.model), trace=given)
        with poutine.block(hide_types=["sample", "observe"]), suppress(_Drawn), poutine.trace() as drawn, _until(names):
            model(*self.args, **self.kwargs)
        return side_by_side([drawn.trace.nodes[name] for name in names])

    def pairs(self, particles: Particles) -> Tensor:
        """Log q(z_id given x_j) of each dimension d, datum i and datum j, of shape `(K, B, B, D)`."""
        values = {site["name"]: site["value"].movedim(1, 0).unsqueeze(2) for site in particles.latents}
        # A latent on which another depends is one of datum i there: the guide is run with it on each datum j.
        sites = particles.latents if len(values) == 1 else self._guide_given(particles, values)
        terms = []
        for site in sites:
            density = by_dimension(site, "BetaTC needs the marginals of each dimension")["fn"]
            log_density = density.log_prob(values[site["name"]])
            terms.append(log_density.reshape(*log_density.shape[:3], -1))
        return torch.cat(terms, -1).movedim(0, 1)

    def _guide_given(self, particles: Particles, values: dict[str, Tensor]) -> list[Any]:
        """The guide's local latents at values of shape `(B, K, 1, ...)`, each beside every datum."""
        given = particles.guide.copy()
        size = len(next(iter(values.values())))
        for name, value in values.items():
            value = value.expand(-1, -1, size, *value.shape[3:])
            given.nodes[name] = given.nodes[name] | {"value": value}
        pairs, plate = pyro.plate("pairs", size, dim=-3), pyro.plate("particles", particles.num_particles, dim=-2)
        with poutine.block(hide_types=["sample", "observe"]):
            trace = poutine.trace(poutine.replay(pairs(plate(self.guide)), trace=given))
            return local_sites(trace.get_trace(*self.args, **self.kwargs), observed=False)


class _Drawn(Exception):  # noqa: N818 (it is no error)
    """All latents have been drawn."""


class _until(Messenger):
    """Stop a program as soon as all sites of these names have been sampled."""

    def __init__(self, names: list[str]):
        super().__init__()
        self.left = set(names)

    def _pyro_post_sample(self, msg: Any) -> None:
        self.left.discard(msg["name"])
        if not self.left:
            raise _Drawn


class Regularized(Estimator):
    """The expected log-likelihood less a penalty, for guides whose draws are differentiable.

    What a subclass defines is `penalty`, which for the ELBO would be the rate. Sites are masked as they are. The
    weights of `handlers.beta` multiply the log-probabilities of their sites, and hence the rate that comes of these.
    """

    def differentiable_loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Tensor:
        """The penalty less the log-likelihood, of all data, a scalar tensor in nats."""
        particles = Particles(model, guide, args, kwargs, self.num_particles)
        observed = [relative(site, particles) for site in local_sites(particles.model, observed=True)]
        log_likelihood = over_data(sum(log_prob(site, site["scale"]) for site in observed), particles)
        penalty = self.penalty(particles, _Programs(model, guide, args, kwargs))
        return penalty - log_likelihood - particles.log_global()

    @abstractmethod
    def penalty(self, particles: Particles, programs: _Programs) -> Tensor:
        """The penalty for all data, a scalar tensor in nats."""


class FreeBits(Regularized):
    r"""The ELBO with a floor under the rate of each dimension, or of each group of dimensions: what is below is free.

    .. math:: E_q[\log p(x \mid z)] - \sum_j \max\Big(\lambda,\; \tfrac1B \sum_b
              D_{\text{KL}}\big(q(z_j \mid x_b) \,\|\, p(z_j)\big)\Big)

    A dimension below the floor has no gradient towards the prior, and none has a reason to collapse. Where torch knows
    no closed form (or, with several sites, none is valid), the divergence is estimated at the draws; the maximum of an
    estimate is on average above that of what it estimates.

    Under `handlers.beta` the floor is that of the weighted rate.

    Args:
        nats: The floor :math:`\lambda`, in nats per datum, for each dimension or group.
        num_groups: Number of groups, each of as many consecutive dimensions of all latents side by side. None makes a
            group of each dimension, and 1 one of all, which any distributions allow.
        num_particles: Number of particles a datum, over which all is averaged.

    Raises:
        ValueError: If `nats` is negative or `num_groups` not positive; from the loss, if groups do not divide the
            dimensions, or prior or posterior have no independent dimensions.

    Reference:
        Kingma et al., 2016. Improved variational inference with inverse autoregressive flow.

    Example:
        >>> import pyro_vae
        >>> vae, x = pyro_vae.build((8, 8), latent=2), torch.ones(3, 8, 8)
        >>> FreeBits(50.0).loss(vae.model, vae.guide, x) > FreeBits(0.0).loss(vae.model, vae.guide, x)
        True
    """

    def __init__(self, nats: float, num_groups: int | None = None, num_particles: int = 1):
        if not nats >= 0 or (num_groups is not None and num_groups < 1):
            raise ValueError(f"FreeBits: expected nats >= 0 and num_groups >= 1, got {nats=}, {num_groups=}")
        super().__init__(num_particles)
        self.nats, self.num_groups = nats, num_groups

    def penalty(self, particles: Particles, programs: _Programs) -> Tensor:
        """The sum of the rates of all groups, each at least at the floor."""
        rates = over_data(divergences(particles, each_dimension=self.num_groups != 1), particles)
        if len(rates) % (self.num_groups or 1):
            raise ValueError(
                f"FreeBits: expected num_groups that divides {len(rates)} dimensions, got {self.num_groups}"
            )
        groups = rates if self.num_groups is None else rates.reshape(self.num_groups, -1).sum(-1)
        return groups.clamp(min=self.nats * num_data(particles)).sum()


class Capacity(Regularized):
    r"""A rate that is held at a capacity, which may grow in training.

    .. math:: E_q[\log p(x \mid z)] - \gamma\, |R - C|, \qquad R = \tfrac1B \sum_b
              D_{\text{KL}}\big(q(z \mid x_b) \,\|\, p(z)\big)

    `fit` calls `set_progress`. Elsewhere a schedule stays at its start until it is called.

    Under `handlers.beta` the capacity is that of the weighted rate.

    Args:
        capacity: The capacity `C` in nats per datum: a number, or a schedule such as `Linear(0.5, 0.0, 25.0)`.
        gamma: The weight :math:`\gamma`.
        num_particles: Number of particles a datum, over which all is averaged.

    Raises:
        ValueError: If `capacity` or `gamma` is negative.

    Reference:
        Burgess et al., 2018. Understanding disentangling in beta-VAE.

    Example:
        >>> from pyro_vae.schedules import Linear
        >>> estimator = Capacity(Linear(0.5, 0.0, 25.0))
        >>> estimator.set_progress(0.25)
        >>> estimator.current_capacity
        12.5
    """

    def __init__(self, capacity: float | Schedule, gamma: float = 1000.0, num_particles: int = 1):
        if not gamma >= 0:
            raise ValueError(f"Capacity: expected gamma >= 0, got {gamma}")
        super().__init__(num_particles)
        self.capacity, self.gamma = capacity, gamma
        self.set_progress(0.0)

    def set_progress(self, progress: float) -> None:
        """Set the capacity of a point in training, from 0 to 1; `fit` calls this before each step."""
        self.current_capacity = self.capacity(progress) if callable(self.capacity) else self.capacity
        if not self.current_capacity >= 0:
            raise ValueError(f"Capacity: expected a capacity of at least 0 nats, got {self.current_capacity}")

    def penalty(self, particles: Particles, programs: _Programs) -> Tensor:
        """The distance of the rate from the capacity, times gamma."""
        rate = over_data(divergences(particles), particles).sum()
        return self.gamma * (rate - self.current_capacity * num_data(particles)).abs()


class BetaTC(Regularized):
    r"""The ELBO with its rate in three parts, each with a weight of its own; that of the total correlation is beta.

    .. math:: E_q[\log p(x \mid z)]
              - \alpha \underbrace{E_q \log \frac{q(z \mid x)}{q(z)}}_{\text{index-code mutual information}}
              - \beta \underbrace{E_q \log \frac{q(z)}{\prod_j q(z_j)}}_{\text{total correlation}}
              - \gamma \underbrace{E_q \log \frac{\prod_j q(z_j)}{p(z)}}_{\text{dimension-wise divergence}}

    The aggregate :math:`q(z) = \frac1N \sum_n q(z \mid x_n)`, and likewise :math:`q(z_j)`, is estimated from a batch of
    `B` data, drawn without replacement, in two strata: the datum that `z` belongs to, and the others.

    .. math:: \hat q(z_i) = \frac1N q(z_i \mid x_i) + \frac{N - 1}{N (B - 1)} \sum_{j \ne i} q(z_i \mid x_j)

    This is unbiased for the aggregate (not for its logarithm). It is the paper's estimate averaged over which of the
    others comes last, and is given another weight there; with a batch of all data it is exact.

    With several latent sites, all are side by side, and the guide is run once more with the latents of each datum
    beside every other. `handlers.beta` weighs the three parts alike.

    Args:
        beta: Weight of the total correlation.
        alpha: Weight of the index-code mutual information.
        gamma: Weight of the dimension-wise divergence from the prior.
        size: Number of data `N`, by default that which the plate "data" stands for.
        num_particles: Number of particles a datum, over which all is averaged.

    Raises:
        ValueError: If a weight is negative; from the loss, if `N` is not known or the batch is of one datum, if the
            guide has no independent dimensions, or if latents have different weights.

    Reference:
        Chen, Li, Grosse and Duvenaud, 2018. Isolating sources of disentanglement in variational autoencoders
        (appendix C.2).

    Example:
        >>> import pyro_vae
        >>> vae, x = pyro_vae.build((8, 8), latent=2), torch.rand(3, 8, 8).round()
        >>> loss = BetaTC(beta=6.0, size=1000)(vae.model, vae.guide)(x)
        >>> loss.backward()
    """

    def __init__(
        self, beta: float, alpha: float = 1.0, gamma: float = 1.0, size: int | None = None, num_particles: int = 1
    ):
        if not min(beta, alpha, gamma) >= 0:
            raise ValueError(f"BetaTC: expected weights of at least 0, got {beta=}, {alpha=}, {gamma=}")
        super().__init__(num_particles)
        self.beta, self.alpha, self.gamma, self.size = beta, alpha, gamma, size

    def penalty(self, particles: Particles, programs: _Programs) -> Tensor:
        """The three parts of the rate, weighed."""
        counted, weight = counts(particles), self._weight(particles)
        log_weights = log_stratified_weights(counted, self._num_data(particles))
        log_each = programs.pairs(particles)
        log_aggregate = (log_weights + log_each.sum(-1)).logsumexp(-1)
        log_marginals = (log_weights.unsqueeze(-1) + log_each).logsumexp(-2).sum(-1)
        log_posterior = sum(map(log_prob, particles.latents))
        log_prior = sum(map(log_prob, local_sites(particles.model, observed=False)))
        information = log_posterior - log_aggregate
        total_correlation = log_aggregate - log_marginals
        dimension_wise = log_marginals - log_prior
        penalty = self.alpha * information + self.beta * total_correlation + self.gamma * dimension_wise
        return over_data(scale_and_mask(penalty, weight, counted > 0), particles)

    def _weight(self, particles: Particles) -> Any:
        sites = [*particles.latents, *local_sites(particles.model, observed=False)]
        weights = [relative(site, particles)["scale"] for site in sites]
        if not all(same(weight, weights[0]) for weight in weights):
            raise ValueError(f"BetaTC: expected one weight for all latents in model and guide, got {weights}")
        return weights[0]

    def _num_data(self, particles: Particles) -> int:
        frame = data_frame(particles.latents[0])
        check_batch(self, frame.size)
        if self.size is None and frame.full_size == frame.size:
            raise ValueError(
                f"BetaTC: expected the number of data that the batch of {frame.size} is drawn from, "
                "got a plate of the batch alone; give BetaTC(size=len(train))"
            )
        size = self.size or frame.full_size
        if size < frame.size:
            raise ValueError(f"BetaTC: expected a size of at least the batch's {frame.size}, got {size}")
        return size


class MMD(Regularized):
    r"""InfoVAE: the rate gives way to the maximum mean discrepancy between aggregate posterior and prior.

    .. math:: E_q[\log p(x \mid z)] - (1 - \alpha)\, D_{\text{KL}}\big(q(z \mid x) \,\|\, p(z)\big)
              - (\alpha + \lambda - 1)\, \text{MMD}^2\big(q(z), p(z)\big)

    .. math:: \text{MMD}^2(q, p) = E\, k(z, z') + E\, k(\zeta, \zeta') - 2\, E\, k(z, \zeta), \qquad
              z, z' \sim q(z), \quad \zeta, \zeta' \sim p(z)

    The estimate is the unbiased one, over pairs of different data, and may be negative. The prior is drawn from by the
    model, latents in their order and no further; where its draws are differentiable, it learns from the distance too.

    `handlers.beta` weighs the rate and leaves the distance alone, which has a weight of its own.

    Args:
        alpha: Weight :math:`\alpha` of the mutual information between data and latents, at most 1: there the rate is
            left out.
        scaling: The scaling parameter :math:`\lambda`, with :math:`\alpha + \lambda \ge 1`. The distance is at most 2,
            where the log-likelihood of an image is in the hundreds of nats.
        kernel: The kernel: any function of `(*, n, D)` and `(*, m, D)` to `(*, n, m)`. By default `RBF()`.
        num_particles: Number of particles a datum, over which all is averaged.

    Raises:
        ValueError: If the weight of the rate or of the distance is negative; from the loss, if the batch is of one
            datum.

    Reference:
        Zhao, Song and Ermon, 2019. InfoVAE: balancing learning and inference in variational autoencoders.
        Gretton et al., 2012. A kernel two-sample test.

    Example:
        >>> import pyro_vae
        >>> vae, x = pyro_vae.build((8, 8), latent=2), torch.rand(3, 8, 8).round()
        >>> loss = MMD(scaling=500.0, kernel=RBF(bandwidth=1.0))(vae.model, vae.guide)(x)
        >>> loss.backward()
    """

    def __init__(
        self,
        alpha: float = 1.0,
        scaling: float = 1000.0,
        kernel: Callable[[Tensor, Tensor], Tensor] | None = None,
        num_particles: int = 1,
    ):
        if not alpha <= 1 or not alpha + scaling >= 1:
            raise ValueError(f"MMD: expected alpha <= 1 and alpha + scaling >= 1, got {alpha=}, {scaling=}")
        super().__init__(num_particles)
        self.alpha, self.scaling, self.kernel = alpha, scaling, kernel

    def penalty(self, particles: Particles, programs: _Programs) -> Tensor:
        """The rate and the distance, weighed."""
        rate = over_data(divergences(particles), particles).sum()
        aggregate, prior = side_by_side(particles.latents), programs.prior_draws(particles)
        check_batch(self, aggregate.shape[1])
        distance = squared_mmd(aggregate, prior, self.kernel or RBF(), counts(particles)).mean()
        return (1 - self.alpha) * rate + (self.alpha + self.scaling - 1) * num_data(particles) * distance


def check_batch(estimator: Regularized, size: int) -> None:
    """Raise if there is but one datum, of which no aggregate can be told."""
    if size < 2:
        raise ValueError(
            f"{type(estimator).__name__}: expected a batch of at least 2 data, got {size}; "
            "choose a batch size that leaves no batch of one"
        )


def log_stratified_weights(counted: Tensor, size: int) -> Tensor:
    """Logarithms of the weights of a datum and of the others in the aggregate, of shape `(B, B)`.

    Example:
        >>> log_stratified_weights(torch.ones(3), 10).exp()
        tensor([[0.1000, 0.4500, 0.4500],
                [0.4500, 0.1000, 0.4500],
                [0.4500, 0.4500, 0.1000]])
    """
    others = (size - 1) / size / (counted.sum() - 1).clamp(min=1)
    weights = others.expand(len(counted), len(counted)).clone().fill_diagonal_(1 / size)
    nothing = torch.finfo(weights.dtype).min / 2  # infinity has no gradient where all data are masked
    return torch.where(counted > 0, weights.log(), nothing)
