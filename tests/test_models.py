"""Programs compared by held-out evidence: exact differences and errors, what cannot be told, what does not compare."""

import math
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from oracles import GlobalMean, LinearGaussian, Mixture, ProbabilisticPCA, TwoLatents, TwoSites
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_vae import VAE, comparison, diagnostics, likelihoods, networks, plots, posteriors, priors
from pyro_vae.data import InMemory
from pyro_vae.evaluation import annealed_log_likelihood
from pyro_vae.export import to_arviz
from pyro_vae.programs import declare_parameters


class Rate(nn.Module):
    """Counts of one rate, with a latent that has nothing to do with them; at rate 0, all but 0 is impossible."""

    def __init__(self, rate):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(rate, dtype=torch.float64))

    def model(self, x):
        declare_parameters(self)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Poisson(self.rate), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))


class More(LinearGaussian):
    """It observes one value of the data twice."""

    def model(self, x):
        declare_parameters(self)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.weight.T + self.bias, self.noise).to_event(1), obs=x)
            pyro.sample("y", dist.Normal(z[..., 0], 1.0), obs=x[:, 0])


@pytest.fixture
def x():
    """Of `LinearGaussian()`."""
    program = LinearGaussian()
    z, noise = torch.randn(200, 2, dtype=torch.float64), 0.7 * torch.randn(200, 3, dtype=torch.float64)
    return (z @ program.weight.T + program.bias + noise).detach()


def compare(programs, x, num_particles=30, **options):
    return comparison.models(programs, x, num_particles, **options)


def test_exact_guides_give_exact_differences_and_errors(x):
    """Each weight is the evidence, so that there is no Monte Carlo error."""
    programs = {"loud": LinearGaussian(noise=1.2), "true": LinearGaussian(), "quiet": LinearGaussian(noise=0.5)}
    found = compare(programs, x)
    exact = {name: program.evidence(x).detach().numpy() for name, program in programs.items()}
    for name, evidence in exact.items():
        np.testing.assert_allclose(found.pointwise.log_evidence.sel(model=name), evidence, rtol=1e-9)
        row, difference = found.table.loc[name], exact["true"] - evidence
        assert row.elpd == pytest.approx(evidence.sum())
        assert row.se == pytest.approx(math.sqrt(200) * evidence.std())
        assert row.elpd_diff == pytest.approx(difference.sum(), abs=1e-9)
        assert row.dse == pytest.approx(math.sqrt(200) * difference.std(), abs=1e-9)
        assert row.mc_se == pytest.approx(0, abs=1e-5)
        assert row.low_ess == 0
        assert not row.warning
    order = sorted(exact, key=lambda name: -exact[name].sum())
    assert list(found.table.index) == order
    assert found.table["rank"].tolist() == [0, 1, 2]
    assert found.table.weight.sum() == pytest.approx(1)
    np.testing.assert_allclose(found.pointwise.ess, 30)
    assert order[0] == "true"
    assert found.verdict.holds is True
    ahead = (exact["true"] - exact[order[1]]).mean()
    assert found.verdict.finding.startswith(f"true is ahead of {order[1]} by {ahead:.3f} ± ")
    assert found.verdict.finding.endswith("and of all 2 others")


def test_a_difference_within_noise_cannot_be_told(x):
    """Two noise scales that differ by 1 %; and one program twice, whose difference is nothing."""
    found = compare({"one": LinearGaussian(noise=0.7), "other": LinearGaussian(noise=0.707)}, x)
    assert found.verdict.holds is None
    assert str(found.verdict).startswith("cannot tell: ")
    assert "more data" in found.verdict.advice
    found = compare({"one": LinearGaussian(scale=0.9), "again": LinearGaussian(scale=0.9)}, x, 1000)
    assert found.table.elpd_diff.tolist() == [0, 0]
    assert found.verdict.holds is None


def test_a_difference_above_its_error_but_negligible_cannot_be_told(x):
    """Less than 4 nats over all data, though the program is ahead on each datum alike."""
    shifted = compare({"one": LinearGaussian(), "other": LinearGaussian()}, x)
    table = shifted.table.copy()
    for behind, holds in ((3.9, None), (4.1, True)):
        table.loc[table.index[1], ["elpd_diff", "dse", "mc_dse", "mc_bias"]] = [behind, 0.1, 0.0, 0.0]
        assert comparison.ModelComparison(shifted.pointwise, table).verdict.holds is holds
    table.loc[table.index[1], "mc_bias"] = 4.0  # by which the other may be too low
    assert comparison.ModelComparison(shifted.pointwise, table).verdict.holds is None


def test_enumerated_evidence_within_the_errors_that_are_claimed():
    """Of 60 data and two programs (seed 0): z-scores within 4.5 each, and of scale one within 25 %."""
    programs = {"one": Mixture(), "other": Mixture()}
    programs["other"].posterior.data = torch.tensor([0.5, 0.0, -0.5], dtype=torch.float64)
    x = torch.randint(2, (60, 2)).double()
    found = compare(programs, x, 4000)
    scores = torch.stack([
        (torch.from_numpy(found.pointwise.log_evidence.sel(model=name).values) - program.evidence(x))
        / torch.from_numpy(found.pointwise.error.sel(model=name).values)
        for name, program in programs.items()
    ]).detach()  # fmt: skip
    assert scores.abs().max() < 4.5
    assert scores.square().mean().sqrt() == pytest.approx(1, rel=0.25)
    squares = (found.pointwise.error**2).sum("datum")
    for name in programs:
        assert found.table.mc_se[name] == pytest.approx(math.sqrt(squares.sel(model=name)))
        assert found.table.mc_bias[name] == pytest.approx(squares.sel(model=name).item() / 2)
    assert found.table.mc_dse.iloc[1] == pytest.approx(math.sqrt(squares.sum()))
    assert found.table.mc_dse.iloc[0] == 0


def test_probabilistic_pca_prefers_the_number_of_latents_that_made_the_data():
    z, noise = torch.randn(800, 2, dtype=torch.float64), 0.5 * torch.randn(800, 5, dtype=torch.float64)
    x = z @ torch.tensor([[1.5, 0.2, 0.4, 0.0, -0.6], [0.0, 1.0, -1.0, 0.5, 0.3]], dtype=torch.float64) + noise
    programs = {f"{k}": ProbabilisticPCA(k, 5).to_maximum_likelihood(x[:400]) for k in (1, 2, 3)}
    found = compare(programs, x[400:])
    assert found.table.index[0] != "1"
    assert found.table.elpd_diff["1"] > 2 * found.table.dse["1"]
    for name, program in programs.items():
        assert found.table.elpd[name] == pytest.approx(program.evidence(x[400:]).sum().item())


def test_weights_that_cannot_be_trusted_are_warned_of(x):
    """The guide of the better model is far too narrow, so that its evidence is underestimated by any amount."""
    programs = {"exact": LinearGaussian(noise=0.9), "narrow": LinearGaussian(scale=0.05)}
    with pytest.warns(
        UserWarning, match="high k-hat or a low effective size for .* of the data with narrow, .*method=.ais"
    ):
        found = compare(programs, x, 50)
    assert found.table.warning["narrow"]
    assert not found.table.warning["exact"]
    assert found.table.low_ess["narrow"] > 0.5
    assert found.table.index[0] == "exact"
    assert found.verdict.holds is None
    assert 'method="ais"' in found.verdict.advice


def test_annealed_importance_sampling_owes_nothing_to_the_guide(x, monkeypatch):
    """Its mean over 10 data is within 0.3 nats of the exact one, on a path that is short here (seed 0)."""
    short = partial(annealed_log_likelihood, num_temperatures=40, num_leapfrog=2)
    monkeypatch.setattr(comparison.held_out, "annealed_log_likelihood", short)
    programs = {"one": LinearGaussian(scale=0.05), "other": LinearGaussian(noise=1.2)}
    found = compare(programs, x[:10], None, method="ais")
    for name, program in programs.items():
        assert found.table.elpd[name] / 10 == pytest.approx(program.evidence(x[:10]).mean().item(), abs=0.3)
        assert found.table.mc_se[name] < 1
    assert found.pointwise.attrs == {"method": "ais", "num_particles": 16, "seed": 0}


@pytest.mark.filterwarnings("ignore:models. weights of a high k-hat")
def test_densities_and_probabilities_do_not_compare():
    def vae(likelihood):
        return VAE(priors.StandardNormal(2), likelihood, posteriors.DiagonalNormal(networks.MLP(4, 4), 2))

    density = vae(likelihoods.Gaussian(networks.MLP(2, 8), (4,)))
    probability = vae(likelihoods.Bernoulli(networks.MLP(2, 4), (4,)))
    grid = vae(likelihoods.DiscretizedLogistic(networks.MLP(2, 8), (4,), bins=2))
    x = torch.rand(20, 4).round()
    with pytest.raises(ValueError, match="one measure, got densities with 'a' and probabilities with 'b'"):
        compare({"a": density, "b": probability}, x)
    compare({"a": probability, "b": grid}, x)  # both discrete
    joint = {"p": likelihoods.Bernoulli, ("q", "r", "s"): likelihoods.Gaussian}
    mixed = vae(likelihoods.Heterogeneous(networks.MLP(2, 7), joint))
    with pytest.raises(ValueError, match="got probabilities of 1 of 4 values with 'a' and densities with 'b'"):
        compare({"a": mixed, "b": density}, x)
    split = dict.fromkeys("pqrs", likelihoods.Bernoulli)
    compare({"a": vae(likelihoods.Heterogeneous(networks.MLP(2, 4), split)), "b": probability}, x)  # in other parts


def test_programs_observe_the_same_values():
    with pytest.raises(ValueError, match="same values of a datum, got 3 with 'a' and 4 with 'b'"):
        compare({"a": LinearGaussian(), "b": More()}, torch.zeros(5, 3).double())


def test_data_that_are_impossible():
    with pytest.raises(ValueError, match="got -inf with 'never' for 1 of 3 data"):
        compare({"never": Rate(0.0), "sometimes": Rate(1.0)}, torch.tensor([0.0, 2.0, 0.0], dtype=torch.float64))


def test_stacking_weights_of_data_of_tiny_probability(x):
    """Log evidence below -1000 a datum, whose exponential is 0 in float64."""
    far = x + 100
    found = compare({"a": LinearGaussian(noise=0.9), "b": LinearGaussian(noise=0.7)}, far)
    assert found.table.elpd.max() / 200 < -1000
    assert found.table.weight.sum() == pytest.approx(1)
    assert found.table.elpd_diff.iloc[1] == pytest.approx(found.table.elpd.iloc[0] - found.table.elpd.iloc[1])


def test_what_is_drawn_anew_is_drawn_once():
    """Noise of dequantization, the same for all programs: the evidence is that of the data once frozen."""
    data = InMemory(torch.randint(256, (5000, 3), dtype=torch.uint8), dequantize=256)  # two batches
    programs = {"one": LinearGaussian(), "other": LinearGaussian(noise=1.2)}
    found = compare(programs, data)
    for name, program in programs.items():
        exact = program.evidence(data.frozen(0)[:].double()).detach()
        np.testing.assert_allclose(found.pointwise.log_evidence.sel(model=name), exact, rtol=1e-9)


def test_data_that_come_in_another_order_each_time(x):
    """One program under two names has no difference, datum by datum."""
    own = torch.Generator().manual_seed(1)  # which no seed of ours resets
    loader = DataLoader(TensorDataset(x), batch_size=7, shuffle=True, generator=own)
    evidence = compare({"one": LinearGaussian(), "two": LinearGaussian()}, loader).pointwise.log_evidence
    assert evidence.std() > 0.1
    np.testing.assert_array_equal(evidence.sel(model="one"), evidence.sel(model="two"))


@pytest.mark.filterwarnings("ignore:models. weights of a high k-hat")
@pytest.mark.parametrize("make", [TwoSites, lambda: GlobalMean(20), lambda: TwoLatents(8).double()])
def test_any_program(make):
    first, second = make(), make()
    shape = {TwoSites: (20, 2), GlobalMean: (20,), TwoLatents: (20, 8)}[type(first)]
    x = torch.rand(shape, dtype=torch.float64).round()
    state = torch.get_rng_state()
    found = compare({"a": first, "b": second}, x, 200)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.training
    assert np.isfinite(found.pointwise.log_evidence).all()


def test_evidence_of_two_sites_is_exact():
    program, x = TwoSites(exact=True), torch.randn(20, 2, dtype=torch.float64)
    found = compare({"a": program, "b": TwoSites()}, x, 2000)
    np.testing.assert_allclose(found.pointwise.log_evidence.sel(model="a"), program.evidence(x).detach(), rtol=1e-9)
    difference = found.pointwise.log_evidence.sel(model="b") - program.evidence(x).detach().numpy()
    assert (np.abs(difference) < 4.5 * found.pointwise.error.sel(model="b")).all()


def test_one_datum_cannot_tell(x):
    assert compare({"a": LinearGaussian(), "b": LinearGaussian(noise=1.0)}, x[:1]).verdict.holds is None


@pytest.mark.parametrize(
    ("programs", "options", "message"),
    [
        ({"a": 1}, {}, "two or more programs, got 1"),
        ({"a": 1, "b": 2}, {"method": "exact"}, "method: expected"),
        (
            {"a": 1, "b": 2},
            {"num_particles": 24},
            "num_particles: expected a whole number, at least 25 with method='importance'",
        ),
        ({"a": 1, "b": 2}, {"num_particles": 4, "method": "ais"}, "at least 5 with method='ais', got 4"),
        ({"a": 1, "b": 2}, {"num_particles": 30.5}, "num_particles: expected a whole number, .*got 30.5"),
        ({"a": LinearGaussian(), "b": 2}, {}, "expected a program with model and guide, got int as 'b'"),
        ([1, 2], {}, "expected programs by name, .*got list"),
    ],
)
def test_arguments(programs, options, message):
    with pytest.raises(ValueError, match=message):
        comparison.models(programs, torch.zeros(3, 3), **options)


def test_figures(x, tmp_path):
    """ArviZ's own, and ours, which leaves no trace in pyplot."""
    import arviz_plots
    from matplotlib import pyplot

    with pytest.warns(UserWarning, match="low effective size"):
        found = compare({"true": LinearGaussian(), "narrow": LinearGaussian(noise=1.0, scale=0.05)}, x, 50)
    before = pyplot.get_fignums()
    figure = plots.models(found)
    figure.savefig(tmp_path / "figure.png")
    assert pyplot.get_fignums() == before
    assert "cannot be trusted" in figure.get_suptitle()
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["true", "narrow (*)"]
    arviz_plots.plot_compare(found.table, backend="matplotlib")
    pyplot.close("all")


@pytest.mark.parametrize(("noise", "good"), [(3.0, True), (0.1, False)])
def test_leave_one_out_is_the_evidence_where_it_can_be_told(noise, good):
    """Of the exact posterior's draws; within 0.5 nats over 40 data where likelihoods say little (seed 0)."""
    from arviz_base import from_dict

    program, x = LinearGaussian(noise=noise), torch.randn(40, 3, dtype=torch.float64)
    mean, std = program.posterior(x)
    z = (mean + std * torch.randn(2000, 40, 2, dtype=torch.float64)).detach()
    log_likelihood = dist.Normal(z @ program.weight.T + program.bias, noise).to_event(1).log_prob(x).detach()
    groups = {"posterior": {"z": z[None].numpy()}, "log_likelihood": {"x": log_likelihood[None].numpy()}}
    tree = from_dict(groups)
    assert comparison.loo(tree).verdict.holds is (None if good else False)  # without the k-hat of a guide
    tree["sample_stats"] = xr.Dataset({"khat": ("datum", np.full(40, -np.inf))})
    found = comparison.loo(tree)
    assert found.verdict.holds is good
    assert "weights of the decoder" in str(found)
    assert "weights of the decoder" in found.verdict.finding
    if good:
        assert found.elpd.elpd == pytest.approx(program.evidence(x).sum().item(), abs=0.5)


@pytest.mark.parametrize(("scale", "holds"), [(1.0, True), (0.3, False)])
def test_leave_one_out_does_not_hold_where_the_guide_is_too_narrow(scale, holds):
    """Pareto k is low, and elpd far too high: only the guide's k-hat tells (seed 0)."""
    program, x = LinearGaussian(noise=3.0, scale=scale), torch.randn(40, 3, dtype=torch.float64)
    found = comparison.loo(to_arviz(program, x, num_samples=1000, num_prior_samples=0, progress=False))
    assert (found.elpd.pareto_k < found.elpd.good_k).mean() > 0.95
    assert found.verdict.holds is holds
    if not holds:
        assert "whose draws are not the posterior's" in found.verdict.finding


def loo_of(log_likelihood, khat=-np.inf):
    from arviz_base import from_dict

    tree = from_dict({"posterior": {"z": log_likelihood}, "log_likelihood": {"x": log_likelihood}})
    tree["sample_stats"] = xr.Dataset({"khat": ("datum", np.full(log_likelihood.shape[-1], khat))})
    return comparison.loo(tree)


def test_leave_one_out_of_what_is_not_a_number_cannot_be_told():
    draws = -0.1 * np.random.default_rng(0).normal(size=(1, 500, 20)) ** 2
    assert loo_of(draws).verdict.holds is True
    assert loo_of(draws, khat=np.nan).verdict.holds is None
    draws[..., -1] = np.nan
    assert loo_of(draws).verdict.holds is None


def test_leave_one_out_of_what_it_cannot_take():
    with pytest.raises(ValueError, match="loo: expected at least 25 draws, which a tail needs, got 24"):
        loo_of(np.random.default_rng(0).normal(size=(1, 24, 5)))
    with pytest.raises(ValueError, match="loo: expected log-likelihoods that differ from draw to draw"):
        loo_of(np.zeros((1, 500, 5)))
    with pytest.raises(ValueError, match="loo: expected a tree with a group log_likelihood"):
        comparison.loo(3)


@pytest.mark.filterwarnings("ignore:.*grey values under a Bernoulli", "ignore:models. weights of a high k-hat")
def test_grey_levels_have_no_probability_of_bits(monkeypatch):
    """Some are behind the first batch."""
    x = torch.randint(2, (40, 1, 2, 2)).float()
    grey = VAE(priors.StandardNormal(1), likelihoods.Bernoulli(networks.MLP(1, 4), (1, 2, 2)), networks_of(4))
    grid = VAE(priors.StandardNormal(1), likelihoods.DiscretizedLogistic(networks.MLP(1, 8), (1, 2, 2)), networks_of(4))
    compare({"a": grid, "b": grey}, x)
    x[-1, 0, 0, 0] = 128 / 255
    batches = comparison.measures.checked_batches

    def small(*arguments):
        found = batches(*arguments)
        found.batch_size = 7
        return found

    monkeypatch.setattr(comparison.measures, "checked_batches", small)
    with pytest.raises(ValueError, match="expected 0 and 1 at 'x' of 'b', got grey values"):
        compare({"a": grid, "b": grey}, x)


def networks_of(features):
    return posteriors.DiagonalNormal(networks.MLP(features, 2), 1)


class Masked(nn.Module):
    """Counts of which a mask hides some, by the distribution's or by the handler's."""

    def __init__(self, of_values=None, of_data=None):
        super().__init__()
        self.of_values, self.of_data = of_values, of_data

    def model(self, x):
        fn = dist.Poisson(2 * torch.ones(3))
        if self.of_values is not None:
            fn = fn.mask(torch.tensor(self.of_values))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.poutine.mask(mask=x[:, 0] >= 0 if self.of_data is None else x[:, 0] > self.of_data):
                pyro.sample("x", fn.to_event(1).expand((len(x),)), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))


@pytest.mark.parametrize("hidden", [{"of_values": [True, False, True]}, {"of_data": 1}])
def test_values_that_are_masked_are_not_observed(hidden):
    x = torch.tensor([[0.0, 1.0, 2.0], [3.0, 1.0, 0.0]])
    compare({"a": Masked(), "b": Masked()}, x)
    compare({"a": Masked(**hidden), "b": Masked(**hidden)}, x)
    with pytest.raises(ValueError, match="mask the same values of the data, got other masks with 'a' than with 'b'"):
        compare({"a": Masked(), "b": Masked(**hidden)}, x)


def test_a_program_is_not_ahead_of_itself_with_a_poorer_guide():
    """Weights of a guide at half the scale have a shape of 3/4: effective sizes are not low, k-hat tells (seed 0)."""
    programs = {name: LinearGaussian(latent=1, features=1, scale=s) for name, s in {"exact": 1, "narrow": 0.5}.items()}
    x = programs["exact"].bias.detach() + 2 * torch.randn(500, 1, dtype=torch.float64)
    with pytest.warns(UserWarning, match="a high k-hat or a low effective size for .* of the data with narrow"):
        found = compare(programs, x, 1000)
    assert found.table.low_ess["narrow"] < 0.05
    assert found.table.high_khat["narrow"] > 0.3
    assert found.table.high_khat["exact"] == 0
    assert found.table.warning.to_dict() == {"exact": False, "narrow": True}
    assert found.verdict.holds is not True
    khat = diagnostics.khat(programs["narrow"], x, 1000, progress=False).khat
    ours = found.pointwise.khat.sel(model="narrow").values
    assert np.median(ours) == pytest.approx(khat.median().item(), abs=0.03)  # of other draws
