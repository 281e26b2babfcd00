"""Draws of latents and data, and densities of latents without constraints: against exact models, in float64."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import GlobalMean, LinearGaussian, Mixture, TwoLatents, TwoSites
from pyro import poutine
from torch import nn

from pyro_vae.estimators.particles import global_latents
from pyro_vae.evaluation import LatentSpace, posterior_draws, predictive_draws, prior_draws, sample
from pyro_vae.evaluation.draws import check_observed
from pyro_vae.programs import data_plate, undisturbed


class Durations(nn.Module):
    """z ~ Gamma(2, 1), x ~ Exponential(z), of evidence 2 / (1 + x)^3. The guide is the posterior, Gamma(3, 1 + x)."""

    def model(self, x):
        with data_plate(x):
            z = pyro.sample("z", dist.Gamma(x.new_tensor(2.0), 1.0))
            pyro.sample("x", dist.Exponential(z), obs=x)

    def guide(self, x):
        with data_plate(x):
            pyro.sample("z", dist.Gamma(x.new_tensor(3.0), 1 + x))


class Names(nn.Module):
    """Model and guide that differ in a local latent."""

    def model(self, x):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(x.new_tensor(0.0), 1.0))
            pyro.sample("w", dist.Normal(z, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(self, x):
        with data_plate(x):
            pyro.sample("z", dist.Normal(x, 1.0))


@pytest.mark.parametrize(
    "program", [LinearGaussian(), TwoSites(exact=True)], ids=lambda program: type(program).__name__
)
def test_log_weights_are_the_evidence_at_the_exact_posterior(program):
    x = torch.randn(4, 3 if isinstance(program, LinearGaussian) else 2, dtype=torch.float64)
    with undisturbed(program):
        draws = posterior_draws(program, x, num_samples=6)
        expected = program.evidence(x).expand(6, -1)
    torch.testing.assert_close(draws.log_weights, expected, rtol=0, atol=1e-12)
    assert all(value.shape[:2] == (6, 4) for value in draws.latents.values())


def test_global_latents_are_shared_by_all_data_and_batches():
    program, x = GlobalMean(6), torch.randn(6, dtype=torch.float64)
    with undisturbed(program):
        first = posterior_draws(program, x[:4], num_samples=5)
        second = posterior_draws(program, x[4:], num_samples=5, shared=first.shared)
        data = predictive_draws(program, x[:4], draws=first)
    assert first.shared["m"].shape == (5, 1)
    assert first.shared["m"].unique().numel() == 5
    assert second.shared["m"].equal(first.shared["m"])
    assert data.shape == (5, 4)


def test_model_and_guide_must_have_the_same_latents():
    program = Names()
    with undisturbed(program), pytest.raises(ValueError, match=r"model's latents \['w', 'z'\], got \['z'\]"):
        posterior_draws(program, torch.zeros(3), num_samples=2)


def test_predictive_draws_are_of_the_predictive_distribution():
    """Four standard errors for each of 2 x 12 figures, seed 0: false alarms in 0.15 % of seeds."""
    program, x = LinearGaussian(noise=1.3), torch.randn(4, 3, dtype=torch.float64)
    num_samples = 20_000
    with undisturbed(program, seed=0):
        drawn = predictive_draws(program, x, draws=posterior_draws(program, x, num_samples=num_samples))
        mean, std = program.posterior(x)
        expected = mean @ program.weight.T + program.bias
        variance = (std[:, None, :] ** 2 * program.weight**2).sum(-1) + program.noise**2
    error = (variance / num_samples).sqrt()
    assert ((drawn.mean(0) - expected).abs() < 4 * error).all()
    assert ((drawn.var(0) - variance).abs() < 4 * variance * (2 / num_samples) ** 0.5).all()


def test_data_are_withheld():
    """A model that looks at its data otherwise than by observing them finds zeros."""

    class Leaking(LinearGaussian):
        def model(self, x):
            self.seen = x
            super().model(x)

    program, x = Leaking(), torch.randn(4, 3, dtype=torch.float64)
    with undisturbed(program):
        draws = posterior_draws(program, x, num_samples=2)
        assert program.seen is x
        for drawn in (predictive_draws(program, x, draws=draws), prior_draws(program, x, num_samples=2)[1]):
            assert not program.seen.any()
            assert not (drawn == x).any()


def test_prior_draws_are_of_the_model():
    """Four standard errors for each of 3 + 9 figures, seed 0: false alarms in 0.08 % of seeds."""
    program, x, num_samples = LinearGaussian(), torch.zeros(1, 3, dtype=torch.float64), 40_000
    with undisturbed(program, seed=0):
        latents, drawn = prior_draws(program, x, num_samples=num_samples)
        covariance = program.weight @ program.weight.T + program.noise**2 * torch.eye(3)
        residual = drawn - latents["z"] @ program.weight.T - program.bias
    variances = covariance.diagonal()
    error = (torch.outer(variances, variances) + covariance**2).div(num_samples).sqrt()
    assert ((torch.cov(drawn[:, 0].T) - covariance).abs() < 4 * error).all()
    assert ((residual.std((0, 1)) - program.noise).abs() < 4 * program.noise * (0.5 / num_samples) ** 0.5).all()


def test_prior_draws_of_integers_and_of_several_sites():
    x = torch.ones(3, 2, dtype=torch.float64)
    program = Mixture()
    with undisturbed(program):
        latents, drawn = prior_draws(program, x, num_samples=4)
    assert latents["z"].dtype == torch.int64
    assert drawn.shape == (4, 3, 2)
    image, program = torch.ones(3, 8, 8), TwoLatents()
    with undisturbed(program):
        latents, drawn = prior_draws(program, image, num_samples=4)
    assert {name: value.shape for name, value in latents.items()} == {"z1": (4, 3, 4), "z2": (4, 3, 2)}
    assert drawn.shape == (4, 3, 8, 8)  # though the site holds flat images


@pytest.mark.parametrize(
    "program", [LinearGaussian(), TwoSites(exact=True), Durations()], ids=lambda p: type(p).__name__
)
def test_densities_without_constraints(program):
    """Log p(x, u) - log q(u given x) is the evidence wherever u is, if the guide is exact."""
    x = torch.rand(4, {"LinearGaussian": 3, "TwoSites": 2}.get(type(program).__name__, 1), dtype=torch.float64)
    x = x[:, 0] if isinstance(program, Durations) else x
    with undisturbed(program):
        space = LatentSpace(program, x)
        u, log_posterior = space.posterior_draws(5)
        log_prior, log_likelihood = space.log_densities(u)
        expected = torch.log(2 / (1 + x) ** 3) if isinstance(program, Durations) else program.evidence(x)
        back = space.unconstrained(space.latents(u))
    torch.testing.assert_close(log_prior + log_likelihood - log_posterior, expected.expand(5, -1), rtol=0, atol=1e-11)
    torch.testing.assert_close(back, u)


def test_a_density_without_constraints_has_mass_one():
    """By quadrature: log p(u) of a Gamma latent has the Jacobian of its transform."""
    program, x = Durations(), torch.ones(1, dtype=torch.float64)
    u = torch.linspace(-25, 6, 4000, dtype=torch.float64)
    with undisturbed(program):
        log_prior, log_likelihood = LatentSpace(program, x).log_densities(u[:, None, None])
    torch.testing.assert_close(torch.trapezoid(log_prior.exp()[:, 0], u), torch.tensor(1.0, dtype=torch.float64))
    evidence = torch.trapezoid((log_prior + log_likelihood).exp()[:, 0], u)
    torch.testing.assert_close(evidence, torch.tensor(2 / 2**3, dtype=torch.float64))


def test_densities_are_given_one_draw_of_global_latents():
    program, x = GlobalMean(4), torch.randn(4, dtype=torch.float64)
    with undisturbed(program):
        space = LatentSpace(program, x)
        u, log_posterior = space.posterior_draws(5)
        log_prior, log_likelihood = space.log_densities(u)
        m = space.shared["m"].squeeze()
        expected = dist.Normal(m, 2**0.5).log_prob(x)  # z integrated out: x given m
    assert m.ndim == 0
    torch.testing.assert_close(log_prior + log_likelihood - log_posterior, expected.expand(5, -1), rtol=0, atol=1e-12)


def test_discrete_latents_have_no_such_space():
    program = Mixture()
    with undisturbed(program), pytest.raises(ValueError, match="continuous latents, got Categorical at site 'z'"):
        LatentSpace(program, torch.ones(3, 2, dtype=torch.float64))


class Beside(nn.Module):
    """What else a model may have beside a latent and x: a deterministic site, a factor, and another observed site."""

    def model(self, x):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(x.new_tensor(0.0), 1.0))
            mean = pyro.deterministic("mean", 2 * z)
            pyro.factor("factor", -z.square())
            pyro.sample("y", dist.Normal(z, 1.0), obs=x)
            pyro.sample("x", dist.Normal(mean, 0.1), obs=x)

    def guide(self, x):
        with data_plate(x):
            pyro.sample("z", dist.Normal(x, 1.0))


def test_prior_draws_are_of_latents_alone():
    program = Beside()
    with undisturbed(program):
        latents, drawn = prior_draws(program, torch.ones(3), num_samples=50)
        observed = posterior_draws(program, torch.ones(3), num_samples=2).log_likelihood
    assert list(latents) == ["z"]
    assert (drawn - 2 * latents["z"]).abs().max() < 0.6
    with pytest.raises(ValueError, match=r"alone, got \['factor', 'y'\] too"):
        check_observed(observed)


def test_samples_are_at_what_follows_from_their_latents():
    """A deterministic site has its value from the latents, and is not drawn; six standard deviations, seed 0."""
    means, drawn = sample(Beside(), 50, (), seed=0)
    assert means.shape == drawn.shape == (50,)
    assert means.unique().numel() == 50
    assert (drawn - means).abs().max() < 0.6


class Totals(nn.Module):
    """Counts whose total the model takes from x, or from a tensor beside it."""

    def model(self, x, total=None):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            total = x.sum(-1) if total is None else total
            if z.shape[-1] != x.shape[-1]:
                raise ValueError("three columns")
            pyro.sample("x", dist.Multinomial(int(total.max()), logits=z), obs=x)

    def guide(self, x, total=None):
        with data_plate(x):
            pyro.sample("z", dist.Normal(x, 1.0).to_event(1))


def test_a_model_that_reads_what_is_withheld_says_so():
    program, x = Totals(), torch.tensor([[1.0, 2.0, 3.0], [4.0, 1.0, 1.0]])
    with undisturbed(program), pyro.validation_enabled(False):
        draws = posterior_draws(program, x, num_samples=2)
        with pytest.raises(ValueError, match="takes nothing of x but its shape.* got RuntimeError with zeros for x"):
            predictive_draws(program, x, draws=draws)
        drawn = predictive_draws(program, x, x.sum(-1), draws=draws)
        with pytest.raises(ValueError, match="^three columns$"):  # what is not the withholding's fault
            prior_draws(program, x[:, :2], num_samples=2)
        u = LatentSpace(program, x).prior_draws(5)
    assert (drawn.sum(-1) == 6).all()
    assert u.shape == (5, 2, 3)


class Named(nn.Module):
    """The observed site has a name of its own."""

    def model(self, x):
        with data_plate(x):
            pyro.sample("obs", dist.Normal(pyro.sample("z", dist.Normal(x.new_tensor(0.0), 1.0)), 1.0), obs=x)

    def guide(self, x):
        with data_plate(x):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))


def test_a_space_asks_for_no_name_of_the_observed_site():
    program = Named()
    with undisturbed(program):
        space = LatentSpace(program, torch.ones(3))
        assert space.prior_draws(5).shape == (5, 3, 1)
    assert space.observed == ("obs",)


class Within(nn.Module):
    """A latent within plus and minus a bound: another latent, or a tensor beside x."""

    def model(self, x, bound=None):
        with data_plate(x):
            a = pyro.sample("a", dist.LogNormal(x.new_tensor(0.0), 1.0))
            bound = a if bound is None else bound
            b = pyro.sample("b", dist.Uniform(-bound, bound))
            pyro.sample("x", dist.Normal(b, 1.0), obs=x)

    def guide(self, x, bound=None):
        with data_plate(x):
            a = pyro.sample("a", dist.LogNormal(x.new_tensor(0.0), 1.0))
            bound = a if bound is None else bound
            pyro.sample("b", dist.Uniform(-bound, bound))


def test_supports_that_depend_on_latents_are_refused():
    program, x = Within(), torch.ones(3, dtype=torch.float64)
    with undisturbed(program), pytest.raises(ValueError, match="support is fixed, got Interval at site 'b'"):
        LatentSpace(program, x)
    with undisturbed(program):  # one of each datum is fixed
        space = LatentSpace(program, x, torch.arange(1.0, 4.0, dtype=torch.float64))
        latents = space.latents(space.prior_draws(50))
    assert (latents["b"].abs().amax(0) < torch.arange(1.0, 4.0)).all()


def test_the_scale_of_a_prior():
    """A standard deviation within 4 standard errors where tails are light; of a Cauchy, half the range of its middle
    half over 0.67, by 100 draws within 40 % (three standard errors), seed 0."""

    class Tails(nn.Module):
        def model(self, x):
            with data_plate(x):
                z = pyro.sample("z", dist.Normal(x.new_tensor(0.0), 3.0))
                w = pyro.sample("w", dist.Cauchy(x.new_tensor(0.0), 1.0))
                pyro.sample("x", dist.Normal(z + w, 1.0), obs=x)

        def guide(self, x):
            with data_plate(x):
                pyro.sample("z", dist.Normal(x, 3.0))
                pyro.sample("w", dist.Normal(x, 1.0))

    program = Tails()
    with undisturbed(program, 0):
        scale = LatentSpace(program, torch.zeros(20, dtype=torch.float64)).prior_scale().mean(0)
    assert scale[0].item() == pytest.approx(3.0, abs=4 * 3 / (2 * 100 * 20) ** 0.5)
    assert scale[1].item() == pytest.approx(2 / 1.349, rel=0.4)


def test_global_latents_of_a_plate_of_their_own():
    """Each draw of three, as they stand in the guide."""

    def guide(x):
        with pyro.plate("components", 3, dim=-1):
            pyro.sample("m", dist.Normal(torch.zeros(()), 1.0))
        with data_plate(x):
            pyro.sample("z", dist.Normal(x, 1.0))

    found = global_latents(poutine.trace(guide).get_trace(torch.zeros(5)))
    assert {name: value.shape for name, value in found.items()} == {"m": (3,)}
