"""Figures of the checks of a posterior: tails of its weights, its calibration, and the chains beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pyro_vae.diagnostics import Calibration, KHat, Nuts

__all__ = ["calibration", "khat", "nuts"]

GOOD, BAD = "C0", "C3"
NAMED = 6  # dimensions, the worst ones, that have a colour each


def khat(result: KHat) -> Figure:
    """Shapes of the weights' tails over the data in order, and against the effective sample size.

    Data whose shape is infinite stand at the edge as triangles: at the lower one where the largest weights are all the
    same, at the upper one where the others vanish beside a few.

    Args:
        result: What `diagnostics.khat` gave.

    Example:
        >>> import pyro_vae
        >>> from pyro_vae import diagnostics
        >>> found = diagnostics.khat(pyro_vae.build((8, 8), latent=2), torch.ones(3, 8, 8), num_particles=100)
        >>> [axes.get_xlabel() for axes in khat(found).axes]
        ['share of the data', 'effective sample size of 100']
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    order = result.khat.argsort()  # NaN comes last, and is not shown
    shapes, sizes = result.khat[order], result.ess[order]
    shares = (torch.arange(len(shapes)) + 0.5) / len(shapes)
    finite = shapes[shapes.isfinite()]
    ends = [*finite.tolist(), result.threshold, 0.0]
    low, high = min(ends), max(ends)
    floor, top = low - 0.15 * (high - low), high + 0.25 * (high - low)
    for axes, places in ((left, shares), (right, sizes)):
        for above, color in ((False, GOOD), (True, BAD)):
            chosen = shapes.isfinite() & ((shapes > result.threshold) == above)
            axes.plot(places[chosen], shapes[chosen], "o", color=color, markersize=4, alpha=0.7, markeredgewidth=0)
        for value, mark, color, edge in ((-torch.inf, "v", GOOD, floor), (torch.inf, "^", BAD, top)):
            beyond = places[shapes == value]
            axes.plot(beyond, torch.full((len(beyond),), edge), mark, color=color, markersize=5, alpha=0.7)
        axes.axhline(result.threshold, color="0.3", linestyle="--")
        axes.grid(alpha=0.3)
    left.set(
        xlabel="share of the data",
        ylabel="k-hat",
        xlim=(0, 1),
        ylim=(floor - 0.05 * (top - floor), top + 0.05 * (top - floor)),
    )
    if shapes.isinf().any():
        left.annotate("triangles: beyond the axis", (0.02, 0.97), xycoords="axes fraction", va="top", fontsize="small")
    left.set_title(f"{result.share:.0%} of {len(shapes)} data above {result.threshold:.2f}")
    right.set_xscale("log")
    right.set(xlabel=f"effective sample size of {result.num_particles}", xlim=(0.8, 1.25 * result.num_particles))
    right.set_title(f"median effective sample {result.ess.nanmedian():.0f}")
    return figure


def calibration(result: Calibration) -> Figure:
    """Distribution of the ranks of each latent dimension, less the uniform one, with the simultaneous band.

    Dimensions that are not calibrated are coloured, the others grey. A guide that is too narrow rises above the band on
    the left and falls below it on the right, one that is too wide the other way round; one that is too high is above it
    throughout, one that is too low below.

    Args:
        result: What `diagnostics.calibration` gave.

    Example:
        >>> import pyro_vae
        >>> from pyro_vae import diagnostics
        >>> found = diagnostics.calibration(pyro_vae.build((8, 8), latent=2), num=50, num_samples=20)
        >>> calibration(found).axes[0].get_xlabel()
        'rank among 20 draws, as a share'
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    uniform = torch.arange(1, result.num_samples + 1, dtype=torch.float64) / (result.num_samples + 1)
    lower, upper = result.lower - uniform, result.upper - uniform
    axes.fill_between(uniform, lower, upper, color="0.9", step="post", label="95 % band, of all dimensions")
    differences = (result.ecdf - uniform[:, None]).T
    rejected = result.rejected
    for difference in differences[~rejected]:
        axes.step(uniform, difference, where="post", color="0.45", linewidth=0.8, alpha=0.7)
    off = [int(i) for i in result.p_values.argsort() if rejected[i]]
    for place, i in enumerate(off):
        style = {"color": f"C{place}", "linewidth": 1.4, "label": f"{result.names[i]}: {result.shapes[i]}"}
        if place >= NAMED:
            style = {"color": BAD, "linewidth": 0.7, "alpha": 0.5, "zorder": 1.5}
        axes.step(uniform, differences[i], where="post", **style)
    if len(off) > NAMED:
        axes.plot([], [], color=BAD, linewidth=0.7, label=f"{len(off) - NAMED} others that are off")
    if len(off) < len(rejected):
        axes.plot([], [], color="0.45", linewidth=0.8, label=f"{len(rejected) - len(off)} not seen to be off")
    axes.axhline(0, color="0.3", linewidth=0.8, linestyle="--")
    axes.set(xlabel=f"rank among {result.num_samples} draws, as a share", ylabel="share of ranks below, less uniform")
    axes.set(xlim=(0, 1), title=f"{len(off)} of {len(rejected)} dimensions off, {len(result.ranks)} simulations")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def nuts(result: Nuts) -> Figure:
    """Means and scales of the guide against those of the chains, and the distances of the marginals.

    Each point is a latent dimension of a datum. Those further off than the threshold are red, and those of data whose
    chains are of no use are hollow. What is not finite is not shown.

    Args:
        result: What `diagnostics.nuts` gave.

    Example:
        >>> import pyro_vae
        >>> from pyro_vae import diagnostics
        >>> vae, x = pyro_vae.build((8, 8), latent=2), torch.ones(1, 8, 8)
        >>> found = diagnostics.nuts(vae, x, num_samples=10, warmup_steps=10, num_chains=2)
        >>> [axes.get_title() for axes in nuts(found).axes]
        ['mean', 'standard deviation', 'distance']
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.8), layout="constrained")
    means, scales, distances = figure.subplots(1, 3, width_ratios=(4, 4, 3))
    _against(means, result, result.mean, result.guide_mean)
    _against(scales, result, result.scale, result.guide_scale)
    means.set(title="mean", xlabel="NUTS", ylabel="guide")
    scales.set(title="standard deviation", xlabel="NUTS", ylabel="guide")
    values = result.distance[result.mixed].flatten().sort().values
    shares = (torch.arange(len(values)) + 0.5) / max(len(values), 1)
    distances.plot(shares, values, color=GOOD, marker="o", markersize=3)
    errors = result.error[result.mixed]
    limit = result.threshold + (errors[errors.isfinite()].mean().item() if errors.isfinite().any() else 0.0)
    distances.axhline(limit, color="0.3", linestyle="--", label="threshold and error")
    distances.set(title="distance", xlabel="share of dimensions", ylabel="Wasserstein distance (sd of NUTS)")
    distances.set(xlim=(0, 1), ylim=(0, 1.2 * max([limit, *values[values.isfinite()].tolist()])))
    distances.legend(frameon=False, loc="upper left")
    for axes in (means, scales, distances):
        axes.grid(alpha=0.3)
    return figure


def _against(axes: Axes, result: Nuts, chains: torch.Tensor, guide: torch.Tensor) -> None:
    """Points around the diagonal."""
    far = result.distance > result.threshold + result.error
    mixed = result.mixed[:, None].expand_as(far)
    for chosen, color, label in ((~far & mixed, GOOD, "near"), (far & mixed, BAD, "far")):
        if chosen.any():
            axes.plot(chains[chosen], guide[chosen], "o", color=color, markersize=4, alpha=0.7, label=label)
    if not mixed.all():
        axes.plot(
            chains[~mixed], guide[~mixed], "o", color="0.5", markersize=4, fillstyle="none", label="chains of no use"
        )
    both = torch.cat([chains.flatten(), guide.flatten()])
    finite = both[both.isfinite()].tolist() or [0.0]  # an axis has no place for others
    low, high = min(finite), max(finite)
    room = 0.06 * (high - low) or 1.0
    ends = (low - room, high + room)
    axes.plot(ends, ends, color="0.3", linestyle="--", linewidth=0.8)
    axes.set(xlim=ends, ylim=ends, aspect="equal")
    axes.legend(frameon=False, loc="upper left", handletextpad=0.2)
