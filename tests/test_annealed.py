"""Annealed importance sampling: against exact evidence, unbiased however short, and bracketed from both sides."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import GlobalMean, LinearGaussian, Mixture, TwoSites
from torch import nn

import pyro_vae
from pyro_vae import evaluation
from pyro_vae.evaluation import LatentSpace, annealed, annealed_log_likelihood, bidirectional
from pyro_vae.programs import undisturbed


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(annealed, "ADAPTING_MOVES", 20)


class Conjugate(nn.Module):
    """A latent of any support whose evidence is known; the guide is the prior."""

    def __init__(self, prior, likelihood, evidence):
        super().__init__()
        self.place = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.prior, self.given, self.evidence = prior, likelihood, evidence

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", self.given(pyro.sample("z", self.prior)), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", self.prior)


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


SCALES = double(100.0, 0.01)
CONJUGATE = {  # program, and data
    "positive": (
        Conjugate(dist.Gamma(double(2.0)[0], 1.0), dist.Poisson, dist.GammaPoisson(double(2.0)[0], 1.0)),
        double(0.0, 2.0, 9.0),
    ),
    "unit interval": (
        Conjugate(
            dist.Beta(double(2.0)[0], 3.0), lambda z: dist.Binomial(20, z), dist.BetaBinomial(double(2.0)[0], 3.0, 20)
        ),
        double(0.0, 5.0, 19.0),
    ),
    "simplex": (
        Conjugate(
            dist.Dirichlet(double(1.0, 2.0, 3.0)),
            lambda z: dist.Multinomial(12, z),
            dist.DirichletMultinomial(double(1.0, 2.0, 3.0), 12),
        ),
        torch.stack([double(12.0, 0.0, 0.0), double(4.0, 4.0, 4.0), double(1.0, 1.0, 10.0)]),
    ),
    "scales far apart": (
        Conjugate(
            dist.Normal(5.0, SCALES).to_event(1),
            lambda z: dist.Normal(z, 0.5 * SCALES).to_event(1),
            dist.Normal(5.0, 1.25**0.5 * SCALES).to_event(1),
        ),
        5 + SCALES * torch.stack([double(0.0, 0.0), double(1.0, -1.5)]),
    ),
}


@pytest.mark.parametrize("name", CONJUGATE)
def test_weights_are_unbiased_however_short_the_path(name):
    """Mean of 300 estimates by 4 chains of 12 temperatures, over the evidence: 1 within 4 standard errors (11 data in
    all: false alarm below 1e-3, seed 0), with so few temperatures that the logarithm is biased."""
    program, x = CONJUGATE[name]
    found = annealed_log_likelihood(program, x.repeat_interleave(300, 0), 4, num_temperatures=12)
    log_ratio = found.log_evidence.reshape(len(x), 300) - program.evidence.log_prob(x)[:, None]
    ratio = log_ratio.exp()
    assert ((ratio.mean(1) - 1).abs() < 4 * ratio.std(1) / 300**0.5).all(), (ratio.mean(1), ratio.std(1))
    assert ratio.std(1).max() < 2  # so that there is something to see
    assert log_ratio.mean() < -0.005
    assert 0.6 < found.acceptance.mean() < 0.95


def test_both_ends_meet_at_the_evidence():
    """Means of 300 simulated data within 0.05 nats of the exact evidence from both sides; the bias is about 0.015
    and the standard error below 0.01, so that a false alarm has a probability below 1e-3 (seed 0)."""
    program = LinearGaussian()
    found = bidirectional(program, 300, torch.zeros(350, 3, dtype=torch.float64), num_temperatures=100)
    evidence = program.evidence(found.x).detach()
    below, above = found.lower - evidence, found.upper - evidence
    for error in (below, above):
        assert error.mean().abs() < 0.05
        assert error.std() / 300**0.5 < 0.05 / 5
    assert below.mean() < 4 * below.std() / 300**0.5
    assert above.mean() > -4 * above.std() / 300**0.5
    assert found.mean_gap == pytest.approx((found.gap.mean().item(), found.gap.std().item() / 300**0.5))
    torch.testing.assert_close(found.x.mean(0), program.bias.detach(), rtol=0, atol=4 * 1.8 / 300**0.5)


def test_a_path_too_short_leaves_a_gap():
    program = LinearGaussian(noise=0.02)
    found = bidirectional(program, 50, torch.zeros(50, 3, dtype=torch.float64), num_chains=2, num_temperatures=3)
    evidence = program.evidence(found.x).detach()
    assert found.mean_gap[0] > 10
    assert found.lower.mean() < evidence.mean() < found.upper.mean()


def test_evidence_and_its_error():
    """Errors of 200 data in units of what they are said to be: their mean square is 1, but for the noise of an error
    that 16 weights tell; the mean is within 4 standard errors (seed 0)."""
    program, x = LinearGaussian(), 1.5 * torch.randn(200, 3, dtype=torch.float64)
    found = annealed_log_likelihood(program, x, num_temperatures=30)
    score = (found.log_evidence - program.evidence(x).detach()) / found.error
    assert 0.8 < score.square().mean().sqrt() < 1.6
    assert score.mean().abs() < 4 * score.std() / 200**0.5 + found.error.mean()  # a bias of half the error's square
    assert ((found.ess > 1) & (found.ess < 16)).all()
    assert 0.7 < found.acceptance.mean() < 0.9


def test_errors_and_sizes_are_those_of_the_mean_weight():
    weights, acceptance = torch.rand(5, 3, dtype=torch.float64), torch.ones(3)
    found = annealed._annealed(weights.log() - 1000, acceptance)
    torch.testing.assert_close(found.log_evidence, weights.mean(0).log() - 1000)
    torch.testing.assert_close(found.error, weights.std(0) / 5**0.5 / weights.mean(0))
    torch.testing.assert_close(found.ess, weights.sum(0) ** 2 / weights.square().sum(0))


def test_two_sites():
    """Mean of 200 data within 0.05 nats, four standard errors are less (seed 0); the guide is off and takes no part."""
    program, x = TwoSites(), 2 * torch.randn(200, 2, dtype=torch.float64)
    found = annealed_log_likelihood(program, x, num_temperatures=40)
    error = found.log_evidence - program.evidence(x).detach()
    assert error.mean().abs() < 0.05
    assert error.std() / 200**0.5 < 0.05 / 4


def test_global_latents_are_one_draw_for_all_batches(monkeypatch):
    """Given m, x ~ N(m, 2): 40 data in 2 batches, mean within 4 standard errors (seed 3)."""
    monkeypatch.setattr(evaluation.batches, "VALUES_AT_ONCE", 20 * 16)
    program, x = GlobalMean(40), 1 + torch.randn(40, dtype=torch.float64)
    with torch.no_grad():
        program.log_scale.fill_(1.0)  # draws far from one another, of which the second batch would have its own
    found = annealed_log_likelihood(program, x, num_temperatures=40, seed=3)
    with undisturbed(program, 3):
        shared = LatentSpace(program, x[:20]).shared["m"]
    error = found.log_evidence - dist.Normal(shared.reshape(()), 2**0.5).log_prob(x).detach()
    assert error.mean().abs() < 4 * error.std() / 40**0.5 + 0.01
    assert error.std() < 0.3  # with a mean of its own for each batch, it would follow x


def test_chains_in_passes_and_one_chain(monkeypatch):
    monkeypatch.setattr(annealed, "PARTICLES_AT_ONCE", 3)
    program, x = LinearGaussian(), torch.randn(5, 3, dtype=torch.float64)
    done = []
    found = annealed_log_likelihood(program, x, 7, num_temperatures=20, advance=done.append)
    assert sum(done) == pytest.approx(1)
    assert ((found.log_evidence - program.evidence(x)).abs() < 6 * found.error).all()
    assert ((found.acceptance > 0.4) & (found.acceptance <= 1)).all()
    one = annealed_log_likelihood(program, x, 1, num_temperatures=1)  # importance sampling from the prior, by one draw
    assert one.error.isnan().all()
    assert one.acceptance.isnan().all()
    assert one.ess.tolist() == [1.0] * 5


def test_temperatures():
    temperatures = torch.tensor(annealed._sigmoid_schedule(50))
    assert (temperatures[0], temperatures[-1], len(temperatures)) == (0, 1, 51)
    steps = temperatures.diff()
    assert (steps > 0).all()
    torch.testing.assert_close(steps, steps.flip(0))
    assert steps[0] < 0.1 * steps[25]


def test_the_method_of_log_likelihood(monkeypatch):
    program, x = LinearGaussian(scale=1.5), torch.randn(4, 3, dtype=torch.float64)
    assert torch.equal(evaluation.log_likelihood(program, x), evaluation.summarize(program, x, 5000).log_likelihood)
    short = partial(annealed_log_likelihood, num_temperatures=5)
    monkeypatch.setattr(evaluation.likelihood, "annealed_log_likelihood", short)
    for given, num_chains in ((None, 16), (3, 3)):
        found = evaluation.log_likelihood(program, x, given, method="ais", seed=1)
        assert torch.equal(found, short(program, x, num_chains, seed=1).log_evidence)
    with pytest.raises(ValueError, match='method: expected "importance" or "ais", got \'hmc\''):
        evaluation.log_likelihood(program, x, method="hmc")


def test_what_cannot_be_done_is_refused():
    x = torch.ones(3, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="expected continuous latents, got Categorical at site 'z'"):
        evaluation.log_likelihood(Mixture(), x, method="ais")
    with pytest.raises(ValueError, match="num_chains: expected a whole number, at least 1, got 0"):
        evaluation.log_likelihood(TwoSites(), x, 0, method="ais")
    with pytest.raises(ValueError, match="num_temperatures: expected a whole number, at least 1, got -1"):
        bidirectional(TwoSites(), 3, x, num_temperatures=-1)
    with pytest.raises(ValueError, match="TwoSites: expected like="):
        bidirectional(TwoSites(), 3)


class Pair(nn.Module):
    """z ~ N(0, 1), x ~ N(z, 1), y ~ N(z, 1); the guide is the prior."""

    def __init__(self):
        super().__init__()
        self.place = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def model(self, x, y):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(self, x, y):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))


def test_no_sandwich_where_more_than_x_is_observed():
    """The evidence of both has none, as y is not simulated; by itself it is within 6 of its errors (seed 0)."""
    x, y = double(0.5, -1.0), double(1.0, 0.0)
    with pytest.raises(ValueError, match=r'observes "x".* alone, got \[\'y\'\] too'):
        bidirectional(Pair(), 2, (x, y))
    found = annealed_log_likelihood(Pair(), torch.utils.data.TensorDataset(x, y), num_temperatures=20)
    exact = dist.MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double() + 1).log_prob(torch.stack([x, y], 1))
    assert ((found.log_evidence - exact).abs() < 6 * found.error).all()


def test_the_shape_of_simulated_data():
    few = {"num_chains": 2, "num_temperatures": 2}
    vae = pyro_vae.build((8, 8), latent=2)
    assert bidirectional(vae, 3, **few).x.shape == (3, 8, 8)
    assert bidirectional(vae, 9, torch.zeros(4, 8, 8), **few).x.shape == (4, 8, 8)  # at most as many as there are
    assert set(bidirectional(vae, 3, torch.zeros(4, 8, 8), **few).x.unique().tolist()) == {0.0, 1.0}
    alone = bidirectional(vae, 1, **few)
    assert alone.mean_gap[1] != alone.mean_gap[1]  # one datum has no standard error


@pytest.mark.parametrize(
    "call", [annealed_log_likelihood, lambda program, x, **few: bidirectional(program, 6, x, **few)]
)
def test_everything_is_left_as_it_was(call):
    program = pyro_vae.build((8, 8), latent=2)
    program.posterior.net.layers.append(nn.Dropout(0.5))
    program.train()
    program.prior.eval()
    x = torch.rand(6, 8, 8).round()
    modes = [module.training for module in program.modules()]
    rng = torch.get_rng_state()
    first, second = (call(program, x, num_chains=2, num_temperatures=3, seed=5) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(torch.get_rng_state(), rng)
    assert [module.training for module in program.modules()] == modes
    assert all(parameter.grad is None for parameter in program.parameters())
    assert not any(value.requires_grad for value in first)
