"""Programs side by side, by the evidence of data that none of them has seen."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal

import pyro
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from pyro_vae.comparison.left_out import LOW_SHARE
from pyro_vae.comparison.measures import check_measures, measure
from pyro_vae.data import InMemory, OnDisk, as_source
from pyro_vae.diagnostics import Verdict
from pyro_vae.diagnostics.khat import FEWEST_PARTICLES, largest_shape, pareto_shapes, summed
from pyro_vae.estimators.evidence import PARTICLES_AT_ONCE
from pyro_vae.estimators.particles import log_probabilities
from pyro_vae.estimators.terminal import progress_bar
from pyro_vae.evaluation import Gathered, annealed_log_likelihood, checked_batches
from pyro_vae.evaluation.annealed import mean_weight
from pyro_vae.evaluation.summary import part_of
from pyro_vae.programs import Program, num_inputs, undisturbed

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

__all__ = ["ModelComparison", "models"]

CHAINS = 16  # of annealed importance sampling, by default
LOW_ESS = 10  # of a datum's weights: below, their mean is that of a few, and the error itself cannot be trusted
FEWEST = {"importance": FEWEST_PARTICLES, "ais": 5}  # weights: a tail's, and of fewer no effective size would be low
WEIGHTS_AT_ONCE = 2**22  # log-weights of a chunk of data: 32 MiB
MORE = {"importance": 'more num_particles, or method="ais"', "ais": "more num_temperatures"}  # what weights ask for
NEGLIGIBLE = 4.0  # nats over all data, below which errors of a difference are not to be trusted (Sivula et al., 2025)


@dataclass(frozen=True)
class ModelComparison:
    """What `models` found.

    Attributes:
        pointwise: A `Dataset` with dimensions `model` and `datum`: `log_evidence` and `error`, its Monte Carlo standard
            error, in nats, and of the datum's weights `ess`, the effective sample size, and `khat`, the shape of their
            tail (as of `diagnostics.khat`; NaN of annealed chains, which are too few for it).
        table: One row a program, the best first, in nats over all N data (divide by N for nats per datum), as
            `arviz_stats.compare` gives it: `rank`, `elpd` (the log evidence), `p` (NaN, as nothing was fitted to these
            data), `elpd_diff` (how far behind the best), `weight` (of stacking), `se`, `dse` (of the difference, over
            paired data), `warning` (the weights of more than 5 % of the data cannot be trusted); and `mc_se` and
            `mc_dse`, Monte Carlo standard errors of elpd and difference, `mc_bias`, by how much elpd is too low, about,
            and shares of the data: `low_ess`, of a low effective sample size, `high_khat`, of a high k-hat, and
            `untrusted`, of one or the other.
    """

    pointwise: xr.Dataset
    table: pd.DataFrame

    @property
    def verdict(self) -> Verdict:
        """Holds where the first program is ahead of each other one; None where one may be as good.

        Ahead is a difference beyond the 97.5 % quantile of Student's t, in standard errors of data and Monte Carlo
        together, when what the other's estimate is too low by is taken off, and above 4 nats over all data. An estimate
        from weights with a high k-hat or a low effective sample size may be too low by any amount, and then nothing can
        be told.
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
            untrusted = f"{rest.untrusted[~ahead].max():.0%} of the data have weights that cannot be trusted"
            return Verdict(None, f"{finding}; {untrusted}", MORE[self.pointwise.attrs["method"]])
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
    square of its error, and by more where the guide misses a part of the posterior, which a high k-hat or a low
    effective sample size tells, and a warning.

    Memory holds the data; particles are taken in passes of bounded size, and of them the K log-weights of a chunk of
    data (2^22 at most, or K) are held at once. All programs take the same data: those
    that are drawn anew each time (dynamic binarization, say) are drawn once. Each uses the same seed.

    Args:
        programs: Two or more programs by name, each of any kind that keeps its local sites in a plate named "data".
        x_test: Tensor, array, `Dataset` or `DataLoader` of N held-out data.
        num_particles: Number `K` of weights a datum: particles (at least 25, which a k-hat needs), or annealed chains
            (at least 5). None is 1,000 particles, or 16 chains.
        method: "importance", or "ais" for annealed importance sampling (see `evaluation.annealed_log_likelihood`).
        num_temperatures: Number of steps of annealed chains.
        seed: Seed of the particles or chains.
        progress: Whether to show a progress bar past two seconds.

    Returns:
        A `ModelComparison`. Its `table` is what `arviz_plots.plot_compare` takes.

    Raises:
        ValueError: If there are fewer than two programs or too few weights; if some give probabilities and others
            densities of the data, they observe different numbers of values or mask different ones, or one gives
            probabilities of 0 and 1 and the data are grey; if data are impossible under one, or do not suit it.

    Warns:
        UserWarning: If the weights of more than 5 % of the data have a k-hat above 0.7 (or what K weights resolve, see
            `diagnostics.khat`), or an effective sample size below 10 (below a quarter of the weights, if these are
            fewer than 40).

    Reference:
        Vehtari, Gelman and Gabry, 2017. Practical Bayesian model evaluation using leave-one-out cross-validation and
        WAIC (standard errors of differences). Yao et al., 2018. Using stacking to average Bayesian predictive
        distributions. Sivula et al., 2025. Uncertainty in Bayesian leave-one-out cross-validation based model
        comparison. Vehtari, Simpson, Gelman, Yao and Gabry, 2024. Pareto smoothed importance sampling (k-hat).

    Example:
        >>> import pyro_vae
        >>> _ = torch.manual_seed(0)
        >>> programs = {f"{latent} latents": pyro_vae.build((4,), latent=latent) for latent in (2, 3)}
        >>> found = models(programs, torch.rand(20, 4).round())
        >>> found.pointwise.log_evidence.shape, found.table["rank"].tolist()
        ((2, 20), [0, 1])
    """
    if num_particles is None:
        num_particles = CHAINS if method == "ais" else 1000
    _check_arguments(programs, method, num_particles)
    data = _fixed(programs, x_test, seed)
    check_measures({name: measure(name, program, data) for name, program in programs.items()})
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
    if isinstance(source, InMemory | OnDisk):
        return source.frozen(seed)
    program = max(programs.values(), key=num_inputs)
    batches = checked_batches(program, source, 1)
    with undisturbed(program, seed):
        columns = zip(*batches.epoch(0), strict=True)
        return TensorDataset(*(torch.cat([part.cpu() for part in column]) for column in columns))


def _check_arguments(programs: Any, method: str, num_particles: Any) -> None:
    if not isinstance(programs, Mapping):
        raise ValueError(
            f"models: expected programs by name, such as {{'a': a, 'b': b}}, got {type(programs).__name__}"
        )
    if len(programs) < 2:
        raise ValueError(f"models: expected two or more programs, got {len(programs)}")
    if method not in FEWEST:
        raise ValueError(f'method: expected "importance" or "ais", got {method!r}')
    if not isinstance(num_particles, Integral) or num_particles < FEWEST[method]:
        wanted = f"a whole number, at least {FEWEST[method]} with method={method!r}"
        raise ValueError(f"num_particles: expected {wanted}, got {num_particles!r}")
    for name, program in programs.items():
        if not all(callable(getattr(program, part, None)) for part in ("model", "guide", "parameters")):
            raise ValueError(
                f"models: expected a program with model and guide, got {type(program).__name__} as {name!r}"
            )


def _check_finite(name: str, log_evidence: Tensor) -> None:
    if not log_evidence.isfinite().all():
        wrong = log_evidence[~log_evidence.isfinite()]
        raise ValueError(
            f"models: expected finite log evidence, got {wrong[0].item()} with {name!r} for {len(wrong)} of "
            f"{len(log_evidence)} data, which it takes for impossible"
        )


def _importance(program: Program, data: Any, num_particles: int, seed: int, advance: Any) -> tuple[Tensor, ...]:
    """Log evidence, its error, effective sample size and k-hat, each of shape `(N,)`."""
    batches = checked_batches(program, data, min(num_particles, PARTICLES_AT_ONCE))
    batches.batch_size = max(1, min(batches.batch_size, WEIGHTS_AT_ONCE // num_particles))
    gathered = Gathered()
    with undisturbed(program, seed), pyro.validation_enabled(False):
        for batch in batches.epoch(0):
            done = part_of(advance, len(batch[0]) / batches.num_data)
            log_weights, rounding = _log_weights(program, batch, num_particles, done)
            shapes, _ = pareto_shapes(log_weights, rounding)
            gathered.add(*mean_weight(log_weights), shapes)
    return tuple(gathered.tensors())


def _log_weights(
    program: Program, batch: tuple[Tensor, ...], num_particles: int, advance: Any
) -> tuple[Tensor, Tensor]:
    """Log-weights, and how much of each may be rounding, both of shape `(K, B)`."""
    parts = []
    for first in range(0, num_particles, PARTICLES_AT_ONCE):
        k = min(PARTICLES_AT_ONCE, num_particles - first)
        prior, likelihood, posterior = log_probabilities(program.model, program.guide, *batch, num_particles=k)
        parts.append(summed(prior, likelihood, -posterior))
        advance(k / num_particles)
    log_weights, rounding = map(torch.cat, zip(*parts, strict=True))
    return log_weights, rounding


def _annealed(
    program: Program, data: Any, num_chains: int, seed: int, advance: Any, num_temperatures: int
) -> tuple[Tensor, ...]:
    options = {"num_temperatures": num_temperatures, "seed": seed, "advance": advance}
    found = annealed_log_likelihood(program, data, num_chains, **options)
    return found.log_evidence, found.error, found.ess, torch.full_like(found.ess, math.nan)


def _dataset(names: list[str], rows: list[tuple[Tensor, ...]]) -> xr.Dataset:
    import xarray as xr

    described = {
        "log_evidence": ("nats", "log evidence of the datum"),
        "error": ("nats", "Monte Carlo standard error of the log evidence"),
        "ess": ("1", "effective sample size of the datum's weights"),
        "khat": ("1", "shape of the tail of the datum's weights"),
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
    low_ess = pointwise.ess < min(LOW_ESS, num_particles / 4)
    high_khat = pointwise.khat > largest_shape(num_particles)
    wrong = {"low_ess": low_ess, "high_khat": high_khat, "untrusted": low_ess | high_khat}
    shares = {name: which.mean("datum").to_series() for name, which in wrong.items()}
    untrusted = shares["untrusted"] > LOW_SHARE
    _warn(shares["untrusted"][untrusted], MORE[pointwise.attrs["method"]])
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
            warning=bool(untrusted[name]),
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
    return table.assign(**{name: share.reindex(table.index) for name, share in shares.items()})


def _warn(untrusted: pd.Series, advice: str) -> None:
    if len(untrusted):
        shares = ", ".join(f"{share:.0%} of the data with {name}" for name, share in untrusted.items())
        warnings.warn(
            f"models: weights of a high k-hat or a low effective size for {shares}, whose evidence may be far higher "
            f"than estimated; take {advice}",
            stacklevel=4,
        )
