"""What `pyro_vae.distributions` promises besides the contract of components, against exact values and other classes."""

import copy
import subprocess
import sys

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

from pyro_vae import likelihoods, networks
from pyro_vae.distributions import (
    BatchNormal,
    DiagonalNormalMixture,
    DiscretizedLogistic,
    FlowDistribution,
    Grid,
    OneHotCategoricalGroups,
    OneHotGroups,
    OpenBeta,
    PathwiseMixture,
    RelaxedOneHotCategoricalGroups,
    UniformSphere,
    as_pyro,
    describe,
    import_zuko,
    mixture,
    same_support,
)


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


# Mixtures


def mixtures(scale=1.0, dtype=torch.float64):
    """The same mixture in both classes, and its parameters."""
    logits, loc, log_scale = (torch.randn(*s, dtype=torch.float64) for s in ((4,), (4, 3), (4, 3)))
    parameters = [t.to(dtype).requires_grad_() for t in (logits, loc, scale * log_scale.exp())]
    return *(make(parameters[0], dist.Normal(*parameters[1:]).to_event(1)) for make in (mixture, _torchs)), parameters


def _torchs(logits, components):
    return dist.MixtureSameFamily(dist.Categorical(logits=logits), components)


@pytest.mark.parametrize("leading", [(), (5,), (6, 5)])
def test_mixture_is_torchs(leading):
    ours, torchs, parameters = mixtures()
    assert type(ours) is DiagonalNormalMixture
    value = torch.randn(*leading, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(leading, dtype=torch.float64)
    results = []
    for fn in (ours, torchs):
        log_prob = fn.log_prob(value)
        results.append((log_prob, *torch.autograd.grad((weight * log_prob).sum(), [value, *parameters])))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)
    larger = ours.expand((7, *leading))
    torch.testing.assert_close(larger.log_prob(value), torchs.log_prob(value).expand(7, *leading))
    assert larger.sample((2,)).shape == (2, 7, *leading, 3)


def test_mixture_of_small_scales_in_float32():
    """The products cancel by a factor of (loc / scale)^2 = 1e8, which float32 alone would not survive."""
    ours, *_ = mixtures(scale=1e-4)
    single = mixture(ours.once[0].logits.float(), dist.Normal(*(t.float() for t in _normal(ours))).to_event(1))
    value = ours.sample((200,)).float()
    double_of_single = dist.MixtureSameFamily(
        dist.Categorical(logits=single.once[0].logits.double()),
        dist.Normal(*(t.double() for t in _normal(single))).to_event(1),
    )
    assert single.log_prob(value).dtype == torch.float32
    torch.testing.assert_close(
        single.log_prob(value).double(), double_of_single.log_prob(value.double()), rtol=1e-5, atol=1e-4
    )


def _normal(fn):
    return fn.once[1].base_dist.loc, fn.once[1].base_dist.scale


def test_other_mixtures_are_torchs_and_outsiders_are_refused():
    logits = torch.zeros(4)
    assert type(mixture(logits, dist.Laplace(torch.zeros(4, 3), 1.0).to_event(1))).__name__ == "_Mixture"
    assert type(mixture(logits, dist.Normal(torch.zeros(4), 1.0))).__name__ == "_Mixture"
    fn = DiagonalNormalMixture(
        dist.Categorical(logits=logits), dist.Normal(torch.zeros(4, 3), 1.0).to_event(1), validate_args=True
    )
    with pytest.raises(ValueError, match="support"):
        fn.log_prob(torch.full((3,), torch.nan))


def test_pathwise_mixture_draws_of_each_datum_are_its_own():
    """Components far apart say which mixture a draw is of: with several at once Pyro's takes another datum's."""
    locs = 100.0 * torch.arange(5.0).reshape(5, 1, 1) + torch.tensor([0.0, 10.0])[:, None].expand(2, 3)
    fn = PathwiseMixture(locs, torch.full_like(locs, 0.1), torch.zeros(5, 2))
    draws = fn.sample((4,))
    assert draws.shape == (4, 5, 3)
    assert ((draws - 100.0 * torch.arange(5.0)[:, None]).abs() < 11).all()
    assert fn.rsample((2, 4)).shape == (2, 4, 5, 3)


# Grids


@pytest.mark.parametrize("bins", [2, 17, 256])
@pytest.mark.parametrize("scale", [1e-5, 1e-3, 0.05, 1.0, 1e3, 1e4])
@pytest.mark.parametrize("loc", [-3.0, 0.0, 0.31, 1.0, 20.0])
def test_discretized_logistic_in_float32(loc, scale, bins):
    """It sums to one, no bin is infinitely unlikely, gradients are finite, and bins are those of float64's CDF."""
    parameters = torch.tensor([loc, scale], requires_grad=True)
    fn = DiscretizedLogistic(*parameters, bins)
    grid = torch.arange(bins) / (bins - 1)
    log_prob = fn.log_prob(grid)
    assert log_prob.logsumexp(0).item() == pytest.approx(0, abs=2e-4)
    assert log_prob.isfinite().all()
    (gradient,) = torch.autograd.grad(log_prob.sum(), parameters)
    assert gradient.isfinite().all()
    mean = (log_prob.double().exp() * grid).sum()
    assert fn.mean.item() == pytest.approx(mean.item(), abs=2e-4)


def test_discretized_logistic_against_the_cdf():
    """To 1e-10, with the tails in the first and last bin."""
    fn = DiscretizedLogistic(double(0.3, 0.9), double(0.1, 0.02), 9)
    grid = torch.arange(9, dtype=torch.float64)[:, None] / 8
    edges = torch.cat((double(-torch.inf), (torch.arange(8) + 0.5).double() / 8, double(torch.inf)))[:, None]
    exact = torch.sigmoid((edges - fn.loc) / fn.scale).diff(dim=0)
    torch.testing.assert_close(fn.log_prob(grid).exp(), exact, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(fn.mean, (exact * grid).sum(0), rtol=1e-10, atol=0)
    with pytest.raises(ValueError, match="support"):
        DiscretizedLogistic(double(0.3), double(0.1), 9, validate_args=True).log_prob(double(0.3))


def test_grid():
    for bins in (2, 9, 256):
        grid = torch.arange(bins) / (bins - 1)
        assert Grid(bins).check(grid).all()
        assert Grid(bins).check(grid.half().float()).all() == (bins < 256)  # what is rounded more is another value
        assert not Grid(bins).check(grid[:-1] + 0.5 / (bins - 1)).any()
        assert not Grid(bins).check(torch.tensor([-1.0, bins]) / (bins - 1)).any()
    assert not Grid(2).check(torch.tensor(torch.nan))


# Classes


def test_one_hot_groups():
    good = torch.tensor([[1.0, 0.0, 0.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, 1.0, 0.0, 0.0]])
    assert OneHotGroups(3).check(good).all()
    bad = torch.tensor([[1.0, 1.0, 0.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 1.0, 0.0, 0.0], [0.0] * 6])
    assert not OneHotGroups(3).check(bad).any()
    assert not OneHotGroups().check(good).any()  # as one group they have two ones


def test_enumeration_of_classes():
    """All values once, in the shapes that Pyro's enumeration wants, and with probabilities that sum to one."""
    logits = torch.randn(5, 2, 3, dtype=torch.float64)
    fn = OneHotCategoricalGroups(logits)
    values = fn.enumerate_support()
    assert values.shape == (9, 5, 6)
    assert fn.enumerate_support(expand=False).shape == (9, 1, 6)
    assert len(values[:, 0].unique(dim=0)) == 9
    torch.testing.assert_close(fn.log_prob(values).logsumexp(0), double(*[0.0] * 5), rtol=0, atol=1e-12)
    torch.testing.assert_close((fn.log_prob(values).exp()[..., None] * values).sum(0), fn.mean)
    classes = dist.OneHotCategorical(logits=logits).to_event(1)
    torch.testing.assert_close(fn.log_prob(values), classes.log_prob(values.unflatten(-1, (2, 3))))


def test_relaxed_classes_are_torchs():
    logits, temperature = torch.randn(5, 2, 3, dtype=torch.float64), double(0.7)[0]
    fn = RelaxedOneHotCategoricalGroups(logits, temperature)
    torchs = dist.RelaxedOneHotCategorical(temperature, logits=logits).to_event(1)
    value = fn.sample((4,))
    torch.testing.assert_close(fn.log_prob(value), torchs.log_prob(value.unflatten(-1, (2, 3))))
    torch.manual_seed(0)
    draws = fn.rsample((3,))
    torch.manual_seed(0)
    torch.testing.assert_close(draws.unflatten(-1, (2, 3)), torchs.rsample((3,)))


def test_relaxed_classes_at_a_low_temperature_in_float32():
    logits = (30 * torch.randn(100, 1, 10)).requires_grad_()
    fn = RelaxedOneHotCategoricalGroups(logits, torch.tensor(0.05), validate_args=True)
    value = fn.rsample()
    log_prob = fn.log_prob(value)
    assert log_prob.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(log_prob.sum(), logits))


# Continuous


def test_open_beta_stays_inside():
    for dtype in (torch.float32, torch.float64):
        concentrations = torch.tensor([1e-3, 1e-2, 1e3], dtype=dtype)
        fn = OpenBeta(concentrations[:, None], concentrations, validate_args=True)
        draws = fn.sample((1000,))
        assert ((draws > 0) & (draws < 1)).all()
        assert fn.log_prob(draws).isfinite().all()
    expanded = fn.expand((2, 3, 3))
    assert type(expanded) is OpenBeta
    assert (expanded.sample() < 1).all()
    with pytest.raises(ValueError, match="support"):
        fn.log_prob(torch.ones(3, 3, dtype=torch.float64))


def test_batch_normal_is_the_likelihood_at_its_highest():
    """Its gradient is that of the normal's log-likelihood maximized over the scale: of -n/2 log mean (x - mu)^2."""
    loc, value = torch.randn(5, 3, dtype=torch.float64, requires_grad=True), torch.randn(5, 3, dtype=torch.float64)
    seen = []
    fn = BatchNormal(loc, torch.ones_like(loc), seen.append)
    total = fn.log_prob(value).sum()
    profile = -0.5 * 15 * ((value - loc).square().mean().log() + 1 + double(2 * torch.pi).log()).squeeze()
    torch.testing.assert_close(total, profile)
    torch.testing.assert_close(*(torch.autograd.grad(t, loc)[0] for t in (total, profile)))
    assert [v.item() for v in seen] == [pytest.approx((value - loc).square().mean().item())]
    other = fn.expand((2, 5, 3))
    other.log_prob(value)
    assert type(other) is BatchNormal
    assert len(seen) == 2
    assert fn.log_prob(loc.detach()).isfinite().all()  # no error at all


def test_optimal_scale_is_a_running_average():
    """The first 100 batches count alike, later ones by a hundredth; evaluation uses it and leaves it."""
    likelihood = likelihoods.Gaussian(networks.MLP(2, 3, hidden=()), (3,), scale="optimal").double()
    errors = []
    for _ in range(4):
        z, x = torch.randn(5, 2, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
        fn = likelihood(z)
        fn.log_prob(x)
        errors.append((x - fn.mean).square().mean().item())
    assert likelihood.mean_square_error.item() == pytest.approx(sum(errors) / 4)
    before = copy.deepcopy(likelihood.state_dict())
    fn = likelihood.eval()(z)
    fn.log_prob(x)
    assert fn.stddev.unique().item() == pytest.approx((sum(errors) / 4) ** 0.5)
    assert all(torch.equal(value, before[name]) for name, value in likelihood.state_dict().items())
    likelihood.train()
    likelihood.num_batches.fill_(10_000)
    likelihood(z).log_prob(x)
    expected = 0.99 * sum(errors) / 4 + 0.01 * errors[-1]
    assert likelihood.mean_square_error.item() == pytest.approx(expected)


# Flows


def test_zuko_changes_nothing():
    """In a process of its own: torch validates as before, zuko's distributions do without."""
    code = """
import torch
from torch.distributions import Distribution
before = Distribution._validate_args, vars(Distribution)["arg_constraints"]
from pyro_vae.distributions import import_zuko
zuko = import_zuko()
assert (Distribution._validate_args, vars(Distribution)["arg_constraints"]) == before
try:
    torch.distributions.Normal(0.0, -1.0)
except ValueError:
    print(zuko.flows.MAF(3)().log_prob(torch.zeros(3)).shape)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "torch.Size([])"


@pytest.fixture
def flow():
    return FlowDistribution(import_zuko().flows.MAF(3, transforms=2, hidden_features=(8,)).double()())


def test_flow_expands(flow):
    larger = flow.expand((5,)).expand((4, 5))
    assert isinstance(larger, FlowDistribution)
    assert (larger.batch_shape, larger.event_shape) == ((4, 5), (3,))
    value = larger.sample()
    torch.testing.assert_close(larger.log_prob(value), flow.log_prob(value))
    assert flow.sample((2,)).shape == (2, 3)


def test_flow_keeps_the_density_of_its_draws(flow):
    value = flow.rsample((5,))
    assert flow.log_prob(value) is flow.log_prob(value)
    torch.testing.assert_close(flow.log_prob(value), flow.log_prob(value.detach().clone()))
    assert not flow.sample((5,)).requires_grad


def test_flow_that_drew_without_gradients_scores_with_them(flow):
    """As in wake-sleep: what was kept of the draw has no gradient, and would be a loss without one."""
    with torch.no_grad():
        value = flow.rsample((5,))
        assert flow.log_prob(value) is flow.log_prob(value)
    assert flow.log_prob(value).requires_grad


def test_as_pyro():
    normal = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    assert as_pyro(normal) is normal
    torchs = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(3), 1.0), 1)
    assert isinstance(as_pyro(torchs), FlowDistribution)
    torch.testing.assert_close(as_pyro(torchs).log_prob(torch.ones(3)), normal.log_prob(torch.ones(3)))


# Supports


def test_supports_are_compared_and_described():
    assert same_support(constraints.real_vector, constraints.independent(constraints.real, 1))
    assert not same_support(constraints.real_vector, constraints.unit_interval)
    distributions = [
        dist.Normal(torch.zeros(3), 1.0).to_event(1),
        dist.LogNormal(torch.zeros(3), 1.0).to_event(1),
        dist.Bernoulli(torch.full((3,), 0.5)).to_event(1),
        dist.ContinuousBernoulli(torch.tensor(0.5)),
        OpenBeta(torch.ones(2), torch.ones(2)),
        dist.Poisson(torch.ones(2)),
        OneHotCategoricalGroups(torch.zeros(2, 3)),
        RelaxedOneHotCategoricalGroups(torch.zeros(2, 3), torch.tensor(1.0)),
        UniformSphere(3),
    ]
    words = [describe(fn.support) for fn in distributions]
    assert len(set(words)) == len(distributions)
    assert all(word != repr(fn.support) for word, fn in zip(words, distributions, strict=True))
