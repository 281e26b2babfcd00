"""The gaps of inference: against divergences in closed form, where they are zero and where they are not."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import GlobalMean, LinearGaussian, Mixture, ProbabilisticPCA, TwoLatents
from pyro.nn import PyroModule, PyroParam
from torch import nn

from pyro_vae import plots
from pyro_vae.diagnostics import InferenceGap, gaps, inference_gap
from pyro_vae.evaluation import annealed
from pyro_vae.programs import data_plate, declare_parameters

IS = {"num_chains": 0, "steps": 150, "progress": False}  # by importance sampling alone


@pytest.fixture
def _quick(monkeypatch):
    monkeypatch.setattr(gaps, "LEARNING_RATES", (3e-2,))
    monkeypatch.setattr(gaps, "PILOT_DATA", 1)
    monkeypatch.setattr(annealed, "ADAPTING_MOVES", 10)


def correlated():
    """A normal posterior with correlations, and a diagonal guide that is the best of its family, and the distance."""
    program = ProbabilisticPCA(latent=2, features=3)
    with torch.no_grad():
        program.weight.copy_(torch.tensor([[1.5, 1.0], [0.5, 1.2], [0.0, 0.3]]))
        noise = (2 * program.log_noise).exp()
        precision = torch.eye(2, dtype=torch.float64) + program.weight.T @ program.weight / noise
        program.slope.copy_(torch.linalg.solve(precision, program.weight.T / noise))
        program.shift.copy_(-program.slope @ program.bias)
        program.log_scale.copy_(-0.5 * precision.diagonal().log())
    return program, 0.5 * (precision.diagonal().log().sum() - precision.logdet()).item()


def check_means(found, **exact):
    """Means within 4 standard errors by Monte Carlo, and what a fit leaves (0.01 nats), of their exact values."""
    for name, value in exact.items():
        error = (found.errors[name].square().mean() / len(found.elbo)).sqrt().item()
        assert getattr(found, name).mean().item() == pytest.approx(value, abs=0.01 + 4 * error), name


def test_no_gaps_at_the_exact_posterior():
    """All learning rates and annealed importance sampling take part, and none finds what is not there (but for what a
    fitted guide may gain on the exact one by chance)."""
    x = torch.randn(50, 2, dtype=torch.float64)
    program = ProbabilisticPCA().to_maximum_likelihood(x)
    found = inference_gap(program, x, 2, num_particles=500, steps=20, num_temperatures=20)
    torch.testing.assert_close(found.log_evidence, program.evidence(x[:2]).detach(), rtol=0, atol=1e-9)
    assert found.inference.abs().max() < 1e-9
    assert max(found.approximation.abs().max(), found.amortization.abs().max()) < 1e-3
    assert found.verdict.holds
    assert set(found.evidence) == {
        "importance sampling",
        "importance sampling, fitted",
        "annealed importance sampling",
    }


@pytest.mark.usefixtures("_quick")
def test_a_wrong_slope_is_a_gap_of_amortization():
    """The distance of two normals of one scale, at 4 standard errors and 0.01 nats (seed 0, false alarm 1e-4)."""
    x = torch.randn(50, 2, dtype=torch.float64) * torch.tensor([2.0, 1.0], dtype=torch.float64)
    program = ProbabilisticPCA().to_maximum_likelihood(x)
    mean = (x[:3] @ program.slope.T + program.shift).detach()
    with torch.no_grad():
        program.slope.mul_(0.3)
    distance = ((x[:3] @ program.slope.T + program.shift - mean) ** 2 / (2 * (2 * program.log_scale).exp())).sum(-1)
    found = inference_gap(program, x, 3, num_particles=3000, **IS)
    check_means(found, amortization=distance.mean().item(), approximation=0.0, inference=distance.mean().item())
    assert distance.mean() > 0.3
    assert ((found.amortization - distance.detach()).abs() < 0.03 + 4 * found.errors["amortization"]).all()


@pytest.mark.usefixtures("_quick")
def test_correlations_are_a_gap_of_approximation():
    """Half of log(prod(diag P) / det P), P the posterior's precision (seed 0, false alarm 1e-4)."""
    (program, distance), x = correlated(), torch.randn(2, 3, dtype=torch.float64)
    assert distance > 0.3
    found = inference_gap(program, x, num_particles=5000, **IS | {"steps": 30})
    check_means(found, approximation=distance, amortization=0.0)
    with torch.no_grad():
        program.log_scale.add_(math.log(0.5))
    narrow = 0.5 * 2 * (0.25 - 1 - math.log(0.25))  # two dimensions, each of half the scale
    found = inference_gap(program, x, num_particles=5000, threshold=0.1, **IS)
    check_means(found, approximation=distance, amortization=narrow)
    assert not found.verdict.holds
    assert "richer posterior" in found.verdict.advice


@pytest.mark.usefixtures("_quick")
def test_the_model_is_not_fitted_though_the_guide_shares_its_parameters():
    """Were it, its best ELBO would rise above the evidence (by nats)."""
    program, x = LinearGaussian(scale=1.4), 2 * torch.randn(2, 3, dtype=torch.float64)
    before = {name: value.clone() for name, value in program.state_dict().items()}
    found = inference_gap(program, x, num_particles=2000, **IS)
    exact = 2 * 0.5 * (1.4**2 - 1 - 2 * math.log(1.4))  # of two dimensions
    check_means(found, approximation=0.0, amortization=exact)
    assert ((found.best_elbo - program.evidence(x).detach()) < 0.03).all()
    assert all(torch.equal(before[name], value) for name, value in program.state_dict().items())


class Named(nn.Module):
    """Half of a hand-written program with a PyroModule, whose parameters go by name through the param store."""

    class Encoder(PyroModule):
        def __init__(self):
            super().__init__()
            self.scale = PyroParam(torch.tensor(0.2, dtype=torch.float64), dist.constraints.positive)

        def forward(self):
            return self.scale

    def __init__(self):
        super().__init__()
        self.encoder = self.Encoder()

    def model(self, x):
        declare_parameters(self)
        self.encoder()  # so that the original's parameters are in the store, as those of a VampPrior's encoder are
        with data_plate(x):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0)), 1.0), obs=x)

    def guide(self, x):
        declare_parameters(self)
        with data_plate(x):
            pyro.sample("z", dist.Normal(x / 2, self.encoder()))


@pytest.mark.usefixtures("_quick")
def test_pyro_modules_are_fitted_apart():
    """The posterior's standard deviation is sqrt(1/2); the model, which reads the original's parameter, keeps it."""
    program, x = Named(), torch.randn(2, dtype=torch.float64)
    ratio = 0.2 / 0.5**0.5
    distance = 0.5 * (ratio**2 - 1 - 2 * math.log(ratio))
    found = inference_gap(program, x, num_particles=2000, **IS)
    check_means(found, approximation=0.0, amortization=distance)
    assert program.encoder.scale.item() == pytest.approx(0.2)


@pytest.mark.usefixtures("_quick")
def test_two_sites_and_nothing_is_left_behind():
    program, x = TwoLatents().train(), torch.rand(5, 64).round()
    program.down.eval()
    modes = [module.training for module in program.modules()]
    rng = torch.get_rng_state()
    few = {"num_particles": 200, "num_chains": 2, "num_temperatures": 5, "steps": 20}
    first, second = (inference_gap(program, x, 2, **few) for _ in range(2))
    torch.testing.assert_close(first.approximation + first.amortization, first.inference, rtol=0, atol=1e-9)
    assert torch.equal(first.inference, second.inference)
    assert (first.amortization > 0).all()  # nobody has trained it
    beside_another = inference_gap(program, x[[4, 1]], **few | IS | {"steps": 20})  # each fit starts from the guide
    assert torch.equal(beside_another.best_elbo[1], first.best_elbo[1])
    assert first.elbo.shape == first.errors["amortization"].shape == (2,)
    assert all(value.dtype == torch.float64 for value in (first.log_evidence, first.elbo, *first.errors.values()))
    assert torch.equal(torch.get_rng_state(), rng)
    assert [module.training for module in program.modules()] == modes
    assert all(parameter.grad is None for parameter in program.parameters())


@pytest.mark.usefixtures("_quick")
def test_a_global_latent_is_given():
    """At the exact posterior; with a draw for each particle, the evidence would lie above the ELBO."""
    program, x = GlobalMean(20), torch.randn(20, dtype=torch.float64)
    found = inference_gap(program, x, 4, steps=10, num_particles=100, num_temperatures=20, progress=False)
    assert found.evidence["annealed importance sampling"] == pytest.approx(found.elbo.mean().item(), abs=0.5)
    assert found.evidence["importance sampling"] == pytest.approx(found.elbo.mean().item(), abs=1e-9)
    assert found.amortization.abs().max() < 1e-9


class Centres(nn.Module):
    """Three global centres in a plate of their own, which sum to 0: the guide of z is the posterior."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.register_buffer("centres", torch.tensor([-5.0, 0.0, 5.0], dtype=torch.float64))

    def model(self, x):
        with pyro.plate("components", 3, dim=-1):
            centres = pyro.sample("centres", dist.Normal(torch.zeros_like(self.shift), 5.0))
        with data_plate(x, size=10):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(self.shift), 1.0))
            pyro.sample("x", dist.Normal(z + centres.sum(-1, keepdim=True), 1.0), obs=x)

    def guide(self, x):
        with pyro.plate("components", 3, dim=-1):
            pyro.sample("centres", dist.Delta(self.centres))
        with data_plate(x, size=10):
            pyro.sample("z", dist.Normal(x / 2 + self.shift, 0.5**0.5))


@pytest.mark.usefixtures("_quick")
def test_global_latents_in_a_plate_of_their_own_are_all_given():
    """Were the first to stand for all, the evidence would be that of data 15 away."""
    x = torch.tensor([0.5, -1.0], dtype=torch.float64)
    found = inference_gap(Centres(), x, num_particles=100, **IS | {"steps": 2})
    expected = dist.Normal(0.0, 2**0.5).log_prob(x)
    torch.testing.assert_close(found.log_evidence, expected, rtol=0, atol=1e-3)
    assert found.verdict.holds


class Circle(nn.Module):
    """A uniform angle of which the data tell nothing, and a guide of a hundredth of the circle."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def model(self, x):
        with data_plate(x):
            pyro.sample("z", dist.VonMises(torch.zeros_like(x), 1e-6))
            pyro.sample("x", dist.Normal(torch.zeros_like(x), 1.0), obs=x)

    def guide(self, x):
        with data_plate(x):
            pyro.sample("z", dist.Normal(0.0 * x + self.shift.detach() + 0 * self.shift, 0.1))


@pytest.mark.usefixtures("_quick")
def test_weights_of_a_heavy_tail_are_no_evidence():
    """The gap is 0.72 by the weights, and log(2 pi / 0.1 / sqrt(2 pi e)) = 2.7 in truth: their tail has a shape of 1.
    Of the exact posterior they have none."""
    found = inference_gap(Circle(), torch.zeros(10, dtype=torch.float64), num_particles=1000, **IS | {"steps": 2})
    assert found.inference.mean() < 1
    assert found.heavy > 0.5
    assert found.verdict.holds is None
    assert "too heavy a tail" in found.verdict.finding
    x = torch.randn(50, 2, dtype=torch.float64)
    exact = inference_gap(ProbabilisticPCA().to_maximum_likelihood(x), x[:5], num_particles=100, **IS | {"steps": 2})
    assert exact.heavy == 0


def test_a_fit_that_fails_is_not_taken(monkeypatch):
    monkeypatch.setattr(gaps, "LEARNING_RATES", (1e6,))
    (program, _), x = correlated(), torch.randn(2, 3, dtype=torch.float64)
    found = inference_gap(program, x, num_particles=100, **IS | {"steps": 3})
    assert torch.equal(found.best_elbo, found.elbo)
    assert found.log_evidence.isfinite().all()


def test_what_cannot_be_done_is_refused():
    x = torch.ones(3, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="reparameterized draws, .* got Categorical at site 'z'"):
        inference_gap(Mixture(), x)
    with pytest.raises(ValueError, match="expected a guide with parameters to fit"):
        inference_gap(ProbabilisticPCA().requires_grad_(False), x)
    program = ProbabilisticPCA()
    for parameter in (program.slope, program.shift, program.log_scale):
        parameter.requires_grad_(False)  # the model's are left
    with pytest.raises(ValueError, match="expected a guide with parameters to fit"):
        inference_gap(program, x)
    with pytest.raises(ValueError, match="steps: expected a whole number, at least 1, got 0"):
        inference_gap(ProbabilisticPCA(), x, steps=0)
    with pytest.raises(ValueError, match="num_particles: expected a whole number, at least 100, got 99"):
        inference_gap(ProbabilisticPCA(), x, num_particles=99)
    with pytest.raises(ValueError, match="num_chains: expected at least 2"):
        inference_gap(ProbabilisticPCA(), x, num_chains=1)


def made(approximation, amortization, noise=0.0, error=0.1):
    """A result of 16 data with these means."""
    spread = noise * torch.linspace(-1, 1, 16, dtype=torch.float64)
    elbo = torch.full((16,), -90.0, dtype=torch.float64)
    names = ("log_evidence", "approximation", "amortization", "inference")
    errors = dict.fromkeys(names, torch.full((16,), error, dtype=torch.float64))
    best = elbo + amortization
    return InferenceGap(best + approximation + spread, best, elbo, errors, {"importance sampling": -90.0}, 1.0)


def test_the_best_evidence_is_not_the_luckiest():
    log_weights = torch.zeros(10, 4, dtype=torch.float64)
    level, error = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    estimates = {"sure": (level, 0.01 * error), "lucky": (level + 0.2, error), "low": (level - 1, 0 * error)}
    found = gaps._result(log_weights, log_weights, estimates, 1.0, 0.0)
    assert torch.equal(found.log_evidence, level)
    found = gaps._result(log_weights, log_weights, estimates | {"high": (level + 0.2, 0.05 * error)}, 1.0, 0.0)
    assert torch.equal(found.log_evidence, level + 0.2)
    assert found.evidence == pytest.approx({"sure": 0.0, "lucky": 0.2, "low": -1.0, "high": 0.2})


def test_verdicts():
    good = made(0.1, 0.2).verdict
    assert good.holds
    assert good.finding.startswith("inference gap 0.30 ± 0.00 nats per datum, where 1 is the most: approximation 0.10")
    assert made(3.0, 0.2).verdict == (False, made(3.0, 0.2).verdict.finding, "a richer posterior (FullNormal, Flow)")
    assert made(0.2, 3.0).verdict.advice.startswith("a larger encoder")
    assert made(3.0, 3.0).verdict.advice.count(";") == 1
    noisy = made(0.5, 0.4, noise=5.0).verdict
    assert (noisy.holds, noisy.advice) == (None, "more data (num_data)")
    assert made(0.1, 0.2, error=2.0).verdict.holds is None  # the evidence could be anything
    assert made(3.0, 0.2, error=2.0).verdict.holds is False  # and the gap larger still


def test_verdicts_of_a_few_data_and_without_a_finite_gap():
    result = made(0.1, 0.2)
    for unsure, holds in ((1, True), (2, None)):  # of 16 data
        result.errors["log_evidence"][:unsure] = 0.8
        assert result.verdict.holds is holds
    result = made(0.1, 0.2)
    result.elbo[3] = -math.inf
    assert result.verdict[:2] == (False, "the inference gap is infinite for 1 of 16 data")
    result.elbo[4] = math.nan
    assert result.verdict[:2] == (None, "the inference gap is not a number for 1 of 16 data")
    assert made(0.1, 0.2).verdict.holds


def test_the_figure():
    result = made(1.0, 2.0, noise=0.5)
    each, mean = plots.inference_gap(result).axes
    heights = torch.tensor([patch.get_height() for patch in each.patches], dtype=torch.float64).reshape(2, 16)
    torch.testing.assert_close(heights.sum(0), result.inference.sort(descending=True).values)
    assert [patch.get_height() for patch in mean.patches] == pytest.approx([1.0, 2.0, 3.0])
