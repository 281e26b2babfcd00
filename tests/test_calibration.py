"""Simulation-based calibration: exact p-values, exact posteriors that pass, wrong ones that fail."""

import itertools

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import GlobalMean, LinearGaussian, Mixture, TwoLatents, TwoSites
from scipy import stats
from torch import nn

import pyro_vae
from pyro_vae import diagnostics, evaluation, plots
from pyro_vae.diagnostics.calibration import band, uniformity
from pyro_vae.programs import data_plate

DATA = torch.randn(100, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
EXACT = {
    "linear": (LinearGaussian(), DATA),
    "two sites": (TwoSites(exact=True), DATA[:, :2]),
    "global": (GlobalMean(100), DATA[:, 0] + 3),  # of another mean than data that are withheld
}


@pytest.mark.parametrize(("num", "num_samples"), [(3, 3), (5, 2), (4, 4)])
def test_p_values_are_those_of_all_outcomes(num, num_samples):
    """By enumeration: how often the smallest binomial tail of uniform ranks is at most that of these."""
    outcomes = torch.tensor(list(itertools.product(range(num_samples + 1), repeat=num)))
    levels = torch.arange(num_samples)[:, None, None]
    counts = (outcomes <= levels).sum(-1).numpy()
    shares = (np.arange(1, num_samples + 1) / (num_samples + 1))[:, None]
    tails = np.minimum(stats.binom.cdf(counts, num, shares), stats.binom.sf(counts - 1, num, shares)).min(0)
    expected = (tails[None] <= tails[:, None] * (1 + 1e-9)).mean(1)
    got = uniformity(outcomes.T, num_samples)
    torch.testing.assert_close(got, torch.from_numpy(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("num", "num_samples"), [(200, 50), (60, 9)])
def test_p_values_are_uniform_where_ranks_are(num, num_samples):
    """Kolmogorov's test over 400 sets of ranks: false alarms 1e-4, and the level of 5 % is kept within 4 errors."""
    p = uniformity(torch.randint(0, num_samples + 1, (num, 400)), num_samples)
    assert stats.kstest(p.numpy(), "uniform").pvalue > 1e-4
    assert abs((p < 0.05).double().mean().item() - 0.05) < 4 * (0.05 * 0.95 / 400) ** 0.5


def test_the_band_is_that_of_the_p_value():
    """Ranks leave the band as often as their p-value is at most the level, and at the same sets of them."""
    ranks = torch.randint(0, 31, (150, 500))
    lower, upper = band(150, 30, 0.1)
    shares = (ranks[None] <= torch.arange(30)[:, None, None]).double().mean(1)
    outside = ((shares < lower[:, None] - 1e-9) | (shares > upper[:, None] + 1e-9)).any(0)
    assert torch.equal(outside, uniformity(ranks, 30) <= 0.1)
    assert outside.any()
    assert not outside.all()


@pytest.mark.parametrize("zeros", [70, 100, 200, 265, 1000])
def test_far_from_uniform_p_values_are_small_and_not_below_zero(zeros):
    """Not below the chance of so many zeros, where 10 are expected, and not above that of any such tail."""
    ranks = torch.where(torch.arange(1000) < zeros, 0, torch.arange(1000) % 101)[:, None]
    p, tail = uniformity(ranks, 100).item(), stats.binom.sf((ranks == 0).sum().item() - 1, 1000, 1 / 101)
    assert 1.9 * tail <= p <= 200 * tail  # as so many at the other end are as rare


@pytest.mark.parametrize("name", EXACT)
def test_an_exact_posterior_passes(name):
    """An exact posterior fails with probability 0.05 for each program and seed; seed 0."""
    program, x = EXACT[name]
    found = diagnostics.calibration(program, like=x)
    assert found.verdict.holds is True
    assert not found.rejected.any()
    assert found.ranks.shape == (1000, len(found.names))
    assert (found.ecdf >= found.lower[:, None]).all()
    assert (found.ecdf <= found.upper[:, None]).all()


@pytest.mark.parametrize(("scale", "shape"), [(1.25, "too wide"), (0.8, "too narrow")])
def test_a_scale_that_is_off_by_a_quarter_fails(scale, shape):
    """In both dimensions; missed with a probability below 1e-3 (none of 600 simulated sets of ranks was)."""
    found = diagnostics.calibration(LinearGaussian(scale=scale), like=DATA)
    assert found.verdict.holds is False
    assert found.rejected.all()
    assert found.shapes == [shape, shape]
    assert f"z[0] {shape}" in found.verdict.finding
    assert (found.p_values < 1e-3).all()


@pytest.mark.parametrize(("shift", "shape"), [(0.4, "too high"), (-0.4, "too low")])
def test_a_mean_that_is_off_fails(shift, shape):
    class Shifted(LinearGaussian):
        def posterior(self, x):
            mean, std = super().posterior(x)
            return mean + shift * std * torch.tensor([0, 1]), std

    found = diagnostics.calibration(Shifted(), like=DATA)
    assert found.rejected.tolist() == [False, True]
    assert found.shapes[1] == shape
    assert found.verdict.holds is False


class Wide(nn.Module):
    """Sixty independent dimensions z ~ N(0, 1), x ~ N(z, 1), with the exact posterior but for the first few."""

    def __init__(self, scales):
        super().__init__()
        self.scales = torch.ones(60, dtype=torch.float64)
        self.scales[: len(scales)] = torch.tensor(scales)

    def model(self, x):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(self.scales), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(self, x):
        with data_plate(x):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5 * self.scales).to_event(1))


def test_many_dimensions_do_not_add_up_to_a_false_alarm(tmp_path):
    """Of 60 exact dimensions 3 have p < 0.05 in the mean: all of them by themselves are uniform, 300 simulations."""
    like = torch.zeros(50, 60, dtype=torch.float64)
    exact = diagnostics.calibration(Wide([]), 300, like=like)
    assert exact.verdict.holds is True
    assert stats.kstest(exact.p_values.numpy(), "uniform").pvalue > 1e-3  # independent dimensions
    assert torch.equal(exact.lower, band(300, 100, 0.05 / 60)[0])
    found = diagnostics.calibration(Wide([0.5] * 8 + [2.0]), 300, like=like)
    assert found.rejected.nonzero().flatten().tolist() == list(range(9))
    assert "9 of 60 latent dimensions are off" in found.verdict.finding
    assert "too narrow" in found.verdict.finding
    for number, result in enumerate((exact, found)):
        figure = plots.calibration(result)
        figure.savefig(tmp_path / f"{number}.png")
    assert "3 others that are off" in [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def test_few_simulations_cannot_tell_but_can_say_no():
    few = diagnostics.calibration(LinearGaussian(), 50, like=DATA)
    assert few.verdict.holds is None
    assert "simulations" in few.verdict.advice
    assert diagnostics.calibration(LinearGaussian(scale=0.2), 50, like=DATA).verdict.holds is False


@pytest.mark.parametrize(("num_samples", "holds"), [(1, None), (19, None), (20, True)])
def test_few_draws_cannot_tell(num_samples, holds):
    """Of a single draw, ranks are uniform at any scale. An exact posterior fails with probability 0.05; seed 0."""
    found = diagnostics.calibration(LinearGaussian(), num_samples=num_samples, like=DATA)
    assert found.verdict.holds is holds
    narrow = diagnostics.calibration(LinearGaussian(scale=0.05), num_samples=num_samples, like=DATA)
    assert narrow.verdict.holds is (None if num_samples == 1 else False)
    if holds is None:
        assert "num_samples=20" in found.verdict.advice


def test_draws_that_are_not_finite_have_no_rank():
    class Diverged(LinearGaussian):
        def posterior(self, x):
            mean, std = super().posterior(x)
            return mean * torch.tensor([1.0, torch.nan]), std

    with pytest.raises(ValueError, match=r"calibration: expected finite draws from the guide, got .* in z\[1\]"):
        diagnostics.calibration(Diverged(), 50, like=DATA)


def test_holm():
    found = diagnostics.calibration(LinearGaussian(), 10, like=DATA)
    for p, rejected in (
        ([0.01, 0.04, 0.03, 0.005], [True, False, False, True]),
        ([0.5, 0.012], [False, True]),
        ([0.026, 0.04], [False, False]),
        ([0.02, 0.04], [True, True]),
    ):
        result = diagnostics.Calibration((), found.ranks, 100, torch.tensor(p), found.lower, found.upper)
        assert result.rejected.tolist() == rejected


def test_ties_of_discrete_latents_are_broken_at_random():
    """The guide is the posterior of data that say nothing of z; exact ranks are uniform all the same (0.05 fail)."""

    class Coin(nn.Module):
        def __init__(self, guess):
            super().__init__()
            self.guess = guess

        def model(self, x):
            with data_plate(x):
                pyro.sample("z", dist.Bernoulli(torch.tensor(0.3)))
                pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

        def guide(self, x):
            with data_plate(x):
                pyro.sample("z", dist.Bernoulli(torch.full_like(x, self.guess)))

    assert diagnostics.calibration(Coin(0.3), like=torch.zeros(20)).verdict.holds is True
    assert diagnostics.calibration(Coin(0.5), like=torch.zeros(20)).verdict.holds is False
    assert diagnostics.calibration(Mixture(), like=DATA[:, :2] > 0).verdict.holds is False


def test_the_shape_of_the_data():
    vae = pyro_vae.build((8, 8), latent=2)
    alone = diagnostics.calibration(vae, 20, 10)
    assert alone.ranks.shape == (20, 2)
    like = diagnostics.calibration(vae, 20, 10, like=torch.ones(3, 8, 8))  # rows in turn
    assert like.ranks.shape == (20, 2)
    hierarchy = diagnostics.calibration(TwoLatents(), 20, 10, like=torch.ones(3, 8, 8))
    assert hierarchy.names == ("z2[0]", "z2[1]", "z1[0]", "z1[1]", "z1[2]", "z1[3]")
    with pytest.raises(ValueError, match="TwoLatents: expected a program of x alone with .*event_shape.*like=x"):
        diagnostics.calibration(TwoLatents(), 20)
    with pytest.raises(ValueError, match="num: expected a whole number, at least 1, got 0"):
        diagnostics.calibration(vae, 0)
    with pytest.raises(ValueError, match="num: expected a whole number, at least 1, got 100.0"):
        diagnostics.calibration(vae, 1e2)


def test_companions_of_the_data_are_used():
    """z ~ Gamma, x ~ Poisson(z * exposure), whose posterior is Gamma: it needs the exposure of each row."""

    class Rate(nn.Module):
        num_inputs = 2

        def __init__(self, forget=False):
            super().__init__()
            self.forget = forget

        def model(self, x, exposure):
            with data_plate(x):
                z = pyro.sample("z", dist.Gamma(torch.tensor(2.0), 1.0))
                pyro.sample("x", dist.Poisson(z * exposure), obs=x)

        def guide(self, x, exposure):
            with data_plate(x):
                pyro.sample("z", dist.Gamma(2.0 + x, 1.0 + (1.0 if self.forget else exposure)))

    like = torch.utils.data.TensorDataset(torch.ones(40), torch.linspace(0.1, 5.0, 40))
    assert diagnostics.calibration(Rate(), like=like).verdict.holds is True
    assert diagnostics.calibration(Rate(forget=True), like=like).verdict.holds is False


def test_seeds_chunks_and_nothing_left_behind(monkeypatch):
    program = LinearGaussian().train()
    state = torch.get_rng_state()
    first, again, other = (diagnostics.calibration(program, 40, 20, like=DATA, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.ranks, again.ranks)
    assert not torch.equal(first.ranks, other.ranks)
    assert torch.equal(torch.get_rng_state(), state)
    assert program.training
    seen = []
    monkeypatch.setattr(evaluation.batches, "VALUES_AT_ONCE", 3 * 20 * 7)
    monkeypatch.setattr(LinearGaussian, "posterior", watched(LinearGaussian.posterior, seen))
    assert diagnostics.calibration(program, 40, 20, like=DATA).ranks.shape == (40, 2)
    assert max(seen) == 7


def watched(function, seen):
    def posterior(self, x):
        seen.append(len(x))
        return function(self, x)

    return posterior


def test_what_else_is_observed_is_refused():
    """A latent that is drawn from the prior is not of the posterior given another observation."""

    class Second(LinearGaussian):
        def model(self, x):
            with data_plate(x):
                z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z @ self.weight.T, 1.0).to_event(1), obs=x)
                pyro.sample("y", dist.Normal(z[..., 0], 1.0), obs=x[:, 0])

    with pytest.raises(ValueError, match=r"alone, got \['y'\] too"):
        diagnostics.calibration(Second(), 10, like=torch.randn(5, 3, dtype=torch.float64))
