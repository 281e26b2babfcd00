"""NUTS against guides whose error is known: exact ones, one too narrow, one off in its mean."""

import dataclasses
import math
import re
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import GlobalMean, LinearGaussian, Mixture, TwoLatents, TwoSites
from torch import nn

import pyro_vae
from pyro_vae import diagnostics, plots
from pyro_vae.programs import data_plate

SHORT = {"num_samples": 150, "warmup_steps": 50, "num_chains": 2}


class Errors(nn.Module):
    """z ~ N(0, 1), x ~ N(z, 1) in three dimensions. The guide is exact in one, too narrow in one, off in one."""

    def __init__(self):
        super().__init__()
        self.scales = nn.Parameter(torch.tensor([1.0, 0.5, 1.0], dtype=torch.float64))
        self.shifts = nn.Parameter(torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))
        self.noise = nn.Parameter(torch.ones(3, dtype=torch.float64), requires_grad=False)

    def model(self, x):
        with data_plate(x, size=50):  # a scale of N / B, which is none of the posterior's
            z = pyro.sample("z", dist.Normal(torch.zeros_like(self.scales), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, self.noise).to_event(1), obs=x)

    def guide(self, x):
        with data_plate(x, size=50):
            sd = 0.5**0.5
            pyro.sample("z", dist.Normal(x / 2 + sd * self.shifts, sd * self.scales).to_event(1))


@pytest.fixture(scope="module")
def errors():
    pyro.clear_param_store()
    x = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)
    return diagnostics.nuts(Errors(), x, **SHORT | {"num_samples": 180}), x


def test_chains_are_of_the_posterior(errors):
    """Means and scales of 360 draws within 4 standard errors, by the effective sample; false alarms 4e-4, seed 0."""
    found, x = errors
    sd, root = 0.5**0.5, found.ess.sqrt()
    assert found.names == ("z[0]", "z[1]", "z[2]")
    assert found.mixed.all()
    assert ((found.mean - x / 2).abs() < 4 * sd / root).all()
    assert ((found.scale / sd - 1).abs() < 4 / (2**0.5 * root)).all()
    assert (found.rhat < 1.05).all()
    assert found.divergences.tolist() == [0.0]


def test_distances_are_those_of_normals(errors):
    """That of a scale off by a half is E|z| / 2, that of a mean off by one is 1; tolerance twice the expected error."""
    found, x = errors
    sd = 0.5**0.5
    torch.testing.assert_close(found.guide_mean - x / 2, torch.tensor([[0.0, 0.0, sd]]).double(), rtol=0, atol=0.05)
    torch.testing.assert_close(found.guide_scale, sd * torch.tensor([[1.0, 0.5, 1.0]]).double(), rtol=0.05, atol=0)
    expected = torch.tensor([[0.0, 0.5 * (2 / math.pi) ** 0.5, 1.0]], dtype=torch.float64)
    assert ((found.distance - expected).abs() < 2 * found.error).all()
    assert (found.error < 0.13).all()


def test_the_verdict_follows_the_distances(errors, tmp_path):
    found, _ = errors
    assert found.share == pytest.approx(2 / 3)
    assert found.verdict.holds is False
    assert "in 67% of 3 latent dimensions of 1 data" in found.verdict.finding
    exact = only(found, [0])
    assert exact.verdict.holds is True
    assert exact.verdict.advice == ""
    narrow, off = only(found, [1]).verdict, only(found, [2]).verdict
    assert (narrow.holds, off.holds) == (False, False)
    assert re.search(r"scales 0\.[45]\d of the posterior", narrow.finding)
    assert "richer posterior" in narrow.advice
    assert "encoder" in off.advice
    assert only(found, [1], threshold=0.5).verdict.holds is True
    for number, result in enumerate((found, exact)):
        plots.nuts(result).savefig(tmp_path / f"{number}.png")


@pytest.mark.parametrize("worse", [{"rhat": 1.06}, {"rhat": math.nan}, {"ess": 99.0}, {"divergences": 0.02}])
def test_without_chains_to_rely_on_it_cannot_tell(errors, worse, tmp_path):
    found, _ = errors
    changed = {name: torch.full_like(getattr(found, name), value) for name, value in worse.items()}
    result = dataclasses.replace(found, **changed)
    assert result.verdict.holds is None
    assert "warmup" in result.verdict.advice
    plots.nuts(result).savefig(tmp_path / "figure.png")


def only(found, dimensions, **changes):
    fields = {f.name: getattr(found, f.name) for f in dataclasses.fields(found)}
    columns = {n: v[:, dimensions] for n, v in fields.items() if isinstance(v, torch.Tensor) and v.ndim == 2}
    return dataclasses.replace(found, names=tuple(found.names[i] for i in dimensions), **columns, **changes)


class Rate(nn.Module):
    """z ~ Gamma(2, 1), x ~ Poisson(3 z): the posterior is Gamma(2 + x, 4), as the guide is."""

    def model(self, x):
        with data_plate(x):
            z = pyro.sample("z", dist.Gamma(torch.tensor(2.0), 1.0))
            pyro.sample("x", dist.Poisson(3.0 * z), obs=x)

    def guide(self, x):
        with data_plate(x):
            pyro.sample("z", dist.Gamma(2.0 + x, 4.0))


def test_a_latent_under_a_constraint():
    """Without the transform's Jacobian the mean would be 0.5 and not 0.75; 4 standard errors, false alarms 6e-5."""
    found = diagnostics.nuts(Rate(), torch.ones(1), **SHORT)
    assert found.names == ("z",)
    scale = 3**0.5 / 4
    assert found.mean.item() == pytest.approx(0.75, abs=4 * scale / found.ess.item() ** 0.5)
    assert (found.distance < found.threshold + found.error).all()


@pytest.mark.slow
def test_global_latents_are_those_of_the_guide():
    """Given one draw of the mean, z is N((m + x) / 2, 1/2): exact, with the same m in the chains and the guide."""
    x = torch.tensor([3.0, -1.0, 0.5], dtype=torch.float64)
    found = diagnostics.nuts(GlobalMean(3), x, num_data=1, **SHORT)
    assert found.distance.shape == (1, 1)
    assert (found.distance < found.threshold + found.error).all()
    assert abs(found.guide_mean - found.mean).item() < 4 * 0.5**0.5 / found.ess.item() ** 0.5 + 0.05


@pytest.mark.slow
def test_two_modes():
    """Of x = z^2 the guide has one root; a chain from the prior finds the other at some of three seeds."""

    class Square(nn.Module):
        def model(self, x):
            with data_plate(x):
                z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
                pyro.sample("x", dist.Normal(z**2, 0.1), obs=x)

        def guide(self, x):
            with data_plate(x):
                pyro.sample("z", dist.Normal(x**0.5, 0.03))

    results = [
        diagnostics.nuts(Square(), torch.tensor([4.0]), num_samples=20, warmup_steps=20, num_chains=2, seed=seed)
        for seed in range(3)
    ]
    apart = [result for result in results if result.mean.abs().item() < 1]
    assert apart
    for result in apart:
        assert result.rhat.item() > 1.5
        assert result.verdict.holds is None


@pytest.mark.slow
@pytest.mark.parametrize(("program", "holds"), [
    (LinearGaussian(), True),
    (LinearGaussian(scale=0.5), False),
    (TwoSites(exact=True), True),
    (TwoSites(), False),
])  # fmt: skip
def test_verdicts(program, holds):
    """Two data by two chains, seed 0; an exact guide has the error in expectation, and the limit is 0.2 above that."""
    x = torch.randn(2, 3 if isinstance(program, LinearGaussian) else 2, dtype=torch.float64)
    found = diagnostics.nuts(program, x, **SHORT | {"num_samples": 300})
    assert found.verdict.holds is holds
    assert found.distance.shape == (2, 2)


def test_two_sites_and_nothing_left_behind(capfd):
    program, x = TwoLatents().train(), torch.ones(3, 8, 8)
    program.down.bias.requires_grad_(False)
    asked = [parameter.requires_grad for parameter in program.parameters()]
    state = torch.get_rng_state()
    few = {"num_data": 2, "num_samples": 4, "warmup_steps": 2, "num_chains": 2, "num_guide_samples": 20}
    first, again, other = (diagnostics.nuts(program, x, **few, seed=s, progress=False) for s in (0, 0, 1))
    assert first.names == ("z2[0]", "z2[1]", "z1[0]", "z1[1]", "z1[2]", "z1[3]")
    assert first.distance.shape == (2, 6)
    assert torch.equal(first.mean, again.mean)
    assert torch.equal(first.guide_mean, again.guide_mean)
    assert not torch.equal(first.mean, other.mean)
    assert torch.equal(torch.get_rng_state(), state)
    assert [parameter.requires_grad for parameter in program.parameters()] == asked
    assert all(parameter.grad is None for parameter in program.parameters())
    assert program.training
    assert torch.is_grad_enabled()
    assert capfd.readouterr() == ("", "")


class Below(nn.Module):
    """A latent below another."""

    def model(self, x):
        with data_plate(x):
            top = pyro.sample("top", dist.LogNormal(x.new_tensor(0.0), 1.0))
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Uniform(torch.zeros_like(top), top)), 1.0), obs=x)

    def guide(self, x):
        with data_plate(x):
            top = pyro.sample("top", dist.LogNormal(x.new_tensor(0.0), 1.0))
            pyro.sample("z", dist.Uniform(torch.zeros_like(top), top))


def test_errors_come_before_the_work(monkeypatch):
    def work(*args, **kwargs):
        raise AssertionError("too late")

    monkeypatch.setattr(sys.modules["pyro_vae.diagnostics.nuts"], "MCMC", work)
    with pytest.raises(ValueError, match="expected continuous latents, got Categorical at site 'z'"):
        diagnostics.nuts(Mixture(), torch.ones(2, 2))
    with pytest.raises(ValueError, match="expected latents whose support is fixed, got Interval at site 'z'"):
        diagnostics.nuts(Below(), torch.ones(1))
    sphere = pyro_vae.build((8, 8), latent=3, prior="UniformSphere()", posterior="VonMisesFisher()")
    with pytest.raises(ValueError, match="expected latents that gradients can move freely, got Sphere"):
        diagnostics.nuts(sphere, torch.ones(1, 8, 8))
    with pytest.raises(ValueError, match="num_chains: expected a whole number, at least 2, got 1"):
        diagnostics.nuts(TwoLatents(), torch.ones(1, 8, 8), num_chains=1)
    program = TwoLatents()
    with pytest.raises(AssertionError, match="too late"):
        diagnostics.nuts(program, torch.ones(1, 8, 8))
    assert all(parameter.requires_grad for parameter in program.parameters())
