"""Figures are drawn for every kind of data, and say what they show."""

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from matplotlib.figure import Figure

from pyro_vae import plots


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 6), (10,), (8, 8)])
def test_grids(shape, tmp_path):
    x = torch.rand(10, *shape)
    for figure in (plots.image_grid(x), plots.reconstructions(x, x, columns=4)):
        assert isinstance(figure, Figure)
        figure.savefig(tmp_path / "figure.png")


def test_reconstructions_stand_below_their_originals():
    x = torch.zeros(4, 1, 2, 2)
    grid = plots.reconstructions(x, x + 1, columns=2).axes[0].images[0].get_array()
    # Rows of two images, one pixel of padding: originals, reconstructions, originals, reconstructions.
    assert [grid[1 + 3 * row, 1, 0] for row in range(4)] == [0, 1, 0, 1]


@pytest.mark.parametrize("latent", [1, 2, 5])
@pytest.mark.parametrize("labels", [None, torch.arange(40) % 3, torch.arange(40)])
def test_latent_space(latent, labels, tmp_path):
    figure = plots.latent_space(torch.randn(40, latent), labels)
    figure.savefig(tmp_path / "figure.png")
    shown = figure.axes[0].get_legend()
    assert (shown is not None) == (labels is not None and len(labels.unique()) == 3)


@pytest.mark.parametrize("epochs", [1, 2, 40])
@pytest.mark.parametrize("flat", [False, True])
def test_training_curve(epochs, flat, tmp_path):
    history = pd.DataFrame({
        "epoch": range(1, epochs + 1),
        "elbo": [-100.0 if flat else -100.0 / (i + 1) for i in range(epochs)],
        "valid_elbo": [float("nan")] * epochs,
        "rate": [0.0 if flat else 5.0] * epochs,
        "distortion": [0.0 if flat else 80.0] * epochs,
        "beta": [0.5] * epochs,
    })  # fmt: skip
    figure = plots.training_curve(history)
    figure.savefig(tmp_path / "figure.png")
    assert [len(axes.lines) for axes in figure.axes] == [1, 2, 1]


@pytest.fixture
def comparison():
    def along(values):
        return ("estimator", np.array(values))

    return xr.Dataset(
        {
            "bound": along([-90.0, np.nan, -88.5]),
            "bound_se": along([0.1, np.nan, 0.2]),
            "reference": -87.0,
            "gradient_snr": (("estimator", "part"), np.array([[2.0, 0.0], [np.nan, 0.5], [3.0, 40.0]])),
            "milliseconds": along([3.0, 12.0, 30.0]),
            "memory": along([np.nan] * 3),
        },
        coords={"estimator": ["Trace_ELBO()", "TraceTailAdaptive_ELBO()", "DReG(8)"], "part": ["model", "guide"]},
    )


def test_estimators(comparison, tmp_path):
    """What is not known is left out, and a ratio of zero is an arrow left of all others."""
    figure = plots.estimators(comparison)
    figure.savefig(tmp_path / "figure.png")
    bound, snr, time, _ = figure.axes
    assert [label.get_text() for label in bound.get_yticklabels()] == list(comparison.estimator.values)
    assert bound.yaxis_inverted()
    assert [line.get_xdata()[0] for line in bound.lines if line.get_linestyle() == "--"] == [-87.0]
    marks = {(line.get_marker(), line.get_label()): np.asarray(line.get_xdata(), float) for line in snr.lines}
    np.testing.assert_equal(marks["o", "model"], [2, np.nan, 3])
    np.testing.assert_equal(marks["o", "guide"], [np.nan, 0.5, 40])
    (arrows,) = [xs for (marker, _), xs in marks.items() if marker == "<" and len(xs)]
    assert arrows == [0.25]
    assert snr.get_xscale() == "log"
    assert [bar.get_width() for bar in time.patches] == [3, 12, 30]
    assert time.get_xlim()[0] == 0
    assert [text.get_text() for text in time.texts] == ["3", "12", "30"]


def test_bars_of_bounds_are_two_standard_errors(comparison):
    (bars,) = plots.estimators(comparison).axes[0].containers
    (segments,) = (lines.get_segments() for lines in bars.lines[2])
    np.testing.assert_allclose(segments[0][:, 0], [-90.2, -89.8])


def test_estimators_of_which_little_is_known(comparison, tmp_path):
    comparison.gradient_snr[:] = 0.0
    plots.estimators(comparison.isel(estimator=[1])).savefig(tmp_path / "figure.png")
