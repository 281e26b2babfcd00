"""k-hat of each datum against weights whose tail is known, on exact guides and on wrong ones."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from arviz_stats.base import array_stats
from oracles import GlobalMean, LinearGaussian, Mixture, TwoLatents, TwoSites
from torch import nn

import pyro_vae
from pyro_vae import diagnostics, evaluation, plots
from pyro_vae.diagnostics.khat import pareto_shapes
from pyro_vae.programs import data_plate

DATA = torch.randn(100, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def shrunk(k, num_particles):
    """The fit adds ten tail weights of shape 0.5."""
    tail = math.floor(3 * math.sqrt(num_particles))
    return (tail * k + 5) / (tail + 10)


@pytest.mark.parametrize("scale", [0.3, 0.5, 0.8])
def test_a_guide_that_is_too_narrow_has_the_shape_of_its_scale(scale):
    """In two dimensions both scaled by s, weights are Pareto of shape 1 - s^2, exactly.

    The tolerance is 4 standard errors of the mean over 100 data (false alarms 6e-5), and 0.02 for the fit's own bias
    at 1000 particles (measured over 8000 sets of Pareto weights: at most 0.015).
    """
    found = diagnostics.khat(LinearGaussian(scale=scale), DATA, seed=1)
    error = found.khat.std().item() / 10
    assert abs(found.khat.mean().item() - shrunk(1 - scale**2, 1000)) < 4 * error + 0.02
    assert error < 0.02
    assert found.verdict.holds == (scale == 0.8)


@pytest.mark.parametrize("program", [LinearGaussian(), LinearGaussian().float(), TwoSites(exact=True), GlobalMean(100)])
def test_an_exact_posterior_holds(program):
    """Weights are all the same but for rounding, of which no tail is fitted."""
    x = {LinearGaussian: DATA, TwoSites: DATA[:, :2], GlobalMean: DATA[:, 0]}[type(program)]
    found = diagnostics.khat(program, x)
    assert (found.khat == -math.inf).all()
    torch.testing.assert_close(found.ess, torch.full_like(found.ess, 1000), rtol=1e-3, atol=0)
    assert found.verdict.holds is True
    assert found.share == 0
    assert set(found.quantiles.values()) == {-math.inf}


def test_a_guide_that_is_too_wide_has_bounded_weights():
    """The density of weights is positive at their largest: k = -1, and the effective sample is exact.

    Of weights U^(s^2 - 1) it is (E w)^2 / E w^2 = (2 s^2 - 1) / s^4; means of 100 data, standard error below 0.2 %.
    """
    found = diagnostics.khat(LinearGaussian(scale=1.5), DATA)
    assert (found.khat < 0).all()
    assert found.verdict.holds is True
    assert found.ess.mean().item() / 1000 == pytest.approx((2 * 1.5**2 - 1) / 1.5**4, rel=0.01)


def test_each_datum_by_itself(monkeypatch):
    """Half of the data have an exact guide: they stay at minus infinity, in chunks and passes of any size."""

    class Half(LinearGaussian):
        def posterior(self, x):
            mean, std = super().posterior(x)
            return mean, std * torch.where(x[:, :1] > 0, 1.0, 0.2)

    whole = diagnostics.khat(Half(), DATA)
    exact = DATA[:, 0] > 0
    assert (whole.khat[exact] == -math.inf).all()
    assert (whole.khat[~exact] > 0.2).all()
    assert whole.verdict.holds is False
    assert abs(whole.share - (~exact).double().mean().item()) < 0.15
    monkeypatch.setattr(evaluation.batches, "VALUES_AT_ONCE", 3 * 256 * 7)
    chunked = diagnostics.khat(Half(), DATA)
    assert torch.equal(chunked.khat == -math.inf, exact)
    assert chunked.khat[~exact].mean().item() == pytest.approx(whole.khat[~exact].mean().item(), abs=0.1)


@pytest.mark.parametrize(("num_particles", "threshold"), [(100, 0.5), (1000, 2 / 3), (10_000, 0.7)])
def test_the_threshold_is_what_so_many_weights_resolve(num_particles, threshold):
    found = diagnostics.khat(LinearGaussian(), DATA[:2], num_particles)
    assert found.threshold == pytest.approx(threshold)
    assert found.num_particles == num_particles


def test_weights_that_no_tail_can_be_fitted_to():
    generator = torch.Generator().manual_seed(0)
    pareto = torch.empty(1000, dtype=torch.float64).exponential_(2.0, generator=generator)  # of shape 0.5
    columns = {
        "pareto": pareto,
        "shifted": pareto + 300,
        "rounding": pareto * 1e-14,
        "one infinite": torch.where(pareto == pareto.max(), math.inf, pareto),
        "not a number": torch.where(pareto == pareto.max(), math.nan, pareto),
        "all zero": torch.full_like(pareto, -math.inf),
        "half zero": torch.where(torch.arange(1000) < 500, -math.inf, pareto),
        "mostly zero": torch.where(torch.arange(1000) < 990, -math.inf, pareto),
        "too heavy": 1000 * pareto,
        "two values": (torch.arange(1000) < 300).double(),
        "ties below a few": torch.where(torch.arange(1000) < 990, 0.0, pareto),
    }
    shapes, sizes = pareto_shapes(torch.stack(list(columns.values()), 1), torch.full((len(columns),), 1e-12))
    found = dict(zip(columns, shapes.tolist(), strict=True))
    assert found["pareto"] == pytest.approx(0.5, abs=0.4)  # 4 standard deviations
    assert found["shifted"] == pytest.approx(found["pareto"], abs=1e-8)
    assert found["half zero"] == pytest.approx(0.5, abs=0.4)
    assert found["too heavy"] == math.inf
    for name in ("rounding", "two values"):
        assert found[name] == -math.inf
    for name in ("one infinite", "not a number", "all zero", "mostly zero", "ties below a few"):
        assert math.isnan(found[name]), name
    smoothed = array_stats.psislw(-pareto.numpy())[0]
    assert sizes[0].item() == pytest.approx(1 / np.exp(2 * smoothed).sum())
    assert sizes[list(columns).index("two values")].item() == pytest.approx((300 * math.e + 700) ** 2 / (
        300 * math.e**2 + 700
    ))  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_without_density_hide_no_tail(dtype):
    """A positive latent, whose guide is wide and off by six standard deviations, with some draws below zero."""

    class Positive(nn.Module):
        def model(self, x):
            with data_plate(x):
                z = pyro.sample("z", dist.HalfNormal(x.new_ones(5)).to_event(1))
                pyro.sample("x", dist.Normal(z, 0.05).to_event(1), obs=x)

        def guide(self, x):
            with data_plate(x):
                pyro.sample("z", dist.Normal(x + 0.3, 0.14).to_event(1))

    program = Positive()
    program.register_buffer("place", torch.zeros((), dtype=dtype))
    found = diagnostics.khat(program, torch.full((10, 5), 0.05, dtype=dtype))
    assert (found.khat > 1).all()
    assert (found.ess < 100).all()
    assert found.verdict.holds is False


def test_rounding_is_that_of_the_tail():
    """And where that is coarse, weights that seem the same are not known to be."""
    pareto = torch.empty(1000, dtype=torch.float64).exponential_(2.0)
    same = torch.zeros(1000, dtype=torch.float64)
    weights = torch.stack([pareto, pareto, same, same, same], 1)
    fine = torch.full_like(pareto, 1e-12)
    least, some = fine.clone(), fine.clone()
    least[pareto.argmin()] = math.inf
    some[0] = 0.2
    shapes, _ = pareto_shapes(weights, torch.stack([fine, least, fine, fine + 0.09, some], 1))
    assert shapes[0].isfinite()
    assert shapes[1] == shapes[0]
    assert shapes[2:4].tolist() == [-math.inf] * 2
    assert shapes[4].isnan()


def test_where_it_cannot_tell():
    class Impossible(nn.Module):
        """Data at which the model has no density."""

        def model(self, x):
            with data_plate(x):
                z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
                pyro.sample("x", dist.Normal(z, 1e-30), obs=x)  # which overflows

        def guide(self, x):
            with data_plate(x):
                pyro.sample("z", dist.Normal(x, 1.0))

    found = diagnostics.khat(Impossible(), torch.zeros(5))
    assert found.khat.isnan().all()
    assert found.verdict.holds is None
    assert "no k-hat in 100%" in found.verdict.finding
    assert math.isnan(found.quantiles[0.5])
    plots.khat(found)


def test_other_programs(tmp_path):
    discrete = diagnostics.khat(Mixture(), (DATA[:, :2] > 0).double())
    assert (discrete.khat == -math.inf).all()  # bounded, and the largest is not rare
    hierarchy = diagnostics.khat(TwoLatents(), torch.rand(20, 8, 8).round())
    assert hierarchy.khat.isfinite().all()
    assert hierarchy.verdict.holds is False
    for number, found in enumerate((discrete, hierarchy)):
        plots.khat(found).savefig(tmp_path / f"{number}.png")


def test_seeds_and_nothing_left_behind():
    vae, x = pyro_vae.build((8, 8), latent=2).train(), torch.ones(3, 8, 8)
    state = torch.get_rng_state()
    first, again, other = (diagnostics.khat(vae, x, 50, seed=seed).khat for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    assert vae.training
    for num_particles in (24, 1e3):
        with pytest.raises(ValueError, match=f"num_particles: expected .*, at least 25, got {num_particles}"):
            diagnostics.khat(vae, x, num_particles)
    with pytest.raises(ValueError, match="threshold: expected a number, got nan"):
        diagnostics.khat(vae, x, 50, threshold=math.nan)
