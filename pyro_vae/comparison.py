"""Programs side by side, by the evidence of data that none of them has seen."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.utils.data import TensorDataset

from pyro_vae.data import InMemory, as_source
from pyro_vae.diagnostics import Verdict
from pyro_vae.diagnostics.predictive import kind_of_values
from pyro_vae.estimators.evidence import PARTICLES_AT_ONCE, estimate_evidence
from pyro_vae.estimators.particles import local_sites
from pyro_vae.estimators.terminal import progress_bar
from pyro_vae.evaluation import annealed_log_likelihood, checked_batches
from pyro_vae.evaluation.summary import part_of
from pyro_vae.programs import Program, num_inputs, undisturbed

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

__all__ = ["ConditionalLOO", "ModelComparison", "loo", "models"]

CHAINS = 16  # of annealed importance sampling, by default
LOW_ESS = 10  # of a datum's weights: below, their mean is that of a few, and the error itself cannot be trusted
LOW_SHARE = 0.05  # of the data may have a low one
MORE = {"importance": 'more num_particles, or method="ais"', "ais": "more num_temperatures"}  # what weights ask for
NEGLIGIBLE = 4.0  # nats over all data, below which errors of a difference are not to be trusted (Sivula et al., 2025)


@dataclass(frozen=True)
class ModelComparison:
    """What `models` found.

    Attributes:
        pointwise: A `Dataset` with dimensions `model` and `datum`: `log_evidence` and `error`, its Monte Carlo standard
            error, in nats, and `ess`, the effective sample size of the datum's weights.
        table: One row a program, the best first, in nats over all N data (divide by N for nats per datum), as
            `arviz_stats.compare` gives it: `rank`, `elpd` (the log evidence), `p` (NaN, as nothing was fitted to these
            data), `elpd_diff` (how far behind the best), `weight` (of stacking), `se`, `dse` (of the difference, over
            paired data), `warning` (effective sample sizes are low); and `mc_se` and `mc_dse`, Monte Carlo standard
            errors of elpd and difference, `mc_bias`, by how much elpd is too low, about, and `low_ess`, the share of
            data with a low effective sample size.
    """

    pointwise: xr.Dataset
    table: pd.DataFrame

    @property
    def verdict(self) -> Verdict:
        """Holds where the first program is ahead of each other one; None where one may be as good.

        Ahead is a difference beyond the 97.5 % quantile of Student's t, in standard errors of data and Monte Carlo
        together, when what the other's estimate is too low by is taken off, and above 4 nats over all data. An estimate
        with low effective sample sizes may be too low by any amount, and then nothing can be told.
        """
        from scipy.stats import t

        num_data, best, rest = self.pointwise.sizes["datum"], self.table.iloc[0], self.table.iloc[1:]
        if num_data < 2:
            return Verdict(None, "one datum has no standard error", "more data")
        error = (rest.dse**2 + rest.mc_dse**2) ** 0.5
        ahead = (
            (rest.elpd_diff - rest.mc_bias > t.ppf(0.975, num_data - 1) * error)
            & (rest.elpd_diff > NEGLIGIBLE)
            & ~rest.warning
        )
        shown = rest.index[0] if ahead.all() else rest.index[~ahead][0]
        difference, its_error = rest.elpd_diff[shown] / num_data, error[shown] / num_data
        finding = f"{best.name} is ahead of {shown} by {difference:.3f} ± {its_error:.3f} nats per datum"
        if ahead.all():
            return Verdict(True, f"{finding}, and of all {len(rest)} others" if len(rest) > 1 else finding)
        if len(untold := list(rest.index[~ahead])) > 1:
            finding += f", and may be as good as {', '.join(map(str, untold))}"
        if rest.warning[~ahead].any():
            low = f"{rest.low_ess[~ahead].max():.0%} of the data have weights of low effective size"
            return Verdict(None, f"{finding}; {low}", MORE[self.pointwise.attrs["method"]])
        return Verdict(None, finding, "more data, or the simpler program")


def models(
    programs: Mapping[str, Program],
    x_test: Any,
    num_particles: int | None = None,
    *,
    method: Literal["importance", "ais"] = "importance",
    num_temperatures: int = 300,
    seed: int = 0,
    progress: bool = True,
) -> ModelComparison:
    r"""Compare programs by the log evidence of held-out data, datum by datum.

    .. math:: \text{elpd} = \sum_n \log \hat p(x_n), \qquad
              \text{elpd\_diff} = \sum_n d_n, \quad d_n = \log \hat p_\text{best}(x_n) - \log \hat p(x_n), \qquad
              \text{dse} = \sqrt{N \operatorname{Var}_n d_n}

    The evidence is that of each datum with its latents integrated out, given the weights of the decoder (and draws of
    global latents from the guide). It is no leave-one-out estimate, for which see `loo`: the data must be such that no
    program was fitted to, or stopped by. An estimate by importance sampling is too low in expectation, by some half the
    square of its error, and by more where the guide misses a part of the posterior: low effective sample sizes are
    warned of.

    Memory holds the data, and particles are taken in passes of bounded size. All programs take the same data: those
    that are drawn anew each time (dynamic binarization, say) are drawn once. Each uses the same seed.

    Args:
        programs: Two or more programs by name, each of any kind that keeps its local sites in a plate named "data".
        x_test: Tensor, array, `Dataset` or `DataLoader` of N held-out data.
        num_particles: Number of weights a datum: particles, or annealed chains. None is 1,000 particles, or 16 chains.
        method: "importance", or "ais" for annealed importance sampling (see `evaluation.annealed_log_likelihood`).
        num_temperatures: Number of steps of annealed chains.
        seed: Seed of the particles or chains.
        progress: Whether to show a progress bar past two seconds.

    Returns:
        A `ModelComparison`. Its `table` is what `arviz_plots.plot_compare` takes.

    Raises:
        ValueError: If there are fewer than two programs, some give probabilities and others densities of the data, or
            they observe different numbers of values; if data are impossible under one, or do not suit it.

    Warns:
        UserWarning: If the weights of more than 5 % of the data have an effective sample size below 10 (below a quarter
            of the weights, if these are fewer than 40).

    Reference:
        Vehtari, Gelman and Gabry, 2017. Practical Bayesian model evaluation using leave-one-out cross-validation and
        WAIC (standard errors of differences). Yao et al., 2018. Using stacking to average Bayesian predictive
        distributions. Sivula et al., 2025. Uncertainty in Bayesian leave-one-out cross-validation based model
        comparison.

    Example:
        >>> import pyro_vae
        >>> programs = {f"{latent} latents": pyro_vae.build((8, 8), latent=latent) for latent in (2, 3)}
        >>> found = models(programs, torch.rand(20, 8, 8).round())
        >>> found.pointwise.log_evidence.shape, found.table["rank"].tolist()
        ((2, 20), [0, 1])
    """
    if len(programs) < 2:
        raise ValueError(f"models: expected two or more programs, got {len(programs)}")
    if method not in ("importance", "ais"):
        raise ValueError(f'method: expected "importance" or "ais", got {method!r}')
    if num_particles is None:
        num_particles = CHAINS if method == "ais" else 1000
    if num_particles < 1:
        raise ValueError(f"num_particles: expected a positive number, got {num_particles}")
    data = _fixed(programs, x_test, seed)
    _check_measures({name: _measure(program, data) for name, program in programs.items()})
    estimate = partial(_annealed, num_temperatures=num_temperatures) if method == "ais" else _importance
    rows = []
    with progress_bar(len(programs), progress) as begin:
        for name, program in programs.items():
            rows.append(estimate(program, data, num_particles, seed, begin(name)))
            _check_finite(name, rows[-1][0])
    pointwise = _dataset(list(programs), rows)
    pointwise.attrs = {"method": method, "num_particles": num_particles, "seed": seed}
    return ModelComparison(pointwise, _table(pointwise))


def _fixed(programs: Mapping[str, Program], data: Any, seed: int) -> Any:
    """The data in one order, with all that is random in them drawn once."""
    source = as_source(data)
    if isinstance(source, InMemory):
        return source.frozen(seed)
    program = max(programs.values(), key=num_inputs)
    batches = checked_batches(program, source, 1)
    with undisturbed(program, seed):
        columns = zip(*batches.epoch(0), strict=True)
        return TensorDataset(*(torch.cat([part.cpu() for part in column]) for column in columns))


def _measure(program: Program, data: Any) -> list[bool]:
    """Of each value of a datum, whether it has a probability, and not a density."""
    with undisturbed(program), pyro.validation_enabled(False):
        batch = next(checked_batches(program, data, 1).epoch(0))
        guide: Any = poutine.trace(program.guide).get_trace(*batch)
        model: Any = poutine.trace(poutine.replay(program.model, trace=guide)).get_trace(*batch)
    sites = [site for site in local_sites(model, observed=True) if not site["infer"].get("_deterministic")]
    values = [(kind_of_values(site["fn"]) != "continuous", site["fn"].event_shape.numel()) for site in sites]
    return [discrete for discrete, number in values for _ in range(number)]


def _check_measures(measures: Mapping[str, list[bool]]) -> None:
    (first, expected), *others = measures.items()
    for name, got in others:
        if len(got) != len(expected):
            raise ValueError(
                f"models: expected programs that observe the same values of a datum, got {len(expected)} with {first!r}"
                f" and {len(got)} with {name!r}"
            )
        if got != expected:
            raise ValueError(
                f"models: expected likelihoods of one measure, got {_described(expected)} with {first!r} and "
                f"{_described(got)} with {name!r}, which do not compare; take likelihoods that are both discrete, or "
                "both continuous"
            )


def _described(measure: list[bool]) -> str:
    if all(measure):
        return "probabilities"
    return f"probabilities of {sum(measure)} of {len(measure)} values" if any(measure) else "densities"


def _check_finite(name: str, log_evidence: Tensor) -> None:
    if not log_evidence.isfinite().all():
        wrong = log_evidence[~log_evidence.isfinite()]
        raise ValueError(
            f"models: expected finite log evidence, got {wrong[0].item()} with {name!r} for {len(wrong)} of "
            f"{len(log_evidence)} data, which it takes for impossible"
        )


def _importance(program: Program, data: Any, num_particles: int, seed: int, advance: Any) -> tuple[Tensor, ...]:
    """Log evidence, its error and the effective sample size, each of shape `(N,)`."""
    at_once = min(num_particles, PARTICLES_AT_ONCE)
    batches = checked_batches(program, data, at_once)
    parts = []
    with undisturbed(program, seed), pyro.validation_enabled(False):
        for batch in batches.epoch(0):
            done = part_of(advance, len(batch[0]) / batches.num_data)
            options = {"num_particles": num_particles, "at_once": at_once, "advance": done}
            found = estimate_evidence(program.model, program.guide, *batch, **options)
            # The error is that of the mean weight, and says the effective sample size: error^2 = 1 / ESS - 1 / K.
            parts.append((found.log_evidence, found.error, 1 / (found.error**2 + 1 / num_particles)))
    return tuple(map(torch.cat, zip(*parts, strict=True)))


def _annealed(
    program: Program, data: Any, num_chains: int, seed: int, advance: Any, num_temperatures: int
) -> tuple[Tensor, ...]:
    options = {"num_temperatures": num_temperatures, "seed": seed, "advance": advance}
    found = annealed_log_likelihood(program, data, num_chains, **options)
    return found.log_evidence, found.error, found.ess


def _dataset(names: list[str], rows: list[tuple[Tensor, ...]]) -> xr.Dataset:
    import xarray as xr

    described = {
        "log_evidence": ("nats", "log evidence of the datum"),
        "error": ("nats", "Monte Carlo standard error of the log evidence"),
        "ess": ("1", "effective sample size of the datum's weights"),
    }
    dataset = xr.Dataset(coords={"model": names, "datum": range(len(rows[0][0]))})
    for (name, (units, long_name)), values in zip(described.items(), zip(*rows, strict=True), strict=True):
        attributes = {"units": units, "long_name": long_name}
        dataset[name] = ("model", "datum"), torch.stack(values).numpy(), attributes
    return dataset


def _table(pointwise: xr.Dataset) -> pd.DataFrame:
    from arviz_stats import compare
    from arviz_stats.utils import ELPDData

    num_data, num_particles = pointwise.sizes["datum"], pointwise.attrs["num_particles"]
    low_ess = (pointwise.ess < min(LOW_ESS, num_particles / 4)).mean("datum").to_series()
    _warn(low_ess[low_ess > LOW_SHARE], MORE[pointwise.attrs["method"]])
    # The probabilities of whole images are too small for the numbers with which stacking weights are found, which, like
    # the differences, do not depend on what is taken off all programs' log evidence of a datum.
    relative = pointwise.log_evidence - pointwise.log_evidence.max("model")
    rows = {
        name: ELPDData(
            kind="held-out evidence",
            elpd=values.sum().item(),
            se=math.sqrt(num_data) * values.std().item(),
            p=math.nan,
            n_samples=num_particles,
            n_data_points=num_data,
            scale="log",
            warning=bool(low_ess[name] > LOW_SHARE),
            good_k=math.nan,
            elpd_i=relative.sel(model=name, drop=True),
        )
        for name, values in ((name, pointwise.log_evidence.sel(model=name)) for name in pointwise.model.values.tolist())
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The inplace keyword")  # between ArviZ and pandas
        table = compare(rows)
    squares = (pointwise.error**2).sum("datum").to_series().reindex(table.index)
    table["mc_se"] = squares**0.5
    table["mc_dse"] = ((squares + squares.iloc[0]) ** 0.5).where(table["rank"] > 0, 0.0)
    table["mc_bias"] = squares / 2
    table["low_ess"] = low_ess.reindex(table.index)
    return table


def _warn(low: pd.Series, advice: str) -> None:
    if len(low):
        shares = ", ".join(f"{share:.0%} of the data with {name}" for name, share in low.items())
        warnings.warn(
            f"models: weights of low effective size for {shares}, whose evidence may be far higher than estimated; "
            f"take {advice}",
            stacklevel=4,
        )


class ConditionalLOO(NamedTuple):
    """Leave-one-out cross-validation by ArviZ, and what it is conditional on.

    Attributes:
        elpd: What `arviz_stats.loo` gave.
        conditional_on: What was not left out.
    """

    elpd: Any
    conditional_on: str

    @property
    def verdict(self) -> Verdict:
        """Holds where the Pareto k of at most 5 % of the data are above what ArviZ says is good for so many draws."""
        high = float((self.elpd.pareto_k > self.elpd.good_k).mean())
        finding = (
            f"elpd {self.elpd.elpd:.1f} ± {self.elpd.se:.1f} nats given {self.conditional_on}; Pareto k above "
            f"{self.elpd.good_k:.2f} for {high:.0%} of {self.elpd.n_data_points:,} data"
        )
        if high > LOW_SHARE:
            return Verdict(False, finding, "comparison.models on held-out data")
        return Verdict(True, finding)

    def __str__(self) -> str:
        return f"{self.elpd}\n\nConditional on {self.conditional_on}."


def loo(tree: Any, var_name: str | None = None) -> ConditionalLOO:
    r"""ArviZ's leave-one-out cross-validation of what `to_arviz` gave, with the label that it needs.

    .. math:: \text{elpd} = \sum_n \log p(x_n \mid x_{-n}, \theta), \qquad
              p(x_n \mid x_{-n}, \theta)^{-1} = E_{z_n \mid x_n, \theta}\bigl[p(x_n \mid z_n, \theta)^{-1}\bigr]

    It is conditional on the decoder's weights :math:`\theta`, which were fitted to this datum too if the data are those
    of the training. And a latent belongs to its datum alone: once the datum is left out, nothing but the prior is known
    of it. What is estimated is then the evidence :math:`p(x_n \mid \theta)` itself, by the harmonic mean of likelihoods
    over the guide's draws, whose weights have heavy tails: Pareto k will often be high. `models`, on held-out data, is
    the better estimate of the same.

    Args:
        tree: A `DataTree` with a group `log_likelihood`, of dimensions chain, draw and datum.
        var_name: The observed site, where there are several.

    Returns:
        A `ConditionalLOO`.

    Reference:
        Vehtari, Gelman and Gabry, 2017. Practical Bayesian model evaluation using leave-one-out cross-validation and
        WAIC. Neal, 1994, in the discussion of Newton and Raftery: the harmonic mean.

    Example:
        >>> import numpy as np
        >>> from arviz_base import from_dict
        >>> draws = np.random.default_rng(0).normal(size=(1, 500, 20))
        >>> found = loo(from_dict({"posterior": {"z": draws}, "log_likelihood": {"x": -0.1 * draws**2}}))
        >>> found.verdict.holds, found.conditional_on
        (True, 'the weights of the decoder, which no datum was left out of')
    """
    import arviz_stats

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Estimated shape parameter of Pareto")  # which the verdict says
        found = arviz_stats.loo(tree, pointwise=True, var_name=var_name)
    return ConditionalLOO(found, "the weights of the decoder, which no datum was left out of")
