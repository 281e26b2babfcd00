"""Predictive checks: p-values against exact ones, seen failures, and what is asked of a statistic."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import GlobalMean, LinearGaussian, TwoLatents, TwoSites
from torch import nn
from torch.distributions import AffineTransform

from pyro_vae import VAE, likelihoods, networks, plots, posteriors, priors
from pyro_vae.diagnostics import PredictiveChecks, predictive, predictive_checks
from pyro_vae.distributions import SoftBernoulli
from pyro_vae.programs import declare_parameters


class Counts(nn.Module):
    """Log-rates z ~ N(0.5, 0.3^2) of five Poisson counts each; the guide is near the posterior (Laplace, one step)."""

    def __init__(self):
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

    def model(self, x):
        declare_parameters(self)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(self.mean, 0.3))
            pyro.sample("x", dist.Poisson(z.exp()[..., None].expand(*z.shape, 5)).to_event(1), obs=x)

    def guide(self, x):
        precision = 0.3**-2 + 5 * self.mean.exp()
        with pyro.plate("data", len(x), dim=-1):
            gradient = x.sum(-1) - 5 * self.mean.exp()
            pyro.sample("z", dist.Normal(self.mean + gradient / precision, precision**-0.5))


def simulated_counts(num_data=200):
    rate = (0.5 + 0.3 * torch.randn(num_data, 1, dtype=torch.float64)).exp()
    return torch.poisson(rate.expand(-1, 5))


def simulated(program, num_data=200):
    z = torch.randn(num_data, program.latent, dtype=torch.float64)
    noise = program.noise * torch.randn(num_data, 3, dtype=torch.float64)
    return (z @ program.weight.T + program.bias + noise).detach()


def first_mean(x):
    return x[:, 0].mean()


def of_linear_gaussian(program, x, from_prior):
    """The exact distribution of the mean of the replicates' first column."""
    weight, bias = program.weight.detach(), program.bias.detach()
    mean, std = (part.detach() for part in program.posterior(x))
    if from_prior:
        mean, std = torch.zeros_like(mean), torch.ones_like(std)
    variance = (weight[0] ** 2 * std**2).sum(-1) + program.noise**2
    return dist.Normal((mean @ weight[0] + bias[0]).mean(), (variance.sum() / len(x) ** 2).sqrt())


@pytest.mark.parametrize("from_prior", [False, True])
@pytest.mark.parametrize("shift", [0.0, 0.1])
def test_p_value_is_the_exact_one(from_prior, shift):
    """Within 4 Monte Carlo errors (seed 0; eight numbers, a false alarm in 2,000)."""
    program = LinearGaussian()
    x = simulated(program, 50) + shift
    expected = of_linear_gaussian(program, x, from_prior)
    found = predictive_checks(program, x, {"mean": first_mean}, num_samples=4000, from_prior=from_prior)
    tail = expected.cdf(found.observed[0])
    p = 2 * torch.minimum(tail, 1 - tail)
    assert abs(found.p_values[0] - p) < 4 * found.errors[0] + 2 / 4000
    assert found.errors[0] < 0.02
    assert abs(found.replicated.mean() - expected.mean) < 4 * expected.stddev / math.sqrt(4000)
    assert found.replicated.std() == pytest.approx(expected.stddev.item(), rel=4 / math.sqrt(8000))


@pytest.mark.slow
def test_prior_predictive_p_values_are_uniform_where_data_are_the_models_own():
    """Kolmogorov and Smirnov, 300 data sets: a false alarm in 1,000 (seed 0)."""
    from scipy.stats import kstest

    program = LinearGaussian()
    p_values = []
    for seed in range(300):
        x = simulated(program, 20)
        found = predictive_checks(program, x, {"mean": first_mean}, num_samples=199, from_prior=True, seed=seed)
        p_values.append(found.p_values.item())
    assert kstest(p_values, "uniform").pvalue > 0.001


@pytest.mark.parametrize("from_prior", [False, True])
def test_data_of_the_models_own_pass(from_prior):
    """A false alarm in 20 at most for each of the four (seed 0)."""
    program = LinearGaussian()
    assert predictive_checks(program, simulated(program), from_prior=from_prior).verdict.holds is True
    found = predictive_checks(Counts(), simulated_counts(), from_prior=from_prior)
    assert found.names == ("mean", "share of zeros", "largest value", "variance-to-mean ratio")
    assert len(found.replicated) == 240
    assert found.verdict.holds is True


def test_excess_zeros_under_a_poisson_fail():
    x = simulated_counts()
    x[torch.rand_like(x) < 0.2] = 0
    found = predictive_checks(Counts(), x)
    assert found.verdict.holds is False
    zeros = found.names.index("share of zeros")
    assert found.observed[zeros] == (x == 0).double().mean()
    assert found.p_values[zeros] == found.attainable
    assert "share of zeros" in found.verdict.finding
    assert "ZeroInflated" in predictive_checks(Counts(), x, {"share of zeros": predictive._zeros}).verdict.advice


@pytest.mark.parametrize("factor", [0.4, 1.6])
def test_a_wrong_scale_of_the_noise_fails(factor):
    program = LinearGaussian()
    truth = LinearGaussian(noise=0.7 * factor)
    found = predictive_checks(program, simulated(truth))
    assert found.verdict.holds is False
    assert "standard deviation" in found.verdict.finding


def test_a_wrong_prior_shows_from_the_prior_alone():
    """Data whose latents lie far out, where posteriors follow them."""
    program = LinearGaussian(noise=0.1)
    x = (torch.full((100, 2), 3.0).double() + 0.1 * torch.randn(100, 2).double()) @ program.weight.detach().T
    x = x + program.bias.detach() + 0.1 * torch.randn(100, 3).double()
    assert predictive_checks(program, x, {"mean": first_mean}).verdict.holds is True
    from_prior = predictive_checks(program, x, {"mean": first_mean}, from_prior=True).verdict
    assert from_prior.holds is False
    assert "VampPrior" in from_prior.advice


def test_the_data_are_withheld():
    """A replicate that were the data would be so in every value."""
    program = LinearGaussian()
    x = simulated(program, 30)
    found = predictive_checks(program, x, {"equal": lambda y: (y == x).any()}, num_samples=20)
    assert found.observed == 1
    assert (found.replicated == 0).all()


def test_each_replicate_has_its_own_draw_of_a_global_latent():
    """The mean of x given m is N(m, 2 / N), and m given all data is the guide's: seed 0, 4 errors of a deviation."""
    program, x = GlobalMean(30), torch.randn(30, dtype=torch.float64)
    found = predictive_checks(program, x, {"mean": torch.mean}, num_samples=2000, from_prior=True)
    variance = (2 * program.log_scale).exp() + 2 / 30
    assert found.replicated.std() == pytest.approx(variance.sqrt().item(), rel=4 / math.sqrt(4000))


@pytest.mark.parametrize("from_prior", [False, True])
def test_all_data_share_a_replicates_global_latent(from_prior, monkeypatch):
    """Also where data are drawn in pieces: the mean has its variance, which independent draws would average out."""
    program, x = GlobalMean(30), torch.randn(30, dtype=torch.float64)
    monkeypatch.setattr(predictive, "VALUES_AT_ONCE", 2000)  # pieces of one datum
    found = predictive_checks(program, x, {"mean": torch.mean}, num_samples=2000, from_prior=from_prior)
    m = (2 * program.log_scale).exp()  # the spread of m in any piece, whose data may move its mean
    expected = m + 2 / 30 if from_prior else m / 4 + 1.5 / 30
    assert found.replicated.std() == pytest.approx(expected.sqrt().item(), rel=4 / math.sqrt(4000))


def test_a_statistic_sees_whole_data_sets_of_the_programs_dtype(monkeypatch):
    seen = []
    monkeypatch.setattr(predictive, "VALUES", 100)  # one replicate at a time
    monkeypatch.setattr(predictive, "VALUES_AT_ONCE", 12)  # four data at a time
    net = VAE(
        priors.StandardNormal(2),
        likelihoods.Gaussian(networks.MLP(2, 6), (3,)),
        posteriors.DiagonalNormal(networks.MLP(3, 4), 2),
    )
    found = predictive_checks(net, torch.randn(30, 3), {"n": lambda x: seen.append(x) or len(x)}, num_samples=5)
    assert [tuple(x.shape) for x in seen] == [(30, 3)] * 6
    assert {x.dtype for x in seen} == {torch.float32}
    assert found.replicated.shape == (5, 1)
    assert found.replicated.dtype == torch.float64
    assert not torch.equal(seen[1], seen[2])


def checks(observed, replicated, names=("a", "b", "c")):
    return PredictiveChecks(names, torch.tensor(observed).double(), torch.tensor(replicated).double(), False)


def test_p_values_by_hand():
    """Ties count on both sides, and the data as one more replicate; Holm's correction of three."""
    replicated = [[float(s), 0.0, -float(s)] for s in range(99)]
    found = checks([100.0, 0.0, -1.0], replicated)
    torch.testing.assert_close(found.p_values, torch.tensor([0.02, 1.0, 0.06]).double())
    torch.testing.assert_close(found.adjusted, torch.tensor([0.06, 1.0, 0.12]).double())
    assert found.attainable == 0.02
    torch.testing.assert_close(found.errors[0], torch.tensor(2 * math.sqrt(0.01 * 0.99 / 99)).double())


def test_too_few_replicates_cannot_tell():
    replicated = [[float(s), 0.0, -float(s)] for s in range(99)]
    found = checks([100.0, 0.0, -1.0], replicated)  # 3 * 0.02 is above 0.05
    assert found.verdict.holds is None
    assert "num_samples=120" in found.verdict.advice
    found = checks([100.0], [[float(s)] for s in range(99)], names=("a",))
    assert found.verdict.holds is False
    assert "at most 0.02" in found.verdict.finding


def table():
    parts = {"age": likelihoods.Gaussian, "sex": likelihoods.Bernoulli, ("a", "b"): likelihoods.Poisson}
    joint = likelihoods.Heterogeneous(networks.MLP(2, 5), parts)
    return VAE(priors.StandardNormal(2), joint, posteriors.DiagonalNormal(networks.MLP(4, 4), 2)).double()


def test_parts_of_a_table_have_their_own_statistics():
    x = torch.tensor([[0.5, 1.0, 3.0, 0.0], [1.5, 0.0, 0.0, 0.0]], dtype=torch.float64)
    found = predictive_checks(table(), x, num_samples=2)
    observed = dict(zip(found.names, found.observed.tolist(), strict=True))
    assert observed["age: mean"] == 1.0
    assert observed["age: standard deviation"] == 0.5
    assert observed["sex: mean"] == 0.5
    assert observed["a_b: share of zeros"] == 0.75
    assert observed["a_b: largest value"] == 3.0
    assert observed["a_b: variance-to-mean ratio"] == pytest.approx((9 / 4 - 9 / 16) / (3 / 4))


@pytest.mark.parametrize(
    ("fn", "kind"),
    [
        (dist.Normal(torch.zeros(3), 1.0), "continuous"),
        (dist.LogNormal(torch.zeros(3), 1.0), "continuous"),
        (dist.Bernoulli(torch.full((3,), 0.5)), "binary"),
        (likelihoods.Bernoulli(networks.MLP(2, 3), (3,))(torch.zeros(2)), "binary"),
        (likelihoods.Autoregressive(networks.MLP(2, 16 * 9), (1, 3, 3))(torch.zeros(2)), "binary"),
        (likelihoods.ContinuousBernoulli(networks.MLP(2, 3), (3,))(torch.zeros(2)), "continuous"),
        (dist.TransformedDistribution(SoftBernoulli(torch.full((3,), 0.5)), AffineTransform(0.0, 2.0)), "continuous"),
        (likelihoods.DiscretizedLogistic(networks.MLP(2, 6), (3,), bins=4)(torch.zeros(2)), "grid"),
        (dist.Binomial(3, torch.full((3,), 0.5)), "whole"),
        (dist.Categorical(torch.ones(3)), "whole"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_kinds_of_values(fn, kind):
    assert predictive.kind_of_values(fn) == kind
    assert predictive.kind_of_values(fn.expand((5, *fn.batch_shape))) == kind


@pytest.mark.parametrize(
    ("statistic", "got"),
    [(lambda x: x.mean(0), r"got shape \(3,\)"), (lambda x: (x * math.nan).sum(), "got nan")],
)
def test_statistics_are_one_finite_number(statistic, got):
    with pytest.raises(ValueError, match=f"statistic 'bad': expected one finite number .*{got}"):
        predictive_checks(LinearGaussian(), torch.zeros(5, 3).double(), {"bad": statistic})


@pytest.mark.parametrize(
    "options",
    [
        {"statistics": {}},
        {"statistics": {"a": 3}},
        {"statistics": [torch.mean]},
        {"num_samples": 0},
        {"num_samples": 9.0},
    ],
)
def test_arguments(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}: expected"):
        predictive_checks(LinearGaussian(), torch.zeros(5, 3).double(), **options)


@pytest.mark.parametrize("make", [TwoSites, TwoLatents, table])
@pytest.mark.parametrize("from_prior", [False, True])
def test_any_program_and_its_figure(make, from_prior, tmp_path):
    program = make().double()
    x = torch.rand(20, {TwoSites: 2, TwoLatents: 64}.get(make, 4), dtype=torch.float64).round()
    state = torch.get_rng_state()
    found = predictive_checks(program, x, num_samples=50, from_prior=from_prior)
    assert torch.equal(torch.get_rng_state(), state)
    assert program.training
    figure = plots.predictive_checks(found)
    figure.savefig(tmp_path / "figure.png")
    shown = [axes.lines[0].get_xdata()[0] for axes in figure.axes if axes.lines]
    assert shown == found.observed.tolist()
