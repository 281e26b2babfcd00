"""Log-likelihood, ELBO, rate and distortion of each datum from the same particles."""

from __future__ import annotations

import math
import warnings
from functools import partial
from typing import Any, NamedTuple

import pyro
from torch import Tensor

from pyro_vae.compilation import CompiledLogProbabilities, Decision, NotCompilableError
from pyro_vae.estimators.evidence import PARTICLES_AT_ONCE, estimate_evidence
from pyro_vae.estimators.particles import LogProbabilities, log_probabilities
from pyro_vae.evaluation.batches import Gathered, checked_batches
from pyro_vae.programs import Program, undisturbed

__all__ = ["Summary", "elbo", "rate_distortion", "summarize"]

_TIMED_PASSES = 5
WORTH_COMPILING = 20.0  # seconds that all passes would take; compiling takes five or ten, and saves half of them


class Summary(NamedTuple):
    """Estimates for each datum, tensors of shape `(N,)` in nats, float64.

    Attributes:
        log_likelihood: Importance-weighted estimate of log p(x).
        elbo: Evidence lower bound, minus rate and distortion.
        rate: KL divergence from the prior to the posterior.
        distortion: Expected negative log-likelihood under the posterior.
    """

    log_likelihood: Tensor
    elbo: Tensor
    rate: Tensor
    distortion: Tensor


def summarize(
    program: Program,
    data: Any,
    num_particles: int = 5000,
    *,
    seed: int = 0,
    compile: str | bool = "auto",
    advance: Any = None,
) -> Summary:
    r"""Log-likelihood, ELBO, rate and distortion of each datum, from the same particles.

    .. math:: \log \hat p(x) = \log \tfrac1K \sum_k w_k, \quad R = \tfrac1K \sum_k \log \frac{q(z_k \mid x)}{p(z_k)},
              \quad D = -\tfrac1K \sum_k \log p(x \mid z_k), \quad \text{ELBO} = -(R + D)

    Particles are taken in passes of bounded size, with running sums, so that memory depends neither on their number
    nor on that of the data. Weights, RNG state, and train or eval mode are left as they were.

    Args:
        program: Any program that keeps its local sites in one plate named "data".
        data: Tensor, array, `Dataset` or `DataLoader`.
        num_particles: Number `K` of particles a datum.
        seed: Seed of the particles.
        compile: Whether to compile a pass: "auto" does so where all passes would take more than 20 seconds without.
            What cannot be compiled is warned of, and runs as it is.
        advance: Called with the share of the work done since the last call, for a progress bar.

    Returns:
        A `Summary`.

    Raises:
        ValueError: If `num_particles` is not positive, or the data do not suit the program.

    Reference:
        Burda, Grosse and Salakhutdinov, 2016. Importance weighted autoencoders. Alemi et al., 2018. Fixing a broken
        ELBO (rate and distortion).

    Example:
        >>> import pyro_vae
        >>> import torch
        >>> vae = pyro_vae.build((8, 8), latent=2)
        >>> summary = summarize(vae, torch.ones(3, 8, 8), num_particles=10)
        >>> bool((summary.elbo <= summary.log_likelihood).all())
        True
    """
    if num_particles < 1:
        raise ValueError(f"num_particles: expected a positive number, got {num_particles}")
    at_once = math.ceil(num_particles / math.ceil(num_particles / PARTICLES_AT_ONCE))  # passes of one size, or nearly
    batches = checked_batches(program, data, at_once)
    draw = _Passes(program, at_once, batches.batch_size, compile)
    gathered = Gathered()
    with undisturbed(program, seed), pyro.validation_enabled(False):
        draw.remaining = len(batches) * math.ceil(num_particles / at_once)
        for batch in batches.epoch(0):
            found = estimate_evidence(
                program.model,
                program.guide,
                *batch,
                num_particles=num_particles,
                at_once=at_once,
                draw=draw,
                advance=part_of(advance, len(batch[0]) / batches.num_data),
            )
            elbo = -(found.rate + found.distortion)
            gathered.add(found.log_evidence, elbo, found.rate, found.distortion)
    return Summary(*gathered.tensors())


class _Passes:
    """Passes of particles, compiled where they are told to be, or where it pays."""

    def __init__(self, program: Program, num_particles: int, batch_size: int, compile: str | bool):
        self.program, self.num_particles, self.batch_size = program, num_particles, batch_size
        self.remaining = 0
        self._is_to_be_compiled = Decision(compile, WORTH_COMPILING, _TIMED_PASSES)
        self._draw: Any = partial(log_probabilities, program.model, program.guide)

    def __call__(self, *batch: Tensor, num_particles: int) -> LogProbabilities:
        whole = num_particles == self.num_particles and len(batch[0]) == self.batch_size
        if self._is_to_be_compiled(self.remaining, whole):
            try:
                self._draw = CompiledLogProbabilities(self.program, batch, num_particles)
            except NotCompilableError as error:
                warnings.warn(f"the passes are not compiled: {error}; they run as they are, slower", stacklevel=5)
        self.remaining -= 1
        return self._draw(*batch, num_particles=num_particles)


def part_of(advance: Any, share: float) -> Any:
    """What a part of the work calls with its own progress."""
    return None if advance is None else lambda done: advance(share * done)


def elbo(program: Program, data: Any, num_particles: int = 1, *, seed: int = 0) -> Tensor:
    r"""The evidence lower bound of each datum, with beta = 1.

    .. math:: \text{ELBO} = \tfrac1K \sum_k \log p(x, z_k) - \log q(z_k \mid x), \quad z_k \sim q(z \mid x)

    Args:
        program: Any program that keeps its local sites in one plate named "data".
        data: Tensor, array, `Dataset` or `DataLoader`.
        num_particles: Number `K` of particles a datum.
        seed: Seed of the particles.

    Returns:
        A tensor of shape `(N,)`, in nats, float64.

    Raises:
        ValueError: If `num_particles` is not positive, or the data do not suit the program.

    Reference:
        Kingma and Welling, 2014. Auto-encoding variational Bayes.

    Example:
        >>> import pyro_vae
        >>> import torch
        >>> elbo(pyro_vae.build((8, 8), latent=2), torch.ones(3, 8, 8)).shape
        torch.Size([3])
    """
    return summarize(program, data, num_particles, seed=seed).elbo


def rate_distortion(program: Program, data: Any, num_particles: int = 1, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    r"""Rate and distortion of each datum; their sum is minus the ELBO.

    .. math:: R = E_q[\log q(z \mid x) - \log p(z)], \qquad D = -E_q[\log p(x \mid z)]

    Args:
        program: Any program that keeps its local sites in one plate named "data".
        data: Tensor, array, `Dataset` or `DataLoader`.
        num_particles: Particles a datum in the Monte Carlo estimate of both.
        seed: Seed of the particles.

    Returns:
        Two tensors of shape `(N,)`, in nats, float64.

    Raises:
        ValueError: If `num_particles` is not positive, or the data do not suit the program.

    Reference:
        Alemi et al., 2018. Fixing a broken ELBO.

    Example:
        >>> import pyro_vae
        >>> import torch
        >>> rate, distortion = rate_distortion(pyro_vae.build((8, 8), latent=2), torch.ones(3, 8, 8))
        >>> rate.shape
        torch.Size([3])
    """
    summary = summarize(program, data, num_particles, seed=seed)
    return summary.rate, summary.distortion
