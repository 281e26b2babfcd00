"""Figures of a run: its training, its data and draws, its latents, its estimators."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["estimators", "image_grid", "is_image", "latent_space", "reconstructions", "training_curve"]


def training_curve(history: pd.DataFrame) -> Figure:
    """ELBO, rate, distortion and beta over epochs, from the history of `fit`.

    Example:
        >>> import pandas as pd
        >>> row = {"epoch": 1, "elbo": -90.0, "valid_elbo": float("nan"), "rate": 20.0, "distortion": 70.0, "beta": 1.0}
        >>> len(training_curve(pd.DataFrame([row])).axes)
        3
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    elbo, parts, beta = figure.subplots(1, 3, width_ratios=(3, 3, 2))
    mark = "o" if len(history) == 1 else None
    elbo.plot(history.epoch, history.elbo, label="train", marker=mark)
    if history.valid_elbo.notna().any():
        elbo.plot(history.epoch, history.valid_elbo, label="valid")
    parts.plot(history.epoch, history.distortion, label="distortion", color="C2", marker=mark)
    parts.plot(history.epoch, history.rate, label="rate", color="C3", marker=mark)
    beta.plot(history.epoch, history.beta, color="C4", marker=mark)
    for axes, title in (
        (elbo, "ELBO (nats per datum)"),
        (parts, "rate and distortion (nats per datum)"),
        (beta, "beta"),
    ):
        axes.set(title=title, xlabel="epoch")
        axes.grid(alpha=0.3)
    elbo.legend()
    parts.legend()
    # The first epochs lie so far below the rest that they would hide it.
    settled = history.elbo.iloc[len(history) // 20 :]
    if len(settled) > 1:
        low = min(settled.min(), history.valid_elbo.iloc[len(history) // 20 :].min())
        high = history[["elbo", "valid_elbo"]].max().max()
        _show(elbo, low, high)
        both = history[["rate", "distortion"]].iloc[max(1, len(history) // 20) :]
        low, high = min(0.0, both.min().min()), both.max().max()
        _show(parts, low, high, below=0.0)
    beta.set_ylim(0, 1.1 * max(1.0, history.beta.max()))
    return figure


def _show(axes: Any, low: float, high: float, below: float = 1.0) -> None:
    """Show these values, with a margin that a flat curve has too."""
    margin = max(0.05 * (high - low), 1e-3 * max(1.0, abs(high)))
    if math.isfinite(margin):
        axes.set_ylim(low - below * margin, high + margin)


def image_grid(x: Tensor, columns: int = 8) -> Figure:
    """Data side by side: images in a grid, other data as the rows of a matrix.

    Args:
        x: Tensor of shape `(N, channels, height, width)` with values in [0, 1], or `(N, *event_shape)`.
        columns: Images in a row.

    Example:
        >>> len(image_grid(torch.rand(16, 1, 8, 8)).axes)
        1
    """
    from matplotlib.figure import Figure

    if not is_image(tuple(x.shape[1:])):
        figure = Figure(figsize=(8, 4), layout="constrained")
        axes = figure.subplots()
        # Columns of a table may differ a thousandfold, and one scale would show the largest alone.
        rows = x.flatten(1).double()
        rows = (rows - rows.mean(0)) / rows.std(0, correction=0).clamp(min=1e-12)
        drawn = axes.imshow(rows.numpy(), aspect="auto", interpolation="nearest", vmin=-3, vmax=3)
        axes.set(xlabel="dimension", ylabel="datum")
        figure.colorbar(drawn, label="standard deviations from the dimension's mean")
        return figure
    from torchvision.utils import make_grid

    grid = make_grid(x.float().clamp(0, 1), nrow=columns, padding=1, pad_value=0.5)
    inches = 5.0 / max(grid.shape[1:])
    figure = Figure(figsize=(inches * grid.shape[2], inches * grid.shape[1]), dpi=200)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest")
    axes.set_axis_off()
    return figure


def reconstructions(x: Tensor, reconstructed: Tensor, columns: int = 16) -> Figure:
    """Originals, each with its reconstruction below it: images in rows, other data as alternate rows of a matrix.

    Args:
        x: Data of shape `(N, *event_shape)`.
        reconstructed: Their reconstructions, of the same shape.
        columns: Images in a row.

    Example:
        >>> len(reconstructions(torch.rand(16, 1, 8, 8), torch.rand(16, 1, 8, 8)).axes)
        1
        >>> reconstructions(torch.rand(16, 3), torch.rand(16, 3)).axes[0].get_ylabel()
        'data and reconstructions in turn'
    """
    if not is_image(tuple(x.shape[1:])):
        figure = image_grid(torch.stack([x, reconstructed], 1).flatten(0, 1))
        figure.axes[0].set(ylabel="data and reconstructions in turn", yticks=[])
        return figure
    pairs = [half for row in zip(x.split(columns), reconstructed.split(columns), strict=True) for half in row]
    return image_grid(torch.cat(pairs), columns)


def latent_space(means: Tensor, labels: Tensor | None = None) -> Figure:
    """Posterior means in the plane, coloured by label; two principal components where there are more dimensions.

    Args:
        means: Tensor of shape `(N, latent)`.
        labels: Integer labels of shape `(N,)`, or None.

    Example:
        >>> latent_space(torch.randn(20, 3)).axes[0].get_xlabel().split(" (")[0]
        'principal component 1'
    """
    from matplotlib.figure import Figure

    means = means.float()
    points, names = means.numpy(), ["z1", "z2"]
    if means.shape[1] == 1:
        points, names = torch.cat([means, torch.zeros_like(means)], 1).numpy(), ["z1", ""]
    elif means.shape[1] > 2:
        from sklearn.decomposition import PCA

        pca = PCA(2)
        points = pca.fit_transform(points)
        names = [f"principal component {i + 1} ({share:.0%})" for i, share in enumerate(pca.explained_variance_ratio_)]
    figure = Figure(figsize=(5.6, 5), layout="constrained")
    axes = figure.subplots()
    style: Any = {"s": min(25.0, max(4.0, 8000 / len(means))), "alpha": 0.7, "edgecolors": "none"}
    kinds = [] if labels is None else labels.unique().tolist()
    if 1 < len(kinds) <= 10:
        for kind in kinds:
            axes.scatter(*points[(labels == kind).numpy()].T, label=str(kind), **style)
        axes.legend(markerscale=6 / style["s"] ** 0.5, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    else:
        axes.scatter(points[:, 0], points[:, 1], c=None if labels is None else labels.numpy(), **style)
    axes.set(xlabel=names[0], ylabel=names[1], title="posterior means")
    return figure


def estimators(comparison: xr.Dataset) -> Figure:
    """Estimators side by side: bounds with two standard errors, signal-to-noise ratios, milliseconds and memory.

    The best of each panel lies to the right for bounds and ratios, to the left for time and memory. A ratio that could
    not be told from zero is an arrow at the left edge.

    Args:
        comparison: What `pyro_vae.estimators.compare` gave.

    Example:
        >>> import pyro_vae
        >>> from pyro.infer import Trace_ELBO
        >>> vae, x = pyro_vae.build((8, 8), latent=2), torch.ones(3, 8, 8)
        >>> found = pyro_vae.estimators.compare(vae, x, {"ELBO": Trace_ELBO()}, repeats=2, progress=False)
        >>> [axes.get_xlabel() for axes in estimators(found).axes]
        ['bound (nats per datum)', 'gradient SNR', 'milliseconds a step', 'peak memory (MiB)']
    """
    from matplotlib.figure import Figure

    names = [str(name) for name in comparison.estimator.values]
    figure = Figure(figsize=(12, 1.4 + 0.32 * len(names)), layout="constrained")
    bound, snr, time, memory = figure.subplots(1, 4, sharey=True, width_ratios=(4, 3, 2, 2))
    bound.errorbar(comparison.bound, names, xerr=2 * comparison.bound_se, fmt="o", color="C0", capsize=3)
    reference = comparison.reference.item()
    bound.axvline(reference, color="0.3", linestyle="--", label=f"log-evidence {reference:.2f}")
    bound.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    _ratios(snr, comparison.gradient_snr, names)
    for axes, values in ((time, comparison.milliseconds), (memory, comparison.memory)):
        axes.bar_label(axes.barh(names, values, color="C7", height=0.6), fmt="%.3g", padding=2, fontsize="small")
        axes.margins(x=0.25)  # room for the numbers
    labels = ("bound (nats per datum)", "gradient SNR", "milliseconds a step", "peak memory (MiB)")
    for axes, label in zip(figure.axes, labels, strict=True):
        axes.set_xlabel(label)
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
    bound.invert_yaxis()
    return figure


def _ratios(axes: Axes, snr: xr.DataArray, names: list[str]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    positive = snr.values[snr.values > 0]
    edge = positive.min() / 2 if len(positive) else 0.1
    for part, color, shift in (("model", "C1", -0.12), ("guide", "C2", 0.12)):
        values = snr.sel(part=part)
        rows = [row + shift for row in range(len(names))]
        axes.plot(values.where(values > 0), rows, "o", color=color, label=part)
        zero = [row for row, value in zip(rows, values, strict=True) if value == 0]
        axes.plot([edge] * len(zero), zero, "<", color=color, markersize=10)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)


def is_image(event_shape: tuple[int, ...]) -> bool:
    """Whether data of this shape can be shown as grey or colour images.

    Example:
        >>> is_image((1, 28, 28)), is_image((784,))
        (True, False)
    """
    return len(event_shape) == 3 and event_shape[0] in (1, 3)
