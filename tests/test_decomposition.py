"""The terms of the ELBO against quadrature, and the identities that hold between them."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import GlobalMean, LinearGaussian, Mixture, TwoLatents, TwoSites
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_vae import VAE, likelihoods, networks, posteriors, priors
from pyro_vae.evaluation import decomposition, elbo_decomposition, summarize
from pyro_vae.programs import declare_parameters

TERMS = ("reconstruction", "rate", "mutual_information", "marginal_kl", "total_correlation", "dimension_wise_kl")


class Listed(nn.Module):
    """Datum i is the number i, and its posterior is written in a list: normal, of independent dimensions."""

    def __init__(self, loc, scale):
        super().__init__()
        self.loc = nn.Parameter(torch.tensor(loc, dtype=torch.float64))
        self.scale = nn.Parameter(torch.tensor(scale, dtype=torch.float64))

    def model(self, x):
        declare_parameters(self)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.loc.shape[1]), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    def guide(self, x):
        declare_parameters(self)
        index = x.long()
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(self.loc[index], self.scale[index]).to_event(1))

    @property
    def data(self):
        return torch.arange(len(self.loc), dtype=torch.float64)


class Idle(LinearGaussian):
    """A guide that is the prior, whatever the datum."""

    def posterior(self, x):
        return x.new_zeros(len(x), self.latent), x.new_ones(len(x), self.latent)


def kl(log_q, log_p, weight):
    return (log_q.exp() * (log_q - log_p)).sum() * weight


def exact(program):
    """The terms by sums over a fine grid of two dimensions, whose step is that of a trapezoidal rule."""
    grid = torch.linspace(-9, 9, 601, dtype=torch.float64)
    step = grid[1] - grid[0]
    normals = dist.Normal(program.loc.detach().T[..., None], program.scale.detach().T[..., None])
    each = normals.log_prob(grid)  # (2, N, grid)
    joint = each[0][:, :, None] + each[1][:, None, :]  # (N, grid, grid)
    log_n = math.log(len(program.loc))
    aggregate, marginals = joint.logsumexp(0) - log_n, each.logsumexp(1) - log_n
    prior = dist.Normal(torch.zeros((), dtype=torch.float64), 1.0).log_prob(grid)
    independent = marginals[0][:, None] + marginals[1][None]
    squares = (torch.tensor([0.0], dtype=torch.float64) + program.data) - program.loc.detach().sum(1)
    noise = (program.scale.detach() ** 2).sum(1)
    return {
        "reconstruction": (-0.5 * (squares**2 + noise) - 0.5 * math.log(2 * math.pi)).mean(),
        "rate": sum(kl(q, prior, step) for n in range(len(joint)) for q in each[:, n]) / len(joint),
        "mutual_information": sum(kl(q, aggregate, step**2) for q in joint) / len(joint),
        "marginal_kl": kl(aggregate, prior[:, None] + prior, step**2),
        "total_correlation": kl(aggregate, independent, step**2),
        "dimension_wise_kl": sum(kl(q, prior, step) for q in marginals),
        "information": torch.stack([sum(kl(q, m, step) for q in own) for own, m in zip(each, marginals, strict=True)])
        / len(joint),
    }


@pytest.fixture
def listed():
    return Listed([[-1.0, -1.0], [0.5, 0.8], [2.0, 1.0], [0.0, -0.3]], [[0.6, 0.4], [0.3, 0.8], [0.5, 0.5], [1.2, 0.7]])


def test_terms_are_those_of_quadrature(listed):
    """All within 4 standard errors (seed 0; six terms, a false alarm in 2,600), which are themselves small."""
    found, expected = elbo_decomposition(listed, listed.data, 4000), exact(listed)
    for name in TERMS:
        assert found.errors[name] < 0.03
        assert abs(getattr(found, name) - expected[name]) < 4 * found.errors[name], name
    assert abs(found.elbo - (expected["reconstruction"] - expected["rate"])) < 0.1
    torch.testing.assert_close(found.information_per_dimension, expected["information"], atol=0.03, rtol=0)
    assert found.dimensions == ("z[0]", "z[1]")


def test_terms_add_up(listed):
    found = elbo_decomposition(listed, listed.data, 3)
    assert found.rate == pytest.approx(found.mutual_information + found.marginal_kl, abs=1e-12)
    assert found.marginal_kl == pytest.approx(found.total_correlation + found.dimension_wise_kl, abs=1e-12)
    assert found.rate == pytest.approx(found.kl_per_dimension.sum().item(), abs=1e-12)


def test_errors_are_those_of_repeats(listed):
    """Over 200 seeds, within 25 %: 5 standard errors of a standard deviation, for each of six terms."""
    repeats = [elbo_decomposition(listed, listed.data, 5, seed=seed) for seed in range(200)]
    for name in TERMS:
        spread = torch.tensor([getattr(found, name) for found in repeats]).std().item()
        claimed = sum(found.errors[name] ** 2 for found in repeats) / 200
        assert spread == pytest.approx(math.sqrt(claimed), rel=0.25), name


def test_two_sites_by_quadrature():
    """Given z1, z2 has nothing to do with the datum: all of the information is that of z1 (seed 0, 4 errors)."""
    program, x = TwoSites(), 2 * torch.randn(6, 2, dtype=torch.float64)
    found = elbo_decomposition(program, x, 3000)
    grid = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    each = dist.Normal((x @ program.slope.detach())[:, None], program.log_scale.detach().exp()).log_prob(grid)
    aggregate = each.logsumexp(0) - math.log(6)
    expected = sum(kl(q, aggregate, grid[1] - grid[0]) for q in each) / 6
    assert abs(found.mutual_information - expected) < 4 * found.errors["mutual_information"]
    assert found.errors["mutual_information"] < 0.02
    assert found.total_correlation is None
    assert found.dimension_wise_kl is None
    assert found.information_per_dimension is None
    assert found.dimensions == ("z1[0]", "z2[0]")
    assert found.kl_per_dimension.sum().item() == pytest.approx(found.rate, abs=1e-12)
    assert found.rate == pytest.approx(found.mutual_information + found.marginal_kl, abs=1e-12)


def test_dimensions_of_two_sites_keep_their_names():
    """The share of z2, which comes first in the model and last in the guide, in closed form (seed 0)."""
    program, x = TwoSites(), 2 * torch.randn(6, 2, dtype=torch.float64)
    found = elbo_decomposition(program, x, 3000)
    scale = (2 * program.log_back).exp()
    square = program.back**2 * ((x @ program.slope) ** 2 + (2 * program.log_scale).exp()) + scale
    expected = (0.5 * (square - 1) - program.log_back).mean().item()
    assert found.kl_per_dimension[1] == pytest.approx(expected, abs=0.03)


def test_all_is_given_one_draw_of_a_global_latent():
    """Which moves all posteriors alike, and their information not at all: quadrature, 4 standard errors (seed 0)."""
    program, x = GlobalMean(3), torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)
    found = elbo_decomposition(program, x, 20000)
    grid = torch.linspace(-8, 8, 2001, dtype=torch.float64)
    each = dist.Normal(x[:, None] / 2, program.log_local.detach().exp()).log_prob(grid)
    expected = sum(kl(q, each.logsumexp(0) - math.log(3), grid[1] - grid[0]) for q in each) / 3
    assert abs(found.mutual_information - expected) < 4 * found.errors["mutual_information"]


def test_rate_and_reconstruction_are_exact():
    """Within 4 standard errors of the closed form (seed 0), and of `summarize`."""
    program, x = LinearGaussian(scale=0.8), torch.randn(50, 3, dtype=torch.float64)
    found, summary = elbo_decomposition(program, x, 200), summarize(program, x, 2000)
    assert abs(found.rate - program.rate(x).mean()) < 4 * found.errors["rate"]
    assert abs(found.reconstruction + program.distortion(x).mean()) < 4 * found.errors["reconstruction"]
    assert found.elbo == pytest.approx(summary.elbo.mean().item(), abs=0.05)


def test_a_guide_that_ignores_the_data_has_no_information():
    found = elbo_decomposition(Idle(), torch.randn(30, 3, dtype=torch.float64))
    assert [getattr(found, name) for name in TERMS[1:]] == pytest.approx([0.0] * 5, abs=1e-12)
    found = elbo_decomposition(Mixture(), torch.randint(2, (30, 2)).double())  # discrete, one q(z) for all
    assert found.mutual_information == pytest.approx(0, abs=1e-12)
    assert found.dimensions == ("z",)


def test_information_is_at_most_the_logarithm_of_the_number():
    """Which it reaches where posteriors are apart."""
    program = Listed([[-20.0], [0.0], [20.0]], [[0.1]] * 3)
    found = elbo_decomposition(program, program.data)
    assert found.mutual_information == pytest.approx(math.log(3), abs=1e-12)
    assert found.errors["mutual_information"] < 1e-12


@pytest.mark.parametrize("posterior", ["FullNormal", "Flow", "Mixture"])
def test_dimensions_that_are_not_independent(posterior):
    make = {
        "FullNormal": lambda: posteriors.FullNormal(networks.MLP(3, 2 + 2 + 1), 2),
        "Mixture": lambda: posteriors.Mixture(networks.MLP(3, 3 * 5), 2, components=3),
        "Flow": lambda: posteriors.Flow(networks.MLP(3, 2 * 2 + 8), 2, context=8),
    }
    vae = VAE(priors.StandardNormal(2), likelihoods.Gaussian(networks.MLP(2, 2 * 3), (3,)), make[posterior]()).double()
    found = elbo_decomposition(vae, torch.randn(20, 3, dtype=torch.float64))
    assert found.total_correlation is found.dimension_wise_kl is found.kl_per_dimension is None
    assert found.rate == pytest.approx(found.mutual_information + found.marginal_kl, abs=1e-9)
    assert found.mutual_information <= math.log(20)


@pytest.mark.parametrize("program", [TwoLatents().double(), GlobalMean(20)])
def test_any_program(program):
    x = torch.rand(20, 64, dtype=torch.float64).round() if isinstance(program, TwoLatents) else torch.randn(20).double()
    state = torch.get_rng_state()
    found = elbo_decomposition(program, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert program.training
    assert 0 < found.mutual_information <= math.log(20) + 1e-9


def test_blocks_make_no_difference(listed, monkeypatch):
    whole = elbo_decomposition(listed, listed.data, 7)
    monkeypatch.setattr(decomposition, "ROWS", 5)
    monkeypatch.setattr(decomposition, "VALUES_AT_ONCE", 64 * 5 * 3)
    assert elbo_decomposition(listed, listed.data, 7).mutual_information == pytest.approx(
        whole.mutual_information, 1e-12
    )


def test_data_that_come_in_another_order_each_time(listed):
    loader = DataLoader(TensorDataset(listed.data), batch_size=2, shuffle=True)
    found, expected = elbo_decomposition(listed, loader, 2000), exact(listed)["mutual_information"]
    assert abs(found.mutual_information - expected) < 4 * found.errors["mutual_information"]


def test_first_data_alone():
    program, x = LinearGaussian(), torch.randn(50, 3, dtype=torch.float64)
    found = elbo_decomposition(program, x, num_data=20)
    assert found.num_data == 20
    assert found.mutual_information == elbo_decomposition(program, x[:20]).mutual_information
    assert elbo_decomposition(program, DataLoader(TensorDataset(x), batch_size=7), num_data=20).num_data == 20


@pytest.mark.parametrize("options", [{"num_samples": 0}, {"num_data": 0}, {"num_data": 2.5}])
def test_numbers_are_positive_and_whole(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}: expected a whole number, at least 1, got "):
        elbo_decomposition(LinearGaussian(), torch.zeros(3, 3, dtype=torch.float64), **options)
