"""Annealed importance sampling: the evidence from the model alone, and a sandwich of it on data of the model's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor

from pyro_vae.estimators.evidence import PARTICLES_AT_ONCE, VALUES_AT_ONCE
from pyro_vae.estimators.importance import log_mean_exp
from pyro_vae.estimators.terminal import progress_bar
from pyro_vae.evaluation.batches import Gathered, checked_batches
from pyro_vae.evaluation.densities import LatentSpace
from pyro_vae.evaluation.draws import check_observed, check_whole, prior_draws
from pyro_vae.evaluation.generation import takes_x_alone
from pyro_vae.programs import Program, placement, undisturbed

__all__ = ["Annealed", "Bidirectional", "annealed_log_likelihood", "bidirectional"]

TARGET = 0.8  # acceptance; Wu et al. (2017) take 0.65, and chains of the same cost had weights less alike with it
RATE = 0.2  # of the logarithm of a step size, a move: fast enough to follow the path, and its noise does no harm
JITTER = 0.2  # a move's steps are this share of the step size at least, at random
FIRST_STEP = 0.5  # in scales of the prior
ADAPTING_CHAINS = 4
ADAPTING_MOVES = 100  # at least, however short the path
STEEPNESS = 4.0  # of the sigmoid schedule (Wu et al., 2017)


class Annealed(NamedTuple):
    """Estimates for each datum from K annealed chains, tensors of shape `(N,)`, float64, on the CPU.

    Attributes:
        log_evidence: Estimate of log p(x), in nats: a lower bound in expectation, whose exponential is unbiased.
        error: Its Monte Carlo standard error, in nats; NaN with one chain. It is of the chains' own spread, and at most
            1: where `ess` is below about 2, one chain has most of the weight, and the evidence may be higher by any
            amount.
        acceptance: Share of the moves that were accepted, in [0, 1]; NaN where there were none.
        ess: Effective sample size of the chains' weights, from 1 to K.
    """

    log_evidence: Tensor
    error: Tensor
    acceptance: Tensor
    ess: Tensor


class Bidirectional(NamedTuple):
    """A sandwich of the log evidence of simulated data, tensors of shape `(N,)`, float64, on the CPU.

    Attributes:
        x: The simulated data, of shape `(N, *event_shape)`, in the program's dtype.
        lower: Stochastic lower bound on log p(x), in nats.
        upper: Stochastic upper bound, in nats.
        acceptance: Share of the moves that were accepted, both ways.
    """

    x: Tensor
    lower: Tensor
    upper: Tensor
    acceptance: Tensor

    @property
    def gap(self) -> Tensor:
        """What the bounds leave open for each datum, in nats; in expectation at least 0."""
        return self.upper - self.lower

    @property
    def mean_gap(self) -> tuple[float, float]:
        """Mean of the gap over data and its standard error (NaN of one datum), in nats per datum."""
        error = self.gap.std().item() / math.sqrt(len(self.gap)) if len(self.gap) > 1 else math.nan
        return self.gap.mean().item(), error


def annealed_log_likelihood(
    program: Program,
    data: Any,
    num_chains: int = 16,
    *,
    num_temperatures: int = 300,
    num_leapfrog: int = 5,
    seed: int = 0,
    progress: bool = True,
    advance: Callable[[float], Any] | None = None,
) -> Annealed:
    r"""Log evidence of each datum by annealed importance sampling, from the prior to the posterior by HMC moves.

    .. math:: \log \hat p(x) = \log \tfrac1K \sum_k \prod_{i=1}^T p(x \mid z_{k,i-1})^{t_i - t_{i-1}}, \quad
              z_{k,0} \sim p(z), \quad z_{k,i} \sim \text{HMC}_{t_i}(z_{k,i-1}), \quad 0 = t_0 < \dots < t_T = 1

    A move leaves :math:`p(z)\, p(x \mid z)^{t_i}` as it is. Temperatures follow a sigmoid, dense at both ends. Each
    datum has a step size at each temperature, in units of the prior's standard deviations (or, where its tails are
    heavy, of its interquartile ranges). It is adapted to an acceptance of 0.8 by four chains of their own, and then
    fixed, so that the mean of the weights stays unbiased.

    The guide takes no part: this is a witness that owes it nothing. A path from the guide would be shorter, but blind
    where the guide is, and would ask for its density at points that it has not drawn, at which an inverse
    autoregressive flow is slow. The cost a datum is `(num_chains + 4) * num_temperatures * num_leapfrog` passes of one
    z through the decoder, forward and back: by default some 1.2 s on one core for a decoder of 50-400-784. They are
    taken 2^20 decoder outputs at a time (or up to 256 chains of one datum), so that memory follows neither the data nor
    the chains.

    Global latents are drawn once from the guide, and the evidence is given these.

    Args:
        program: Any program that keeps its local sites in one plate named "data", with continuous latents.
        data: Tensor, array, `Dataset` or `DataLoader`.
        num_chains: Number `K` of chains a datum.
        num_temperatures: Number `T` of steps of the path. The error falls with it, and faster than with `K`.
        num_leapfrog: Leapfrog steps of a move.
        seed: Seed of the chains.
        progress: Whether to show a progress bar past two seconds.
        advance: Called with the share of the work done since the last call, in place of the bar.

    Returns:
        An `Annealed`.

    Raises:
        ValueError: If a number is not positive, a latent is discrete, or the data do not suit the program.

    Reference:
        Neal, 2001. Annealed importance sampling. Wu et al., 2017. On the quantitative analysis of decoder-based
        generative models.

    Example:
        >>> import pyro_vae
        >>> vae = pyro_vae.build((8, 8), latent=2)
        >>> found = annealed_log_likelihood(vae, torch.ones(3, 8, 8), num_chains=4, num_temperatures=10)
        >>> found.log_evidence.shape
        torch.Size([3])
    """
    check_whole(1, num_chains=num_chains, num_temperatures=num_temperatures, num_leapfrog=num_leapfrog)
    batches = checked_batches(program, data, min(num_chains, PARTICLES_AT_ONCE))
    gathered, shared = Gathered(), None
    with _working(program, seed, progress, advance) as advance:
        for batch in batches.epoch(0):
            space = LatentSpace(program, *batch, shared=shared)
            shared = space.shared
            work = len(batch[0]) / batches.num_data / _chain_moves(num_temperatures, num_chains)
            path = _Path(space, num_temperatures, num_leapfrog, _scaled(advance, work))
            log_weights, acceptance = path.forward(num_chains)
            gathered.add(*_annealed(log_weights, acceptance))
    return Annealed(*gathered.tensors())


def bidirectional(
    program: Program,
    num: int = 100,
    like: Any = None,
    *,
    num_chains: int = 16,
    num_temperatures: int = 300,
    num_leapfrog: int = 5,
    seed: int = 0,
    progress: bool = True,
) -> Bidirectional:
    r"""Lower and upper bounds on the log evidence of data that are simulated from the model.

    .. math:: z^*, x \sim p(z)\, p(x \mid z), \qquad
              E[\log \hat p(x)] \le \log p(x) \le E\!\left[-\log \widehat{1 / p(x)}\right]

    The lower bound is that of `annealed_log_likelihood`. The upper bound goes its path backwards, by the same moves,
    from :math:`z^*`, which is an exact draw from the posterior of its x. Where they meet, so many chains of that length
    do for the model's own data, and for real data as far as these are like them.

    Args:
        program: Any program that keeps its local sites in one plate named "data", with continuous latents, whose only
            observed site is "x", or whose sites "x.<part>" hold its columns in order.
        num: Number of data to simulate.
        like: Data whose shape and companions (an exposure, say) the simulated ones have, at most `num` of them; None
            takes the shape of the likelihood, `program.likelihood.event_shape`.
        num_chains: Number of chains a datum, each way.
        num_temperatures: Number of steps of the path.
        num_leapfrog: Leapfrog steps of a move.
        seed: Seed of data and chains.
        progress: Whether to show a progress bar past two seconds.

    Returns:
        A `Bidirectional`.

    Raises:
        ValueError: If a number is not positive, a latent is discrete, `like` is needed, or the model observes more
            than x.

    Reference:
        Grosse, Ancha and Roy, 2016. Measuring the reliability of MCMC inference with bidirectional Monte Carlo.

    Example:
        >>> import pyro_vae
        >>> vae = pyro_vae.build((8, 8), latent=2)
        >>> found = bidirectional(vae, 3, num_chains=4, num_temperatures=10)
        >>> found.lower.shape, found.upper.shape
        (torch.Size([3]), torch.Size([3]))
    """
    numbers = {"num_chains": num_chains, "num_temperatures": num_temperatures, "num_leapfrog": num_leapfrog}
    check_whole(1, num=num, **numbers)
    templates = list(_templates(program, num, like, min(num_chains, PARTICLES_AT_ONCE)))
    parts, shared = [], None
    with _working(program, seed, progress) as advance:
        for template in templates:
            like_it = LatentSpace(program, *template, shared=shared)
            check_observed(like_it.observed)
            shared = like_it.shared
            latents, x = prior_draws(program, *template, num_samples=1, shared=shared)
            space = LatentSpace(program, x[0], *template[1:], shared=shared)
            work = len(x[0]) / sum(len(each[0]) for each in templates) / _chain_moves(num_temperatures, 2 * num_chains)
            path = _Path(space, num_temperatures, num_leapfrog, _scaled(advance, work))
            forward, there = path.forward(num_chains)
            backward, back = path.backward(space.unconstrained(latents), num_chains)
            parts.append(Bidirectional(x[0].cpu(), log_mean_exp(forward), -log_mean_exp(backward), (there + back) / 2))
    return Bidirectional(*map(torch.cat, zip(*parts, strict=True)))


@contextmanager
def _working(
    program: Program, seed: int, progress: bool, advance: Callable[[float], Any] | None = None
) -> Iterator[Callable[[float], Any]]:
    """The program left as it was, and what to call with shares of the work: what the caller gave, or a bar."""
    with undisturbed(program, seed), pyro.validation_enabled(False):
        if advance is not None:
            yield advance
            return
        with progress_bar(1, progress) as begin:
            yield begin("annealing")


def _scaled(advance: Callable[[float], Any], factor: float) -> Callable[[float], Any]:
    return lambda done: advance(factor * done)


def _templates(program: Program, num: int, like: Any, chains: int) -> Iterator[tuple[Any, ...]]:
    """Batches of the shape of those to simulate, `num` data in all."""
    if like is not None:
        for batch in checked_batches(program, like, chains).epoch(0):
            if num > 0:
                yield tuple(each[:num] for each in batch)
            num -= len(batch[0])
        return
    event_shape = getattr(getattr(program, "likelihood", None), "event_shape", None)
    if event_shape is None or not takes_x_alone(program):
        name = type(program).__name__
        raise ValueError(f"{name}: expected like=, data whose shape and companions the simulated ones have, got None")
    device, dtype = placement(program)
    at_once = max(1, VALUES_AT_ONCE // (max(1, math.prod(event_shape)) * chains))
    for first in range(0, num, at_once):
        yield (torch.zeros(min(at_once, num - first), *event_shape, device=device, dtype=dtype),)


class _State(NamedTuple):
    """Where chains are, `(K, B, D)`, and the two parts of their log-density there, each `(K, B)`."""

    u: Tensor
    log_prior: Tensor
    log_likelihood: Tensor


class _Path:
    """A path of temperatures from the prior to the posterior of each datum of a batch, with its moves.

    Steps are in units of the prior's scale of each dimension, which priors may have of any size. They are
    adapted by chains that are then thrown away: chains that adapt their own steps would no longer leave each
    distribution as it is, and their weights would be biased.
    """

    def __init__(self, space: LatentSpace, num_temperatures: int, num_leapfrog: int, advance: Callable[[float], Any]):
        self.space, self.num_leapfrog, self.advance = space, num_leapfrog, advance
        self.temperatures = _sigmoid_schedule(num_temperatures)
        self.scale = space.prior_scale()
        self.step_sizes = self._adapted()

    def forward(self, num_chains: int) -> tuple[Tensor, Tensor]:
        """Log-weights of chains from the prior to the posterior, `(K, B)`, and the share of moves accepted, `(B,)`."""
        return self._passes(range(len(self.temperatures)), num_chains, self.space.prior_draws)

    def backward(self, u: Tensor, num_chains: int) -> tuple[Tensor, Tensor]:
        """The same of chains from draws of the posterior, of shape `(1, B, D)`, to the prior."""
        order = range(len(self.temperatures) - 1, -1, -1)
        return self._passes(order, num_chains, lambda chains: u.expand(chains, -1, -1))

    def _passes(self, order: Sequence[int], num_chains: int, start: Callable[[int], Tensor]) -> tuple[Tensor, Tensor]:
        sizes = [min(PARTICLES_AT_ONCE, num_chains - first) for first in range(0, num_chains, PARTICLES_AT_ONCE)]
        log_weights, accepted = zip(*(self._run(order, start(chains)) for chains in sizes), strict=True)
        moves = num_chains * (len(order) - 2)
        return torch.cat(log_weights), sum(accepted) / moves if moves else torch.full_like(accepted[0], math.nan)

    def _run(self, order: Sequence[int], u: Tensor) -> tuple[Tensor, Any]:
        """Chains through the temperatures in this order: log-weights, and how many moves were accepted."""
        state = _State(u, *self.space.log_densities(u))
        log_weights = torch.zeros(u.shape[:2], dtype=torch.float64)
        accepted = torch.zeros(u.shape[1], dtype=torch.float64)
        for now, following in pairwise(order):
            change = self.temperatures[following] - self.temperatures[now]
            log_weights += change * state.log_likelihood.cpu().double()
            if following != order[-1]:  # a move after the last weight would change nothing
                state, acceptance = self._move(state, self.temperatures[following], self.step_sizes[following])
                accepted += acceptance.sum(0).cpu()
                self.advance(len(u))
        return log_weights, accepted

    def _adapted(self) -> list[Tensor]:
        """The step size of each datum, `(B,)`, at each temperature."""
        u = self.space.prior_draws(ADAPTING_CHAINS)
        state = _State(u, *self.space.log_densities(u))
        step_size = torch.full_like(u[0, :, 0], FIRST_STEP)
        repeats = _adapting_moves(len(self.temperatures) - 1)
        found = [step_size]
        for temperature in self.temperatures[1:-1]:
            for _ in range(repeats):
                state, acceptance = self._move(state, temperature, step_size)
                step_size = step_size * (RATE * (acceptance.mean(0) - TARGET)).exp()
                self.advance(ADAPTING_CHAINS)
            found.append(step_size)
        return found

    def _move(self, state: _State, temperature: float, step_size: Tensor) -> tuple[_State, Tensor]:
        """A Hamiltonian move with Metropolis' test, and the probability of its acceptance, `(K, B)`."""
        # Steps of one length may bring each chain round to where it was, as on the orbits of a normal.
        jitter = JITTER + (1 - JITTER) * torch.rand_like(state.log_prior)
        step = (step_size * jitter)[..., None] * self.scale
        u, momentum = state.u, torch.randn_like(state.u)
        kinetic = momentum.square().sum(-1)
        # Position first: the densities at the start are known, and their gradients are not needed.
        u = u + 0.5 * step * momentum
        for leap in range(self.num_leapfrog):
            momentum = momentum + step * self._gradient(u, temperature)
            u = u + (step if leap < self.num_leapfrog - 1 else 0.5 * step) * momentum
        moved = _State(u, *self.space.log_densities(u))
        gain = _log_density(moved, temperature) - _log_density(state, temperature)
        log_ratio = gain - 0.5 * (momentum.square().sum(-1) - kinetic)
        # A path that has left the numbers is rejected.
        acceptance = log_ratio.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf).clamp(max=0).exp()
        accepted = torch.rand_like(acceptance) < acceptance
        return _State(
            torch.where(accepted[..., None], moved.u, state.u),
            *(torch.where(accepted, new, old) for new, old in zip(moved[1:], state[1:], strict=True)),
        ), acceptance

    def _gradient(self, u: Tensor, temperature: float) -> Tensor:
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            log_prior, log_likelihood = self.space.log_densities(u)
            return torch.autograd.grad((log_prior + temperature * log_likelihood).sum(), u)[0]


def _log_density(state: _State, temperature: float) -> Tensor:
    return state.log_prior + temperature * state.log_likelihood


def _adapting_moves(num_temperatures: int) -> int:
    """Moves at each temperature while step sizes are adapted."""
    return max(1, -(-ADAPTING_MOVES // num_temperatures))


def _chain_moves(num_temperatures: int, num_chains: int) -> int:
    """Moves of all chains together, those that adapt included."""
    return max(1, (num_temperatures - 1) * (ADAPTING_CHAINS * _adapting_moves(num_temperatures) + num_chains))


def _sigmoid_schedule(num_temperatures: int) -> list[float]:
    """Temperatures from 0 to 1, dense at both ends."""
    steps = torch.linspace(-STEEPNESS, STEEPNESS, num_temperatures + 1, dtype=torch.float64)
    values = steps.sigmoid()
    return ((values - values[0]) / (values[-1] - values[0])).tolist()


def mean_weight(log_weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The logarithm of the mean of K weights, its standard error, and their effective sample size, each `(B,)`.

    The error is that of the mean, relative to it.

    Args:
        log_weights: Tensor of shape `(K, B)`, in nats.

    Example:
        >>> [round(value.item(), 2) for value in mean_weight(torch.tensor([1.0, 3.0]).log())]
        [0.69, 0.35, 1.6]
    """
    shares = log_weights.softmax(0).square().sum(0)
    return log_mean_exp(log_weights), (shares - 1 / len(log_weights)).clamp(min=0).sqrt(), 1 / shares


def _annealed(log_weights: Tensor, acceptance: Tensor) -> Annealed:
    """What the log-weights of K chains, `(K, B)`, say."""
    num_chains = len(log_weights)
    log_evidence, error, ess = mean_weight(log_weights)
    # The relative variance of a mean of K, without bias in that of each.
    error = error * (math.sqrt(num_chains / (num_chains - 1)) if num_chains > 1 else math.nan)
    return Annealed(log_evidence, error, acceptance, ess)
