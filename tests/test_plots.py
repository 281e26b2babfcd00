"""Figures are drawn for every kind of data, and say what they show."""

import pandas as pd
import pytest
import torch
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
def test_training_curve(epochs, tmp_path):
    history = pd.DataFrame({
        "epoch": range(1, epochs + 1),
        "elbo": [-100.0 / (i + 1) for i in range(epochs)],
        "valid_elbo": [float("nan")] * epochs,
        "rate": [5.0] * epochs,
        "distortion": [80.0] * epochs,
        "beta": [0.5] * epochs,
    })  # fmt: skip
    figure = plots.training_curve(history)
    figure.savefig(tmp_path / "figure.png")
    assert [len(axes.lines) for axes in figure.axes] == [1, 2, 1]
