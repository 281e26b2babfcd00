"""Whether data drawn from a program look like the data, by statistics that the user chooses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import constraints

from pyro_vae import likelihoods
from pyro_vae.diagnostics.verdict import Verdict, holm
from pyro_vae.distributions import Grid, SoftBernoulli, innermost
from pyro_vae.estimators.evidence import VALUES_AT_ONCE
from pyro_vae.estimators.terminal import progress_bar
from pyro_vae.evaluation import checked_batches, posterior_draws, predictive_draws, prior_draws
from pyro_vae.evaluation.draws import check_whole
from pyro_vae.evaluation.generation import observed_sites
from pyro_vae.programs import Program, undisturbed

__all__ = ["PredictiveChecks", "predictive_checks"]

LEVEL = 0.05  # of the verdict, all statistics together
FEWEST, FOR_EACH = (
    200,
    60,
)  # replicates by default, in all and for each statistic; 40 for each are the least that can tell
VALUES = 2**24  # of replicates that are in memory at once: 64 MB in float32

Statistic = Callable[[Tensor], Any]


@dataclass(frozen=True)
class PredictiveChecks:
    """What `predictive_checks` found for T statistics and S replicated data sets; tensors are float64, on the CPU.

    Attributes:
        names: Names of the statistics.
        observed: Statistics of the data, of shape `(T,)`, in their own units.
        replicated: Statistics of the replicates, of shape `(S, T)`.
        from_prior: Whether latents were drawn from the prior, and not from the posterior of each datum.
    """

    names: tuple[str, ...]
    observed: Tensor
    replicated: Tensor
    from_prior: bool

    @property
    def p_values(self) -> Tensor:
        """Two-sided Bayesian p-values, of shape `(T,)`."""
        return (2 * self._tail).clamp(max=1)

    @property
    def errors(self) -> Tensor:
        """Monte Carlo standard errors of the p-values, of shape `(T,)`."""
        return 2 * (self._tail * (1 - self._tail) / len(self.replicated)).sqrt()

    @property
    def attainable(self) -> float:
        """The smallest p-value that so many replicates can give."""
        return 2 / (len(self.replicated) + 1)

    @property
    def smallest_p_value(self) -> float:
        """The smallest of the p-values."""
        return self.p_values.min().item()

    @property
    def adjusted(self) -> Tensor:
        """The p-values after Holm's correction for T statistics, of shape `(T,)`."""
        return holm(self.p_values)

    @property
    def _tail(self) -> Tensor:
        # The data count as one of the replicates, which they are if all is well: a p-value is never 0 then, and no
        # smaller than it should be (Phipson and Smyth, 2010).
        below, above = ((sign * self.replicated >= sign * self.observed).double().sum(0) for sign in (-1, 1))
        return (1 + torch.minimum(below, above)) / (len(self.replicated) + 1)

    @property
    def verdict(self) -> Verdict:
        """Holds unless a p-value, corrected by Holm for so many statistics, is at most 0.05."""
        adjusted, kind = self.adjusted, "prior" if self.from_prior else "posterior"
        if bool((adjusted <= LEVEL).any()):
            worst = [i for i in adjusted.argsort().tolist() if adjusted[i] <= LEVEL]
            finding = "; ".join(map(self._said, worst[:3])) + (f"; {len(worst) - 3} more" if len(worst) > 3 else "")
            return Verdict(False, f"{kind} predictive draws differ: {finding}", self._advice(self.names[worst[0]]))
        if len(self.names) * self.attainable > LEVEL:
            finding = f"{len(self.replicated)} replicates cannot give a p-value below {self.attainable:.2g}"
            least = round(2 * len(self.names) / LEVEL)
            return Verdict(None, f"{finding}, for {len(self.names)} statistics", f"num_samples={least} or more")
        least = int(self.p_values.argmin())
        finding = f"smallest of {len(self.names)} {kind} predictive p-values {self.p_values[least].item():.2g}"
        return Verdict(True, f"{finding} ({self.names[least]})")

    def _said(self, i: int) -> str:
        low, high = self.replicated[:, i].quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        replicates = f"{low:.3g} to {high:.3g} of replicates"
        p_value = self.p_values[i].item()
        sign = "at most" if p_value <= self.attainable else "="
        return f"{self.names[i]} {self.observed[i].item():.3g}, {replicates} (p {sign} {p_value:.2g})"

    def _advice(self, name: str) -> str:
        known = next((advice for ending, advice in ADVICE.items() if name.endswith(ending)), None)
        likelihood = known or "a likelihood that can give such data"
        if self.from_prior:
            return f"from_prior=False, to tell prior from likelihood; then priors.VampPrior or Flow, or {likelihood}"
        return likelihood


ADVICE = {
    "share of zeros": "a likelihood with zeros of its own (ZeroInflatedPoisson, Bernoulli for binary data)",
    "variance-to-mean ratio": "NegativeBinomial or ZeroInflatedNegativeBinomial",
    "largest value": "a likelihood with a heavier tail (NegativeBinomial, StudentT)",
    "standard deviation": "a noise scale that is learned, or longer training",
    "spread of means": "longer training, a richer decoder",
    "mean": "longer training, a richer decoder",
}


def predictive_checks(
    program: Program,
    x: Any,
    statistics: Mapping[str, Statistic] | None = None,
    *,
    num_samples: int | None = None,
    from_prior: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> PredictiveChecks:
    r"""Bayesian p-values: how unusual statistics of the data are among data sets that the program draws.

    .. math:: p = \min\bigl(1,\; 2 \min_{\pm} P(\pm T(x^\text{rep}) \ge \pm T(x))\bigr), \qquad
              P(A) \approx \frac{1 + \#\{s : A_s\}}{S + 1}

    A replicate is a whole data set: for each datum a draw of the latents from its posterior, and a datum from the
    model, from which the data themselves are withheld. With `from_prior`, latents are drawn from the prior: replicates
    are then what the model alone takes for data, and a prior far from the aggregate posterior shows.

    Posterior predictive p-values use the data twice, once for the latents: they are conservative, nearer to 1/2 than
    uniform if all is well, and small ones mean the more. A statistic that each datum's own latent can follow (a mean)
    finds little; ask for what the model was not fitted to (extremes, ties between values, shares of zeros).

    Each replicate is drawn in chunks of data, as many replicates at a time as 2^24 values hold (one at least): memory
    holds the data and these. One replicate costs about two passes of the decoder over the data, 200 of 10,000 images
    through a network of 400 units a minute and a half on one core.

    Args:
        program: Any program whose observed site is "x", or whose sites "x.<part>" hold its columns in order.
        x: Tensor, array, `Dataset` or `DataLoader`.
        statistics: Functions of a tensor `(N, *event_shape)`, a whole data set, that give one number, by name. None
            takes what suits the support of the likelihood: of counts the mean, the share of zeros, the largest value
            and the ratio of variance to mean; of binary data the mean and the spread of the data's means; of others the
            mean, the standard deviation and the share of zeros. Parts of a table are taken one by one.
        num_samples: Number S of replicates; None takes 60 for each statistic, and 200 at least.
        from_prior: Whether latents come from the prior.
        seed: Seed of the draws.
        progress: Whether to show a progress bar past two seconds.

    Returns:
        A `PredictiveChecks`.

    Raises:
        ValueError: If a number is not a positive whole one, a statistic is missing, no function or not one finite
            number, or the data do not suit the program.

    Reference:
        Rubin, 1984. Bayesianly justifiable and relevant frequency calculations for the applied statistician. Meng,
        1994. Posterior predictive p-values. Gelman, Meng and Stern, 1996. Posterior predictive assessment of model
        fitness via realized discrepancies.

    Example:
        >>> import pyro_vae
        >>> vae, x = pyro_vae.build((8, 8), latent=2), torch.zeros(50, 8, 8)
        >>> found = predictive_checks(vae, x, {"largest share": lambda x: x.mean((1, 2)).max()}, num_samples=100)
        >>> found.verdict.holds, round(found.p_values.item(), 3)
        (False, 0.02)
    """
    if num_samples is not None:
        check_whole(1, num_samples=num_samples)
    _check(statistics)
    checked = checked_batches(program, x, 1)
    with undisturbed(program, seed), pyro.validation_enabled(False):
        batches = list(checked.epoch(0))  # once, as data may be drawn anew the next time
        chosen = _defaults(program, batches[0]) if statistics is None else dict(statistics)
        data = torch.cat([batch[0].cpu() for batch in batches])
        observed = _values(chosen, data)
        total = max(FEWEST, FOR_EACH * len(chosen)) if num_samples is None else num_samples
        rows: list[Tensor] = []
        with progress_bar(total, progress) as begin:
            advance = begin("replicates")
            while len(rows) < total:
                at_once = max(1, min(VALUES // data.numel(), total - len(rows)))
                rows += [_values(chosen, x) for x in _replicates(program, batches, at_once, from_prior, advance)]
    return PredictiveChecks(tuple(chosen), observed, torch.stack(rows), from_prior)


def _check(statistics: Mapping[str, Statistic] | None) -> None:
    if statistics is None:
        return
    if not isinstance(statistics, Mapping) or not all(map(callable, statistics.values())):
        raise ValueError(f"statistics: expected a dict of functions by name, or None, got {statistics}")
    if not statistics:
        raise ValueError("statistics: expected at least one, or None for those that suit the data, got none")


def _replicates(
    program: Program,
    batches: Sequence[tuple[Tensor, ...]],
    num_samples: int,
    from_prior: bool,
    advance: Callable[[float], None],
) -> Tensor:
    """Replicated data sets of shape `(S, N, *event_shape)`; each has one draw of the global latents."""
    num_data = sum(len(batch[0]) for batch in batches)
    shared, parts = None, []
    for batch in _pieces(batches, max(1, VALUES_AT_ONCE // (num_samples * batches[0][0][0].numel()))):
        if shared is None or not from_prior:
            draws = posterior_draws(program, *batch, num_samples=num_samples, shared=shared)
            shared = draws.shared
        if from_prior:
            parts.append(prior_draws(program, *batch, num_samples=num_samples, shared=shared)[1].cpu())
        else:
            parts.append(predictive_draws(program, *batch, draws=draws).cpu())
        advance(num_samples * len(batch[0]) / num_data)
    return torch.cat(parts, 1)


def _pieces(batches: Sequence[tuple[Tensor, ...]], size: int) -> Iterator[tuple[Tensor, ...]]:
    for batch in batches:
        yield from zip(*(tensor.split(size) for tensor in batch), strict=True)


def _values(statistics: Mapping[str, Statistic], x: Tensor) -> Tensor:
    found = []
    for name, statistic in statistics.items():
        value = torch.as_tensor(statistic(x), dtype=torch.float64)
        if value.numel() != 1 or not value.isfinite().all():
            got = f"shape {tuple(value.shape)}" if value.numel() != 1 else f"{value.item()}"
            raise ValueError(f"statistic {name!r}: expected one finite number of data {tuple(x.shape)}, got {got}")
        found.append(value.reshape(()))
    return torch.stack(found)


def _defaults(program: Program, batch: tuple[Tensor, ...]) -> dict[str, Statistic]:
    """Statistics that suit the supports of the observed sites, each of its own columns."""
    guide: Any = poutine.trace(program.guide).get_trace(*batch)
    model: Any = poutine.trace(poutine.replay(program.model, trace=guide)).get_trace(*batch)
    sites = observed_sites(model)
    if len(sites) == 1:
        return _suited(sites[0]["fn"])
    found: dict[str, Statistic] = {}
    start = 0
    for site in sites:
        columns = slice(start, start + site["fn"].event_shape.numel())
        start = columns.stop
        for name, statistic in _suited(site["fn"]).items():
            found[f"{site['name'].removeprefix('x.')}: {name}"] = partial(_of_columns, statistic, columns)
    return found


def _of_columns(statistic: Statistic, columns: slice, x: Tensor) -> Any:
    return statistic(x.flatten(1)[:, columns])


def _suited(fn: Any) -> dict[str, Statistic]:
    kind = kind_of_values(fn)
    if kind == "binary":
        return {"mean": torch.mean, "spread of means": _spread_of_means}
    if kind == "whole":
        counts: dict[str, Statistic] = {"mean": torch.mean, "share of zeros": _zeros}
        return counts | {"largest value": torch.max, "variance-to-mean ratio": _ratio}
    return {"mean": torch.mean, "standard deviation": partial(torch.std, correction=0), "share of zeros": _zeros}


def kind_of_values(fn: Any) -> str:
    """What a likelihood is over: "binary", "whole" numbers, a "grid" of levels, or "continuous" values.

    Example:
        >>> import pyro.distributions as dist
        >>> kind_of_values(dist.Poisson(torch.ones(3)).to_event(1))
        'whole'
    """
    support = fn.support
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    # Soft ones take grey targets, but it is bits that they have a probability of.
    if support is constraints.boolean or isinstance(innermost(fn), SoftBernoulli | likelihoods.Bernoulli):
        return "binary"
    if isinstance(support, Grid):
        return "grid"
    return "whole" if support.is_discrete else "continuous"


def _zeros(x: Tensor) -> Tensor:
    return (x == 0).double().mean()


def _ratio(x: Tensor) -> Tensor:
    return x.var(correction=0) / x.mean().clamp(min=torch.finfo(x.dtype).tiny)


def _spread_of_means(x: Tensor) -> Tensor:
    return x.flatten(1).mean(1).std(correction=0)
