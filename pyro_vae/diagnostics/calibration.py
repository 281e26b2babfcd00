"""Whether the guide is calibrated: ranks of latents among its draws, on data simulated from the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.diagnostics.verdict import Verdict, holm
from pyro_vae.estimators.particles import given, local_sites
from pyro_vae.estimators.terminal import progress_bar
from pyro_vae.evaluation import checked_batches, posterior_draws, prior_draws
from pyro_vae.evaluation.draws import check_observed, check_whole
from pyro_vae.programs import Program, num_inputs, placement, undisturbed

__all__ = ["Calibration", "calibration"]

FEWEST_SIMULATIONS = 300  # of a scale that is off by a quarter, these find nine in ten, and fewer find fewer
FEWEST_DRAWS = 20  # which find it in eight of ten, 5 in four; of one, ranks are uniform at any scale
SMALLEST_TAIL = 1e-13
REJECTED = 0.05  # family-wise level: how often an exact posterior is rejected


@dataclass(frozen=True)
class Calibration:
    """What `calibration` found; tensors are on the CPU.

    Attributes:
        names: The latent dimensions, such as "z[0]", `D` of them.
        ranks: How many of the S draws from the guide lie below the latent that the data came from, an integer tensor of
            shape `(num, D)` with values from 0 to S.
        num_samples: Number `S` of draws.
        p_values: Of each dimension, of shape `(D,)`, float64: the chance that exact ranks leave the uniform
            distribution as far as these. Not corrected for there being several dimensions.
        lower: Band of 95 % for the share of ranks up to 0, 1, ..., S - 1, of shape `(S,)`, float64. It is simultaneous
            over ranks and (by Bonferroni's bound) over dimensions.
        upper: Its upper end.
    """

    names: tuple[str, ...]
    ranks: Tensor
    num_samples: int
    p_values: Tensor
    lower: Tensor
    upper: Tensor

    @property
    def ecdf(self) -> Tensor:
        """Share of ranks up to 0, 1, ..., S - 1, of shape `(S, D)`, float64."""
        return _counts(self.ranks, self.num_samples) / len(self.ranks)

    @property
    def smallest_p_value(self) -> float:
        """The smallest of the p-values."""
        return self.p_values.min().item()

    @property
    def rejected(self) -> Tensor:
        """Which dimensions are not calibrated, of shape `(D,)`, by Holm's method at a family-wise level of 0.05."""
        return holm(self.p_values) <= REJECTED

    @property
    def shapes(self) -> list[str]:
        """What is off in each dimension, if anything is: the guide is too narrow, too wide, too low or too high."""
        num, values = len(self.ranks), self.num_samples + 1
        centred = (self.ranks.double() + 0.5) / values - 0.5
        variance = (1 - values**-2) / 12
        moments = {
            ("too high", "too low"): centred.mean(0) / math.sqrt(variance / num),
            ("too wide", "too narrow"): (centred.square().mean(0) - variance) / math.sqrt(1 / 180 / num),
        }
        stacked = torch.stack(list(moments.values()))
        which = stacked.abs().argmax(0).tolist()
        words = list(moments)
        return [words[row][int(stacked[row, column] > 0)] for column, row in enumerate(which)]

    @property
    def verdict(self) -> Verdict:
        """Holds where no dimension is rejected; None where too few data, or draws for each, can show what would be."""
        off = [int(i) for i in self.p_values.argsort() if self.rejected[i]]
        smallest = self.smallest_p_value
        shown = f"{smallest:.2g}" if smallest > 1e-10 else "below 1e-10"
        of = f"smallest p-value {shown}, {len(self.ranks)} simulations"
        if off:
            worst = ", ".join(f"{self.names[i]} {self.shapes[i]}" for i in off[:3]) + (", ..." if len(off) > 3 else "")
            found = f"{len(off)} of {len(self.names)} latent dimensions are off ({worst}); {of}"
            return Verdict(False, found, self._advice([self.shapes[i] for i in off]))
        found = f"none of {len(self.names)} latent dimensions is seen to be off; {of}"
        if len(self.ranks) < FEWEST_SIMULATIONS:
            return Verdict(None, found, f"at least {FEWEST_SIMULATIONS} simulations")
        if self.num_samples < FEWEST_DRAWS:
            found += f"; ranks among {self.num_samples} draws hardly show a scale that is off"
            return Verdict(None, found, f"num_samples={FEWEST_DRAWS} or more")
        return Verdict(True, found)

    @staticmethod
    def _advice(shapes: list[str]) -> str:
        most = max(dict.fromkeys(shapes), key=shapes.count)
        if most == "too narrow":
            return "a richer posterior (Flow, FullNormal), or an estimator of many particles (IWAE, DReG)"
        return "longer training, a larger encoder, SemiAmortized, or training on draws from the model as well"


def calibration(
    program: Program,
    num: int = 1000,
    num_samples: int = 100,
    *,
    like: Any = None,
    seed: int = 0,
    progress: bool = True,
) -> Calibration:
    r"""Simulation-based calibration of the amortized posterior, in each latent dimension.

    .. math:: z_n \sim p(z), \quad x_n \sim p(x \mid z_n), \quad z_{ns} \sim q(z \mid x_n), \qquad
              r_n = \#\{s : z_{ns} < z_n\}

    If the guide is the posterior, the rank of the latent that a datum came from, among draws from the guide, is uniform
    on 0, 1, ..., S. Ranks pile up at both ends where the guide is too narrow, in the middle where it is too wide, and
    at one end where it is too low or too high. Ties (of discrete latents) are broken at random.

    The p-value of a dimension is that of the smallest pointwise binomial tail of the counts
    :math:`\#\{n : r_n \le i\}`, exact for discrete ranks. With 1000 simulations of one dimension, a scale that is off
    by a quarter is practically always found, one that is off by a tenth in three cases of four.

    The data are the model's own. Passing says nothing of real data that the model does not describe; and a guide that
    was fitted to real data alone may fail on simulated ones that are unlike these, though it serves the real ones well.
    Calibration is one of the average over data, in each dimension by itself: errors that cancel, or of correlations
    alone, are not seen.

    Global latents are drawn once from the guide, and simulation and guide are given these. Data are taken in chunks of
    bounded size; what is kept are the ranks.

    Args:
        program: Any program whose observed site is "x", or whose sites "x.<part>" hold its columns in order.
        num: Number of data to simulate.
        num_samples: Number `S` of draws from the guide for each; below 20 no guide is said to be calibrated.
        like: Data (tensor, array, `Dataset` or `DataLoader`) whose shape, and companions such as an exposure, the
            simulated data have, rows in turn; None takes the shape from `program.likelihood.event_shape`.
        seed: Seed of all random numbers.
        progress: Whether to show a progress bar past two seconds.

    Returns:
        A `Calibration`.

    Raises:
        ValueError: If a number is not a positive whole one, `like` is needed or does not suit the program, or a draw is
            not finite.

    Reference:
        Talts, Betancourt, Simpson, Vehtari and Gelman, 2018. Validating Bayesian inference algorithms with
        simulation-based calibration. Säilynoja, Bürkner and Vehtari, 2022. Graphical test for discrete uniformity and
        its applications in goodness-of-fit evaluation and multiple sample comparison.

    Example:
        >>> import pyro_vae
        >>> found = calibration(pyro_vae.build((8, 8), latent=2), num=50, num_samples=20)
        >>> found.names, found.ranks.shape, found.p_values.shape
        (('z[0]', 'z[1]'), torch.Size([50, 2]), torch.Size([2]))
    """
    check_whole(1, num=num, num_samples=num_samples)
    with undisturbed(program, seed), pyro.validation_enabled(False), progress_bar(1, progress) as begin:
        like = _like(program) if like is None else like
        advance = begin("calibration")
        parts: list[Tensor] = []
        for part in _ranks(program, like, num, num_samples):
            parts.append(part[1])
            advance(len(part[1]) / num)
        names, ranks = part[0], torch.cat(parts)
        p_values, (lower, upper) = uniformity(ranks, num_samples), band(num, num_samples, REJECTED / ranks.shape[1])
    return Calibration(names, ranks, num_samples, p_values, lower, upper)


def _like(program: Program) -> Tensor:
    """Data of the shape that the program's likelihood has, simulated, so that they are within its support."""
    shape = getattr(getattr(program, "likelihood", None), "event_shape", None)
    if shape is None or num_inputs(program) != 1:
        raise ValueError(
            f"{type(program).__name__}: expected a program of x alone with program.likelihood.event_shape, or like=; "
            "pass data of the shape that it takes, like=x"
        )
    device, dtype = placement(program)
    return prior_draws(program, torch.zeros(100, *shape, device=device, dtype=dtype), num_samples=1)[1][0]


def _ranks(program: Program, like: Any, num: int, num_samples: int) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """Names of the latent dimensions, and the ranks in each, of chunks of simulated data."""
    batches, left, shared = checked_batches(program, like, num_samples), num, None
    while left:
        for batch in batches.epoch(0):
            if shared is None:
                first = posterior_draws(program, *batch, num_samples=1)
                check_observed(first.log_likelihood)  # what else is observed would tell of z, which is drawn without it
                shared = first.shared
            batch = tuple(item[:left] if isinstance(item, Tensor) else item for item in batch)
            latents, x = prior_draws(program, *batch, num_samples=1, shared=shared)
            draws = guide_draws(program, (x[0], *batch[1:]), num_samples, shared)
            if draws.keys() != latents.keys():
                raise ValueError(f"expected a guide with the model's latents {sorted(latents)}, got {sorted(draws)}")
            names, truths = scalars(latents)
            drawn = scalars({name: draws[name] for name in latents})[1]
            _check_finite(names, truths, "prior")
            _check_finite(names, drawn, "guide")
            yield names, _rank(truths[0], drawn)
            left -= len(x[0])
            if not left:
                return


def _check_finite(names: Sequence[str], draws: Tensor, source: str) -> None:
    """Raise where a draw is not finite: it has no rank."""
    off = (~draws.isfinite()).flatten(0, 1).any(0).nonzero().flatten().tolist()
    if off:
        raise ValueError(
            f"calibration: expected finite draws from the {source}, got infinite ones or NaN in {names[off[0]]}, of "
            "data that the model draws; look for parameters that are not finite, and for a likelihood that overflows"
        )


def guide_draws(
    program: Program, batch: tuple[Any, ...], num_samples: int, shared: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Draw local latents from the guide alone: the model, which would cost most, is not run.

    Args:
        program: Any program that keeps its local sites in one plate named "data".
        batch: What model and guide take.
        num_samples: Number `S` of draws for each datum.
        shared: Global latents that were drawn before, by site.

    Returns:
        Latents by site, of shape `(S, B, *event_shape)`.

    Example:
        >>> import pyro_vae
        >>> guide_draws(pyro_vae.build((8, 8), latent=2), (torch.ones(3, 8, 8),), 5, {})["z"].shape
        torch.Size([5, 3, 2])
    """
    plate: Callable = pyro.plate("samples", num_samples, dim=-2)
    trace: Any = poutine.trace(given(plate(program.guide), shared)).get_trace(*batch)
    return {
        site["name"]: site["value"].expand(num_samples, len(batch[0]), *site["fn"].event_shape)
        for site in local_sites(trace, observed=False)
    }


def scalars(latents: Mapping[str, Tensor]) -> tuple[tuple[str, ...], Tensor]:
    """The latents of all sites side by side, each scalar dimension with its name.

    Args:
        latents: Latents by site, of shape `(S, B, *event_shape)`.

    Returns:
        Names, such as "z[0]", and a tensor of shape `(S, B, D)`, float64, on the CPU.

    Example:
        >>> scalars({"a": torch.zeros(5, 3), "b": torch.zeros(5, 3, 1, 2)})[0]
        ('a', 'b[0,0]', 'b[0,1]')
    """
    names, parts = [], []
    for name, value in latents.items():
        shape = value.shape[2:]
        indices = torch.cartesian_prod(*map(torch.arange, shape)).reshape(-1, len(shape)).tolist() if shape else [[]]
        names += [f"{name}[{','.join(map(str, index))}]" if index else name for index in indices]
        parts.append(value.reshape(*value.shape[:2], -1).cpu().double())
    return tuple(names), torch.cat(parts, -1)


def _rank(truth: Tensor, draws: Tensor) -> Tensor:
    """Ranks of values of shape `(B, D)` among draws of shape `(S, B, D)`."""
    below, same = (draws < truth).sum(0), (draws == truth).sum(0)
    return below + (torch.rand(same.shape, dtype=torch.float64) * (same + 1)).long()


def _counts(ranks: Tensor, num_samples: int) -> Tensor:
    """How many ranks are at most 0, 1, ..., S - 1, of shape `(S, D)`, float64."""
    counts = torch.zeros(num_samples + 1, ranks.shape[1], dtype=torch.float64)
    counts.scatter_add_(0, ranks, torch.ones(ranks.shape, dtype=torch.float64))
    return counts.cumsum(0)[:-1]


def uniformity(ranks: Tensor, num_samples: int) -> Tensor:
    r"""The p-value of each dimension's ranks, under uniformity on 0, 1, ..., S.

    .. math:: \gamma = \min_i \min(P(C_i \le c_i), P(C_i \ge c_i)), \quad C_i \sim \text{Binomial}(N, (i+1)/(S+1)),
              \qquad p = P(\Gamma \le \gamma)

    where :math:`c_i` counts the ranks up to i.

    Args:
        ranks: Integer tensor of shape `(N, D)`.
        num_samples: Number `S` of draws.

    Returns:
        A tensor of shape `(D,)`, float64.

    Example:
        >>> uniformity(torch.tensor([[0, 3], [1, 3], [2, 3]]), 3)
        tensor([0.8125, 0.0312], dtype=torch.float64)
    """
    from scipy.stats import binom

    num, counts = len(ranks), _counts(ranks, num_samples).numpy()
    shares = _shares(num_samples)[:, None]
    tails = np.minimum(binom.cdf(counts, num, shares), binom.sf(counts - 1, num, shares)).min(0)
    return torch.tensor([_p_value(tail, num, num_samples) for tail in tails], dtype=torch.float64)


def band(num: int, num_samples: int, level: float) -> tuple[Tensor, Tensor]:
    """Between which shares of N uniform ranks are up to 0, 1, ..., S - 1, all of them, but for a chance of `level`.

    Returns:
        Two tensors of shape `(S,)`, float64.

    Example:
        >>> lower, upper = band(1000, 3, level=0.05)
        >>> lower.tolist(), upper.tolist()
        ([0.219, 0.463, 0.718], [0.282, 0.537, 0.781])
    """
    low, high = 0.0, level  # the tail that is the level itself is that of one point alone
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if _p_value(middle, num, num_samples) <= level else (low, middle)
    least, most = _limits(low, num, num_samples)
    return torch.as_tensor(least / num), torch.as_tensor(most / num)


def _shares(num_samples: int) -> Any:
    return np.arange(1, num_samples + 1) / (num_samples + 1)


def _limits(tail: float, num: int, num_samples: int) -> tuple[Any, Any]:
    """The least and most counts at each rank whose binomial tails are above `tail`."""
    from scipy.stats import binom

    above = tail * (1 + 1e-9)  # a tail that some count has, up to rounding, is not above itself
    least = binom.ppf(above, num, _shares(num_samples)).clip(0)
    return least, num - least[::-1]  # as counts from above are counts from below, mirrored


def _p_value(tail: float, num: int, num_samples: int) -> float:
    """The chance that the counts of N uniform ranks leave the limits of this tail somewhere.

    Counts of each rank are independent Poisson numbers, given that their sum is N: so a walk with Poisson steps, of
    which at each rank what is outside of the limits is lost, gives the chance to stay.
    """
    from scipy.stats import poisson

    if tail < SMALLEST_TAIL:
        return 2 * num_samples * tail  # a bound, as a difference from 1 would be lost in rounding
    least, most = (limit.astype(int) for limit in _limits(tail, num, num_samples))
    steps = poisson.pmf(np.arange(num + 1), num / (num_samples + 1))
    inside, first = np.ones(1), 0  # chances of the counts first, first + 1, ...
    for low, high in zip([*least, num], [*most, num], strict=True):
        if low > high:  # one tail or the other of each count is that small
            return 1.0
        inside = np.convolve(inside, steps[: high - first + 1])[low - first : high - first + 1]
        first = low
    stays = inside[0] / poisson.pmf(num, num)
    return float(min(max(1 - stays, tail), 1.0))
