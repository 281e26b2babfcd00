"""Figures of what the ELBO loses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["inference_gap"]

COLORS = {"approximation": "C0", "amortization": "C1", "inference": "0.4"}


def inference_gap(result: Any) -> Figure:
    """Approximation and amortization gap of each datum, one upon the other, and the mean of each over the data.

    Bars are in order of the inference gap, which is their sum. Whiskers of data are two Monte Carlo standard errors of
    it, those of means two standard errors of the mean over data. The dashed line is what it may be at most.

    Args:
        result: What `pyro_vae.diagnostics.inference_gap` gave.

    Example:
        >>> import torch
        >>> from pyro_vae.diagnostics import InferenceGap
        >>> errors = dict.fromkeys(("log_evidence", "approximation", "amortization", "inference"), torch.zeros(3))
        >>> levels = torch.tensor([-90.0, -95.0, -99.0])
        >>> found = InferenceGap(levels, levels - 1, levels - 3, errors, {"importance sampling": -94.7}, threshold=1.0)
        >>> [axes.get_ylabel() for axes in inference_gap(found).axes]
        ['gap (nats)', 'mean gap (nats per datum)']
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    each, mean = figure.subplots(1, 2, width_ratios=(3, 1.6))
    order = result.inference.argsort(descending=True)
    ranks = range(1, len(order) + 1)
    approximation, amortization = (gap[order].numpy() for gap in (result.approximation, result.amortization))
    width = 1.0 if len(order) > 100 else 0.8
    each.bar(ranks, approximation, width, color=COLORS["approximation"], label="approximation")
    # A gap that noise has made negative is no part of the pile.
    base = approximation.clip(min=0)
    each.bar(ranks, amortization, width, bottom=base, color=COLORS["amortization"], label="amortization")
    total, errors = result.inference[order].numpy(), 2 * result.errors["inference"][order].numpy()
    each.errorbar(ranks, total, errors, fmt="none", ecolor="0.2", elinewidth=1, capsize=2)
    each.margins(y=0.2)  # room for the legend
    each.set(xlabel="datum, in order of its inference gap", ylabel="gap (nats)")
    each.xaxis.set_major_locator(MaxNLocator(integer=True))
    for position, (name, (value, error)) in enumerate(result.means.items()):
        whisker = {"yerr": 2 * error, "error_kw": {"ecolor": "0.2", "elinewidth": 1}, "capsize": 4}
        mean.bar(position, value, 0.7, color=COLORS[name], **whisker)
        mean.annotate(
            f"{value:.2f}", (position, max(0.0, value + 2 * error)), (0, 3), textcoords="offset points", ha="center"
        )
    mean.set_xticks(range(3), list(result.means), fontsize="small")
    mean.margins(y=0.25)
    mean.set_ylabel("mean gap (nats per datum)")
    for axes in (each, mean):
        most = axes.axhline(result.threshold, color="0.2", linestyle="--", linewidth=1)
        axes.axhline(0, color="0.2", linewidth=0.8)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    most.set_label("threshold")
    mean.legend(handles=[most], frameon=False, loc="upper left", fontsize="small")
    each.legend(frameon=False, ncols=2, loc="upper right")
    return figure
