"""Figures of checks and comparisons: the terms of the ELBO, predictive checks, programs side by side."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from pyro_vae.comparison import ModelComparison
from pyro_vae.diagnostics import Collapse, PredictiveChecks
from pyro_vae.diagnostics.predictive import LEVEL
from pyro_vae.evaluation import ELBODecomposition

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["collapse", "elbo_decomposition", "models", "predictive_checks"]

TERMS = ("C0", "C1", "C2")  # of the rate, mutual information first
NAMED = 24  # dimensions whose names there is room for


def elbo_decomposition(decomposition: ELBODecomposition) -> Figure:
    """The rate in its terms, and each dimension's share of it.

    Args:
        decomposition: What `pyro_vae.evaluation.elbo_decomposition` gave.

    Example:
        >>> import pyro_vae, torch
        >>> found = pyro_vae.evaluation.elbo_decomposition(pyro_vae.build((8, 8), latent=2), torch.ones(20, 8, 8))
        >>> [axes.get_ylabel() for axes in elbo_decomposition(found).axes]
        ['nats per datum', 'nats per datum']
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    rate, each = figure.subplots(1, 2, width_ratios=(1, 3))
    _rate(rate, decomposition)
    if decomposition.kl_per_dimension is None:
        _say(each, "no KL per dimension:\nthe dimensions of prior or posterior are not independent")
    else:
        _bars(each, decomposition, decomposition.kl_per_dimension, None)
    return figure


def collapse(collapse: Collapse) -> Figure:
    """The rate in its terms, and the KL of each dimension, those that say nothing in grey.

    The dark part of a bar is what the dimension alone says of the datum, its mutual information, by which bars are
    sorted. Where there is no KL per dimension, bars are variances over the data of the posterior means.

    Args:
        collapse: What `pyro_vae.diagnostics.collapse` gave.

    Example:
        >>> import pyro_vae, torch
        >>> found = pyro_vae.diagnostics.collapse(pyro_vae.build((8, 8), latent=2), torch.ones(20, 8, 8))
        >>> len(collapse(found).axes)
        2
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    rate, each = figure.subplots(1, 2, width_ratios=(1, 3))
    _rate(rate, collapse.decomposition)
    used = ~collapse.dead
    kl = collapse.decomposition.kl_per_dimension
    if kl is not None:
        _bars(each, collapse.decomposition, kl, used)
    else:
        _bars(each, collapse.decomposition, collapse.variance, used)
        each.set(ylabel="squared units of the latent", title="variance of the posterior means")
    return figure


def _rate(axes: Axes, found: ELBODecomposition) -> None:
    """The rate as a stack of its terms, those that go below zero by Monte Carlo error at zero."""
    most = math.log(found.num_data)
    terms = {f"mutual information {found.mutual_information:.2f} (at most {most:.2f})": found.mutual_information}
    if found.total_correlation is None or found.dimension_wise_kl is None:
        terms[f"marginal KL {found.marginal_kl:.2f}"] = found.marginal_kl
    else:
        terms[f"total correlation {found.total_correlation:.2f}"] = found.total_correlation
        terms[f"dimension-wise KL {found.dimension_wise_kl:.2f}"] = found.dimension_wise_kl
    bottom = 0.0
    for i, (label, value) in enumerate(terms.items()):
        axes.bar(0, max(value, 0.0), bottom=bottom, width=0.6, color=TERMS[i], label=label)
        bottom += max(value, 0.0)
    axes.set(xlim=(-1, 1), ylim=(0, max(1.15 * bottom, 0.15)), xticks=[], ylabel="nats per datum")
    axes.set_title(f"rate {found.rate:.2f} of {found.num_data:,} data")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.02), frameon=False, fontsize="small", reverse=True)


def _bars(axes: Axes, found: ELBODecomposition, values: Tensor, used: Tensor | None) -> None:
    information = found.information_per_dimension
    order = (values if information is None else information).argsort(descending=True, stable=True)
    shades = ["0.7" if used is not None and not used[i] else "C0" for i in order]
    shown = range(len(order))
    axes.bar(shown, values[order].numpy(), color=shades, alpha=1.0 if information is None else 0.4)
    if information is not None:
        axes.bar(shown, information[order].clamp(min=0).numpy(), color=shades)
    if len(order) <= NAMED:
        axes.set_xticks(shown, [found.dimensions[i] for i in order], rotation=60 if len(order) > 10 else 0)
    else:
        axes.set_xlabel("rank of the dimension")
    axes.set(
        ylabel="nats per datum", title="KL per dimension" + ("" if information is None else " (dark: information)")
    )
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    if used is not None and not used.all():
        from matplotlib.patches import Patch

        said = (("C0", f"{int(used.sum())} that say something"), ("0.7", f"{int((~used).sum())} that say nothing"))
        axes.legend(handles=[Patch(color=color, label=label) for color, label in said], frameon=False)


def _say(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, ha="center", va="center", color="0.3", transform=axes.transAxes)
    axes.set(xticks=[], yticks=[], ylabel="nats per datum")


def predictive_checks(checks: PredictiveChecks) -> Figure:
    """Each statistic of the replicates, as a histogram, and a line at that of the data.

    Args:
        checks: What `pyro_vae.diagnostics.predictive_checks` gave.

    Example:
        >>> import pyro_vae, torch
        >>> vae, x = pyro_vae.build((8, 8), latent=2), torch.zeros(20, 8, 8)
        >>> found = pyro_vae.diagnostics.predictive_checks(vae, x, {"mean": torch.mean}, num_samples=100)
        >>> predictive_checks(found).axes[0].get_xlabel()
        'mean'
    """
    from matplotlib.figure import Figure

    columns = min(4, len(checks.names))
    rows = math.ceil(len(checks.names) / columns)
    figure = Figure(figsize=(max(5.0, 3.2 * columns), 2.9 * rows + 0.3), layout="constrained")
    all_axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for i, (axes, name) in enumerate(zip(all_axes, checks.names, strict=False)):
        _histogram(axes, checks.replicated[:, i].numpy(), checks.observed[i].item())
        p_value = checks.p_values[i].item()
        sign = "≤" if p_value <= checks.attainable else "="
        axes.set(xlabel=name, title=f"p {sign} {p_value:.2g}", yticks=[])
        failed = checks.adjusted[i] <= LEVEL
        axes.title.set_color("C3" if failed else "black")
    for axes in all_axes[len(checks.names) :]:
        axes.set_axis_off()
    kind = "prior" if checks.from_prior else "posterior"
    handles, labels = all_axes[0].get_legend_handles_labels()
    labels = [f"{len(checks.replicated):,} {kind} predictive replicates", "the data"]
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
    return figure


def _histogram(axes: Axes, replicated: np.ndarray, observed: float) -> None:
    low, high = replicated.min(), replicated.max()
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-300):  # all the same: bins need a width
        low, high = low - 0.5 * max(abs(low), 1.0), high + 0.5 * max(abs(high), 1.0)
    axes.hist(replicated, bins=25, range=(low, high), color="C0", alpha=0.6, label="replicates")
    axes.axvline(observed, color="C3", linewidth=2, label="data")
    axes.ticklabel_format(axis="x", useOffset=False, style="plain" if 1e-3 <= abs(observed) < 1e6 else "sci")
    axes.locator_params(axis="x", nbins=4)


def models(comparison: ModelComparison) -> Figure:
    """Programs side by side, the best first: log evidence, and differences to the best, with two standard errors.

    The error of a difference is smaller than that of the evidence, as data that are hard for one program are hard for
    all.

    Args:
        comparison: What `pyro_vae.comparison.models` gave.

    Example:
        >>> import pyro_vae, torch
        >>> _ = torch.manual_seed(0)
        >>> programs = {str(latent): pyro_vae.build((4,), latent=latent) for latent in (2, 3)}
        >>> found = pyro_vae.comparison.models(programs, torch.rand(20, 4).round())
        >>> models(found).axes[1].get_xlabel()
        'behind the best (nats per datum)'
    """
    from matplotlib.figure import Figure

    table, num_data = comparison.table, comparison.pointwise.sizes["datum"]
    names = [f"{name} (*)" if warning else str(name) for name, warning in zip(table.index, table.warning, strict=True)]
    figure = Figure(figsize=(10, 1.5 + 0.4 * len(names)), layout="constrained")
    elpd, behind = figure.subplots(1, 2, sharey=True)
    style = {"fmt": "o", "capsize": 3}
    elpd.errorbar(table.elpd / num_data, names, xerr=2 * table.se / num_data, color="C0", **style)
    error = (table.dse**2 + table.mc_dse**2) ** 0.5
    behind.errorbar(table.elpd_diff / num_data, names, xerr=2 * error / num_data, color="C1", **style)
    behind.axvline(0, color="0.3", linestyle="--")
    elpd.set(xlabel="log evidence (nats per datum)")
    behind.set(xlabel="behind the best (nats per datum)")
    for axes in (elpd, behind):
        axes.grid(axis="x", alpha=0.3)
        axes.margins(y=0.4 / len(names))
    elpd.invert_yaxis()
    note = "; * weights that cannot be trusted: may be far higher" if table.warning.any() else ""
    figure.suptitle(f"{num_data:,} held-out data, two standard errors{note}", fontsize="medium")
    return figure
