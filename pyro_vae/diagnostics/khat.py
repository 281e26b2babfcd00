"""Whether the guide can stand in for the posterior, datum by datum: how heavy a tail its importance weights have."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_vae.diagnostics.verdict import Verdict
from pyro_vae.estimators.evidence import PARTICLES_AT_ONCE
from pyro_vae.estimators.terminal import progress_bar
from pyro_vae.evaluation import Gathered, checked_batches, posterior_draws
from pyro_vae.evaluation.draws import check_whole
from pyro_vae.programs import Program, undisturbed

__all__ = ["KHat", "khat"]

TRUSTED = 0.7  # shape of a tail, above which weights miss much of what they are a mean of (the reference)
TOLERATED_SHARE = 0.1  # of the data; the reference judges one posterior, and is silent on how many of many may fail
FEWEST_PARTICLES = 25  # of which a fifth is the tail, and the fit needs five
NOTHING = 1e-100  # of the largest weight; the fit divides by such numbers
ROUNDING = 32  # units of the last place of the log-probabilities that a log-weight is the sum of
COARSE = 0.1  # nats of rounding, above which weights that differ by no more are not known to be the same


@dataclass(frozen=True)
class KHat:
    """What `khat` found; tensors are float64, on the CPU.

    Attributes:
        khat: Shape of the tail of each datum's weights, of shape `(N,)`, without units. Minus infinity where the
            largest weights are all the same, as at an exact posterior; infinity where the others vanish beside a few;
            NaN where too few of the largest differ for a fit, where rounding hides whether they do, or a weight is not
            a number.
        ess: Effective sample size of each datum's K smoothed weights, of shape `(N,)`.
        num_particles: Number `K` of weights a datum.
        threshold: What a shape may be at most.
    """

    khat: Tensor
    ess: Tensor
    num_particles: int
    threshold: float

    @property
    def share(self) -> float:
        """Share of the data whose shape is above the threshold; one that could not be told counts as not above."""
        return (self.khat > self.threshold).double().mean().item()

    @property
    def quantiles(self) -> dict[float, float]:
        """Quantiles of the shapes over the data that have one: 5, 25, 50, 75 and 95 %."""
        known = self.khat[~self.khat.isnan()]
        if not len(known):
            known = self.khat[:1]
        # Those of one or another datum: between a number and infinity there is no quantile.
        return {q: known.quantile(q, interpolation="lower").item() for q in (0.05, 0.25, 0.5, 0.75, 0.95)}

    @property
    def verdict(self) -> Verdict:
        """Holds where at most 10 % of the data have a shape above the threshold."""
        unknown = self.khat.isnan().double().mean().item()
        found = (
            f"k-hat above {self.threshold:.2f} in {self.share:.0%} of {len(self.khat)} data, median "
            f"{self.quantiles[0.5]:.2f}; median effective sample {self.ess.nanmedian():.0f} of {self.num_particles}"
        )
        if unknown > 0:
            found += f"; no k-hat in {unknown:.0%}"
        if self.share > TOLERATED_SHARE:
            advice = "a richer posterior (Flow, FullNormal), or longer training: inference_gap tells which"
            return Verdict(False, found, advice)
        if unknown > TOLERATED_SHARE:
            return Verdict(None, found, "more particles; of discrete latents, judge by the effective sample size")
        return Verdict(True, found)


def khat(
    program: Program,
    x: Any,
    num_particles: int = 1000,
    *,
    threshold: float = TRUSTED,
    seed: int = 0,
    progress: bool = True,
) -> KHat:
    r"""Shape of the tail of each datum's importance weights, by a generalized Pareto fit to the largest of them.

    .. math:: w_{kb} = \frac{p(x_b, z_{kb})}{q(z_{kb} \mid x_b)}, \quad z_{kb} \sim q(z \mid x_b), \qquad
              P(w_b > t) \sim t^{-1/k_b}

    Weights with a shape :math:`k` have :math:`1/k` finite moments. Below 0.7 importance sampling corrects the guide at
    a number of particles that one can afford; above, the guide misses a part of the posterior, and neither its draws
    nor those reweighted can be trusted for that datum. K weights resolve a shape up to :math:`1 - 1/\log_{10} K`, and
    where that is less, it is the threshold. A guide that is too wide has bounded weights and a negative shape: that is
    safe, though it may cost much of the effective sample. The more latent dimensions, the more errors add up, and a
    good guide of fifty may well fail. Of a mode where no particle has been the weights know nothing.

    Weights are taken datum by datum: one joint weight of all data would degenerate by their number alone. Global
    latents are drawn once from the guide, and the weights are given these. Only the K weights of each datum of a chunk
    are held at once, and particles pass in parts of bounded size, so that memory follows K and not the data.

    Args:
        program: Any program that keeps its local sites in one plate named "data".
        x: Tensor, array, `Dataset` or `DataLoader`.
        num_particles: Number `K` of particles a datum, at least 25; from 2154 on the threshold is 0.7.
        threshold: What a shape may be at most, if K weights resolve it.
        seed: Seed of the particles.
        progress: Whether to show a progress bar past two seconds.

    Returns:
        A `KHat`.

    Raises:
        ValueError: If there are too few particles, the threshold is not a number, or the data do not suit the program.

    Reference:
        Vehtari, Simpson, Gelman, Yao and Gabry, 2024. Pareto smoothed importance sampling. Yao, Vehtari, Simpson and
        Gelman, 2018. Yes, but did it work? Evaluating variational inference.

    Example:
        >>> import pyro_vae
        >>> found = khat(pyro_vae.build((8, 8), latent=2), torch.ones(3, 8, 8), num_particles=100)
        >>> found.khat.shape, found.threshold
        (torch.Size([3]), 0.5)
    """
    check_whole(FEWEST_PARTICLES, num_particles=num_particles)
    if math.isnan(threshold):
        raise ValueError("threshold: expected a number, got nan")
    batches = checked_batches(program, x, min(num_particles, PARTICLES_AT_ONCE))
    gathered, shared = Gathered(), None
    with undisturbed(program, seed), pyro.validation_enabled(False), progress_bar(1, progress) as begin:
        advance = begin("k-hat")
        for batch in batches.epoch(0):
            if shared is None:
                shared = posterior_draws(program, *batch, num_samples=1).shared
            gathered.add(*pareto_shapes(*_log_weights(program, batch, num_particles, shared)))
            advance(len(batch[0]) / batches.num_data)
    shapes, sizes = gathered.tensors()
    return KHat(shapes, sizes, num_particles, largest_shape(num_particles, threshold))


def largest_shape(num_weights: int, threshold: float = TRUSTED) -> float:
    """The threshold of a shape, or what so many weights resolve, if that is less.

    Example:
        >>> largest_shape(100), largest_shape(10_000)
        (0.5, 0.7)
    """
    return min(threshold, 1 - 1 / math.log10(num_weights))


def _log_weights(
    program: Program, batch: tuple[Any, ...], num_particles: int, shared: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Log-weights of shape `(K, B)`, and the size of the rounding errors in each of them."""
    parts = []
    for first in range(0, num_particles, PARTICLES_AT_ONCE):
        k = min(PARTICLES_AT_ONCE, num_particles - first)
        draws = posterior_draws(program, *batch, num_samples=k, shared=shared)
        parts.append(summed(draws.log_prior, *draws.log_likelihood.values(), -draws.log_posterior))
    log_weights, rounding = map(torch.cat, zip(*parts, strict=True))
    return log_weights, rounding


def summed(*terms: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of log-probabilities in float64 on the CPU, and how much of each may be their rounding.

    Example:
        >>> log_weights, rounding = summed(torch.tensor([1e8]), torch.tensor([-1e8]))
        >>> log_weights.item(), rounding.item() > 100
        (0.0, True)
    """
    exact = torch.stack([term.detach().cpu().double() for term in terms])  # what is left of large terms is small
    return exact.sum(0), ROUNDING * torch.finfo(terms[0].dtype).eps * exact.abs().sum(0)


def pareto_shapes(log_weights: Tensor, rounding: Tensor) -> tuple[Tensor, Tensor]:
    """Shape of the tail, and effective sample size of the smoothed weights, of each datum.

    Args:
        log_weights: Tensor of shape `(K, B)`, in nats, float64, on the CPU.
        rounding: Tensor of shape `(K, B)`, or `(B,)` if it is that of all draws: log-weights that differ by less are
            the same. Only that of the largest counts: one draw at which the density is nothing says nothing of them.

    Returns:
        Two tensors of shape `(B,)`.

    Example:
        >>> shapes, sizes = pareto_shapes(torch.zeros(100, 2, dtype=torch.float64), torch.zeros(2))
        >>> shapes.tolist(), sizes.round().tolist()
        ([-inf, -inf], [100.0, 100.0])
    """
    from arviz_stats.base import array_stats

    smoothed, shapes = log_weights.log_softmax(0), torch.full(log_weights.shape[1:], math.nan, dtype=torch.float64)
    tail, cutoff = _tail(log_weights)
    rounding = torch.where(log_weights >= cutoff, rounding, 0).amax(0)
    # What the fit scales by is how far the lower quarter of the tail is above the rest: nothing, where there are ties.
    quarter = tail[int(len(tail) / 4 + 0.5) - 1]
    same, tied = tail[-1] - tail[0] <= rounding, ~(quarter - cutoff > rounding)
    drowned = (quarter - tail[-1]).exp() < NOTHING
    valid = ~log_weights.isnan().any(0) & tail[-1].isfinite()
    shapes[valid & drowned & ~tied] = math.inf
    shapes[valid & same & (rounding <= COARSE)] = -math.inf
    fitted = valid & ~same & ~tied & ~drowned
    if fitted.any():
        # The signs are those of leave-one-out, of whose weights it takes the negative logarithms.
        weights, found = array_stats.psislw(-log_weights[:, fitted].T.numpy(), axis=-1)
        smoothed[:, fitted] = torch.as_tensor(weights).T
        shapes[fitted] = torch.as_tensor(found)
    return shapes, (-(2 * smoothed).logsumexp(0)).exp()


def _tail(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """The largest weights, in order, as many as are fitted, and the largest of the others."""
    particles = len(log_weights)
    size = int(3 * math.sqrt(particles)) if particles > 225 else particles // 5
    ordered = log_weights.sort(0).values
    return ordered[-size:], ordered[-size - 1]
