"""Regularized ELBOs against closed forms, exact aggregates and sums by hand."""

import functools
import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import LinearGaussian, TwoLatents
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from torch import nn

import pyro_vae
from pyro_vae.estimators import MMD, RBF, BetaTC, Capacity, FreeBits, InverseMultiquadric
from pyro_vae.estimators.kernels import squared_mmd
from pyro_vae.estimators.regularized import log_stratified_weights
from pyro_vae.expressions import parse, write
from pyro_vae.handlers import beta, record, weigh
from pyro_vae.schedules import Linear

ALL = {
    "FreeBits": FreeBits(0.3),
    "FreeBits, one group": FreeBits(0.3, num_groups=1),
    "Capacity": Capacity(2.0, gamma=10.0),
    "BetaTC": BetaTC(4.0, size=1000),
    "MMD": MMD(alpha=0.5, scaling=10.0, kernel=InverseMultiquadric()),
}
each = pytest.mark.parametrize("estimator", ALL.values(), ids=ALL.keys())


class Independent(nn.Module):
    """A guide N(slope x, scale^2), dimension by dimension, and a model that has x of N(0, 1) whatever z."""

    def __init__(self, slope, scale):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(slope, dtype=torch.float64))
        self.log_scale = nn.Parameter(torch.tensor(scale, dtype=torch.float64).log())

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros_like(x[0]), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(torch.zeros_like(x[0]), 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(self.slope * x, self.log_scale.exp()).to_event(1))

    def rates(self, x):
        mean, variance = self.slope * x, (2 * self.log_scale).exp()
        return (0.5 * (mean**2 + variance - 1) - self.log_scale).mean(0)


@pytest.fixture
def problem():
    return LinearGaussian(scale=1.3), torch.randn(6, 3, dtype=torch.float64)


def evaluate(estimator, program, x, weight=1.0):
    """The loss and its gradients, on the random numbers of seed 1."""
    torch.manual_seed(1)
    program.zero_grad()
    with beta(weight):
        loss = estimator.differentiable_loss(program.model, program.guide, x)
    loss.backward()
    return loss.item(), [parameter.grad.clone() for parameter in program.parameters() if parameter.grad is not None]


def distortion(program, x):
    """That at the draws of `evaluate`, for all data."""
    return evaluate(TraceMeanField_ELBO(), program, x, weight=0.0)[0]


def agree(one, other):
    assert one[0] == pytest.approx(other[0], rel=1e-10)
    for got, wanted in zip(one[1], other[1], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


def rates_of(program, x):
    """The closed-form mean rate of each dimension of a linear-Gaussian program."""
    mean, std = program.posterior(x)
    std = program.scale * std
    return (0.5 * (mean**2 + std**2 - 1) - std.log()).mean(0).detach()


# Free bits


@pytest.mark.parametrize("size", [None, 1000])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("num_groups", [None, 1])
def test_without_a_floor_it_is_the_mean_field_elbo(problem, size, weight, num_groups):
    program, x = problem
    program.size = size
    got = evaluate(FreeBits(0.0, num_groups), program, x, weight)
    agree(got, evaluate(TraceMeanField_ELBO(), program, x, weight))


@pytest.mark.parametrize("size", [None, 1000])
@pytest.mark.parametrize("num_groups", [None, 2, 1])
@pytest.mark.parametrize("nats", [0.1, 0.3, 5.0])
def test_each_group_has_a_floor(problem, size, num_groups, nats):
    program, x = problem
    program.size = size
    rates = rates_of(program, x)
    assert 0.1 < rates.min() < 0.3 < rates.max() < 5  # so that none, one and both are free
    groups = rates.reshape(num_groups or 2, -1).sum(-1)
    wanted = (size or 6) * groups.clamp(min=nats).sum().item()
    got, _ = evaluate(FreeBits(nats, num_groups), program, x)
    assert got - distortion(program, x) == pytest.approx(wanted, rel=1e-10)


def test_a_dimension_below_the_floor_has_no_gradient_and_one_above_the_full():
    program, x = Independent([0.1, 2.0], [0.9, 0.3]), torch.randn(6, 2, dtype=torch.float64)
    low, high = program.rates(x).tolist()
    assert low < 0.5 < high
    _, (slope, log_scale) = evaluate(FreeBits(0.5), program, x)
    wanted = torch.autograd.grad(6 * program.rates(x)[1], [program.slope, program.log_scale])
    torch.testing.assert_close((slope, log_scale), wanted, rtol=1e-10, atol=0)
    assert slope[0] == log_scale[0] == 0


def test_a_prior_that_depends_on_what_comes_later_in_the_guide_has_no_closed_form():
    """A chain of normals: 80,000 draws of half a squared error of variance 1/4, seed 0; 4 standard errors (6e-5)."""

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z2 = pyro.sample("z2", dist.Normal(torch.zeros_like(x), 1.0))
            pyro.sample("z1", dist.Normal(z2, 1.0))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            z1 = pyro.sample("z1", dist.Normal(torch.zeros_like(x), 1.0))
            pyro.sample("z2", dist.Normal(z1, 0.5))

    x = torch.zeros(4, dtype=torch.float64)
    loss = FreeBits(0.0, num_groups=1, num_particles=20_000).loss(model, guide, x)
    rate = loss / 4 - 0.5 * math.log(2 * math.pi)
    # E[log q(z1) - log p(z1 | z2)] = E[(z1 - z2)^2 - z1^2] / 2, and the divergence of N(z1, 1/4) from N(0, 1).
    wanted = (0.25 - 1) / 2 + (1 + 0.25 - 1 - math.log(0.25)) / 2
    assert abs(rate - wanted) < 4 * 0.125 * 2**0.5 / 80_000**0.5


def test_groups_go_over_all_latents_side_by_side():
    program, x = TwoLatents().double(), torch.rand(4, 64, dtype=torch.float64).round()
    torch.manual_seed(1)
    guide = poutine.trace(program.guide).get_trace(x)
    model = poutine.trace(poutine.replay(program.model, trace=guide)).get_trace(x)
    (q1, q2), (p1, p2) = ([trace.nodes[name]["fn"].base_dist for name in ("z1", "z2")] for trace in (guide, model))
    z1 = guide.nodes["z1"]["value"]
    rates = [q1.log_prob(z1) - p1.log_prob(z1), torch.distributions.kl_divergence(q2, p2)]
    rates = torch.cat(rates, -1).sum(0).reshape(2, 3).sum(-1)
    model.compute_log_prob()
    wanted = torch.maximum(rates, torch.tensor(4 * 0.5)).sum() - model.nodes["x"]["log_prob"].sum()
    assert evaluate(FreeBits(0.5, num_groups=2), program, x)[0] == pytest.approx(wanted.item(), rel=1e-10)


def test_a_weight_of_the_model_alone_counts(problem):
    program, x = problem
    program.model = poutine.scale(program.model, scale=0.5)
    agree(evaluate(MMD(alpha=0.0, scaling=1.0), program, x), evaluate(Trace_ELBO(), program, x))


def test_one_group_takes_any_distributions():
    vae = pyro_vae.build(
        (8, 8), latent=4, posterior="FullNormal()", prior="VampPrior(components=3)", network="MLP(hidden=[8])"
    )
    loss = FreeBits(0.3, num_groups=1)(vae.model, vae.guide)(torch.ones(3, 8, 8))
    loss.backward()
    with pytest.raises(ValueError, match=r"MultivariateNormal at site 'z'; FreeBits\(num_groups=1\) takes any"):
        FreeBits(0.3).loss(vae.model, vae.guide, torch.ones(3, 8, 8))
    vae = pyro_vae.build((8, 8), latent=4, prior="VampPrior(components=3)", network="MLP(hidden=[8])")
    with pytest.raises(ValueError, match="DiagonalNormalMixture at site 'z'"):
        FreeBits(0.3, num_groups=2).loss(vae.model, vae.guide, torch.ones(3, 8, 8))
    with pytest.raises(ValueError, match="divides 2 dimensions, got 4"):
        FreeBits(0.3, num_groups=4).loss(*(getattr(LinearGaussian(), n) for n in ("model", "guide")), torch.ones(3, 3))


# Capacity


@pytest.mark.parametrize("size", [None, 1000])
@pytest.mark.parametrize("capacity", [0.2, 8.0])
def test_the_rate_is_held_at_the_capacity(problem, size, capacity):
    program, x = problem
    program.size = size
    rate = rates_of(program, x).sum().item()
    assert 0.2 < rate < 8
    estimator = Capacity(Linear(0.5, 0.0, 2 * capacity), gamma=7.0)
    estimator.set_progress(0.25)
    got, _ = evaluate(estimator, program, x)
    wanted = 7 * (size or 6) * abs(rate - capacity)
    assert got - distortion(program, x) == pytest.approx(wanted, rel=1e-10)


def test_fit_tells_how_far_it_is():
    vae, x = pyro_vae.build((8, 8), latent=2, network="MLP(hidden=[4])"), torch.rand(8, 8, 8).round()
    estimator = Capacity(Linear(1.0, 0.0, 4.0))
    pyro_vae.fit(vae, x, estimator=estimator, epochs=4, batch_size=8, progress=False)
    assert estimator.current_capacity == 3.0  # the last of four steps begins at 3/4


# Total correlation


@pytest.mark.parametrize("num_particles", [1, 3])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("make", [LinearGaussian, TwoLatents])
def test_with_equal_weights_it_is_the_elbo(make, weight, num_particles):
    program = make().double()
    program.size = 1000
    x = torch.rand(6, 3 if make is LinearGaussian else 64, dtype=torch.float64).round()
    elbo = Trace_ELBO(num_particles=num_particles, vectorize_particles=True, max_plate_nesting=1)
    got = evaluate(BetaTC(1.0, size=1000, num_particles=num_particles), program, x, weight)
    agree(got, evaluate(elbo, program, x, weight))


@pytest.mark.parametrize("size", [6, 50])
def test_parts_by_hand(problem, size):
    program, x = problem
    program.size = size
    torch.manual_seed(1)
    trace = poutine.trace(program.guide).get_trace(x)
    z = trace.nodes["z"]["value"].detach()
    mean, std = (t.detach() for t in program.posterior(x))
    log_each = dist.Normal(mean, 1.3 * std).log_prob(z[:, None])  # datum of z, datum of x, dimension
    weights = torch.full((6, 6, 1), (size - 1) / size / 5, dtype=torch.float64)
    weights[range(6), range(6)] = 1 / size
    marginals = (weights * log_each.exp()).sum(1).log().sum(-1)
    aggregate = (weights[..., 0] * log_each.sum(-1).exp()).sum(1).log()
    posterior = log_each.sum(-1).diagonal()
    prior = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    parts = [posterior - aggregate, aggregate - marginals, marginals - prior]
    for i, part in enumerate(parts):
        alpha, tc, gamma = (float(i == j) for j in range(3))
        got, _ = evaluate(BetaTC(tc, alpha=alpha, gamma=gamma, size=size), program, x)
        assert got - distortion(program, x) == pytest.approx(size * part.mean().item(), rel=1e-10)


def test_the_aggregate_is_unbiased_over_all_batches():
    densities = torch.rand(5, 5, dtype=torch.float64)  # of the z of datum i under the posterior of datum j
    for i in range(5):
        batches = [batch for batch in itertools.combinations(range(5), 3) if i in batch]
        weights = log_stratified_weights(torch.ones(3, dtype=torch.float64), 5).exp()
        estimates = [weights[batch.index(i)] @ densities[i, list(batch)] for batch in batches]
        assert sum(estimates) / len(batches) == pytest.approx(densities[i].mean().item(), rel=1e-12)


def test_total_correlation_of_a_product_is_zero():
    """Data on a grid make an aggregate whose dimensions are independent, data on its diagonal do not."""
    program = Independent([1.0, 1.0], [0.5, 0.3])
    ticks = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64)
    for x, dependent in ((torch.cartesian_prod(ticks, ticks), False), (ticks[:, None].expand(3, 2), True)):
        constant = BetaTC(0.0, alpha=0.0, gamma=0.0, size=len(x))
        correlation = BetaTC(1.0, alpha=0.0, gamma=0.0, size=len(x))
        got = evaluate(correlation, program, x)[0] - evaluate(constant, program, x)[0]
        assert got > 1 if dependent else got == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("num_particles", [1, 3])
def test_a_latent_that_depends_on_another_is_scored_in_pairs(num_particles):
    program, x = TwoLatents().double(), torch.rand(4, 64, dtype=torch.float64).round()
    torch.manual_seed(1)
    plate = pyro.plate("particles", num_particles, dim=-2)
    nodes = poutine.trace(plate(program.guide)).get_trace(x).nodes
    z1, z2 = nodes["z1"]["value"], nodes["z2"]["value"]
    wanted = 0
    for k, i in itertools.product(range(num_particles), range(4)):
        log_each = []
        for j in range(4):
            given = poutine.condition(program.guide, {"z1": z1[k, i, None], "z2": z2[k, i, None]})
            trace = poutine.trace(given).get_trace(x[j, None])
            log_each.append(trace.log_prob_sum())
        weights = torch.full((4,), 9 / 10 / 3, dtype=torch.float64)
        weights[i] = 1 / 10
        log_each = torch.stack(log_each)
        wanted = wanted + log_each[i] - (weights.log() + log_each).logsumexp(0)
    options = {"size": 10, "num_particles": num_particles}
    constant = evaluate(BetaTC(0.0, alpha=0.0, gamma=0.0, **options), program, x)[0]
    got = evaluate(BetaTC(0.0, alpha=1.0, gamma=0.0, **options), program, x)[0] - constant
    assert got == pytest.approx((wanted / num_particles).item(), rel=1e-10)


def test_what_total_correlation_needs(problem):
    program, x = problem
    with pytest.raises(
        ValueError, match=r"drawn from, got a plate of the batch alone; give BetaTC\(size=len\(train\)\)"
    ):
        BetaTC(6.0).loss(program.model, program.guide, x)
    with pytest.raises(ValueError, match="at least the batch's 6, got 5"):
        BetaTC(6.0, size=5).loss(program.model, program.guide, x)
    with pytest.raises(ValueError, match="at least 2 data, got 1"):
        BetaTC(6.0, size=5).loss(program.model, program.guide, x[:1])
    program.size = 1000
    assert BetaTC(6.0).loss(program.model, program.guide, x)
    vae = pyro_vae.build((8, 8), latent=4, posterior="FullNormal()", network="MLP(hidden=[8])")
    with pytest.raises(ValueError, match="MultivariateNormal at site 'z'; BetaTC needs the marginals"):
        BetaTC(6.0, size=5).loss(vae.model, vae.guide, torch.ones(3, 8, 8))
    program = TwoLatents()
    with weigh({"z1": 0.5}), pytest.raises(ValueError, match="one weight for all latents"):
        BetaTC(6.0, size=5).loss(program.model, program.guide, torch.ones(3, 64))


# Kernel distance


def mmd_of_normals(variance, bandwidth):
    """Of N(0, diag(variance)) and N(0, I) under the normal density's kernel."""
    square = bandwidth**2

    def similarity(spread):  # of points whose difference has these variances
        return (square / (square + spread)).sqrt().prod()

    return (similarity(2 * variance) + similarity(torch.tensor([2.0, 2.0])) - 2 * similarity(1 + variance)).item()


def test_the_distance_of_normals():
    """400 batches of 40 data of N(0, I), seed 0, against the closed form: 4 standard errors (6e-5)."""
    program = Independent([0.2, 2.0], [0.2, 1.0])
    variance = program.slope.detach() ** 2 + (2 * program.log_scale.detach()).exp()
    estimator = MMD(alpha=1.0, scaling=1.0, kernel=RBF(bandwidth=0.7), num_particles=2)
    found = []
    for _ in range(400):
        x = torch.randn(40, 2, dtype=torch.float64)
        loss = estimator.loss(program.model, program.guide, x)
        found.append((loss + dist.Normal(0.0, 1.0).log_prob(x).sum().item()) / 40)
    found, wanted = torch.tensor(found), mmd_of_normals(variance, 0.7)
    error = found.std().item() / 20
    assert abs(found.mean().item() - wanted) < 4 * error
    assert error < 0.02 * wanted  # or the check could not fail


def test_a_sample_is_at_distance_zero_from_its_own_distribution():
    """2,000 pairs of samples of 10, seed 0: unbiased, so 0 within 4 standard errors (6e-5)."""
    for kernel in (RBF(), InverseMultiquadric()):
        found = squared_mmd(*torch.randn(2, 2000, 10, 3, dtype=torch.float64), kernel)
        assert abs(found.mean()) < 4 * found.std() / 2000**0.5
        assert 4 * found.std() / 2000**0.5 < 0.01


def test_weights_of_rate_and_distance(problem):
    program, x = problem
    program.size = 1000
    rate = 1000 * rates_of(program, x).sum().item()
    value = functools.cache(lambda alpha, scaling: evaluate(MMD(alpha, scaling), program, x)[0])
    distance = value(1.0, 1.0) - value(1.0, 0.0)
    assert value(1.0, 0.0) == pytest.approx(distortion(program, x), rel=1e-10)
    assert value(0.4, 3.0) == pytest.approx(value(1.0, 0.0) + 0.6 * rate + 2.4 * distance, rel=1e-10)
    with beta(0.5):
        torch.manual_seed(1)
        halved = MMD(0.4, 3.0).loss(program.model, program.guide, x)
    assert halved == pytest.approx(value(1.0, 0.0) + 0.3 * rate + 2.4 * distance, rel=1e-10)


@pytest.mark.parametrize("prior", ["StandardNormal()", "VampPrior(components=5)", "GaussianMixture()", "ARD()"])
def test_the_prior_is_drawn_from_without_the_decoder(prior):
    vae = pyro_vae.build((8, 8), latent=2, prior=prior, network="MLP(hidden=[4])", size=100)
    runs = []
    vae.likelihood.net.register_forward_hook(lambda *_: runs.append(1))
    MMD()(vae.model, vae.guide)(torch.rand(5, 8, 8).round()).backward()
    assert len(runs) == 1
    assert all(parameter.grad.isfinite().all() for parameter in vae.posterior.parameters())


def test_a_learned_prior_learns_from_the_distance():
    vae = pyro_vae.build((8, 8), latent=2, prior="DiagonalNormal()", network="MLP(hidden=[4])")
    MMD(alpha=1.0)(vae.model, vae.guide)(torch.rand(5, 8, 8).round()).backward()
    assert all((parameter.grad != 0).all() for parameter in vae.prior.parameters())


def test_latents_of_the_prior_are_drawn_together_and_laid_as_in_the_guide():
    """A chain of normals and its exact inverse: distance 0 within 4 standard errors (6e-5) of 100 batches, seed 0."""

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z2 = pyro.sample("z2", dist.Normal(torch.zeros_like(x), 1.0))
            pyro.sample("z1", dist.Normal(z2, 3.0))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            z1 = pyro.sample("z1", dist.Normal(torch.zeros_like(x), 10**0.5))
            pyro.sample("z2", dist.Normal(z1 / 10, 0.9**0.5))

    x = torch.zeros(40, dtype=torch.float64)
    estimator = MMD(alpha=1.0, scaling=1.0, kernel=RBF(bandwidth=1.0))
    found = torch.tensor([estimator.loss(model, guide, x) / 40 - 0.5 * math.log(2 * math.pi) for _ in range(100)])
    error = found.std().item() / 10
    assert abs(found.mean().item()) < 4 * error
    assert error < 0.003  # where z1 and z2 in the other order would be at a distance of 0.1


def test_prior_and_guide_share_their_global_latents():
    """Given one shift, 200 draws of either are about 0 apart (standard deviation 0.003, seed 0), else 1."""

    def model(x):
        shift = pyro.sample("shift", dist.Normal(torch.zeros_like(x[0]), 0.1))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(shift, 1.0))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def guide(x):
        shift = pyro.sample("shift", dist.Normal(torch.full_like(x[0], 10.0), 0.1))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(shift, 1.0))

    x, losses = torch.zeros(200, dtype=torch.float64), []
    for scaling in (0.0, 1.0):
        torch.manual_seed(0)
        losses.append(MMD(scaling=scaling).loss(model, guide, x))
    assert abs(losses[1] - losses[0]) / 200 < 0.02


def test_there_is_no_distance_of_one_datum(problem):
    program, x = problem
    with pytest.raises(ValueError, match="MMD: expected a batch of at least 2 data, got 1"):
        MMD().loss(program.model, program.guide, x[:1])


def test_kernels():
    a, b = torch.tensor([[0.0, 0.0], [1.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 0.0], [3.0, 4.0]])
    square = torch.tensor([[1.0, 0.0, 25.0], [4.0, 5.0, 8.0]])
    torch.testing.assert_close(RBF(bandwidth=3.0)(a, b), (-square / 18).exp())
    torch.testing.assert_close(RBF()(a, b), (-square / 4).exp())
    torch.testing.assert_close(InverseMultiquadric(length=3.0)(a, b), 9 / (9 + square))
    torch.testing.assert_close(InverseMultiquadric()(a, b), 4 / (4 + square))


def test_what_does_not_count_is_in_no_pair():
    a, b = torch.randn(2, 6, 3, dtype=torch.float64)
    counted = torch.tensor([1.0, 0.0] * 3, dtype=torch.float64)
    assert squared_mmd(a, b, RBF(), counted) == pytest.approx(squared_mmd(a[::2], b, RBF()).item(), rel=1e-12)


# All of them


@pytest.mark.parametrize(("make", "message"), [
    (lambda: FreeBits(-0.1), "expected nats >= 0"),
    (lambda: FreeBits(0.1, num_groups=0), "num_groups >= 1"),
    (lambda: Capacity(-1.0), "at least 0 nats, got -1.0"),
    (lambda: Capacity(1.0, gamma=-1.0), "expected gamma >= 0"),
    (lambda: BetaTC(-1.0), "weights of at least 0"),
    (lambda: MMD(alpha=1.5), "expected alpha <= 1"),
    (lambda: MMD(alpha=0.0, scaling=0.5), r"alpha \+ scaling >= 1"),
    (lambda: RBF(0.0), "expected bandwidth > 0"),
    (lambda: InverseMultiquadric(-1.0), "expected length > 0"),
    (lambda: FreeBits(0.1, num_particles=0), "integer num_particles >= 1"),
])  # fmt: skip
def test_arguments_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("text", [
    "FreeBits(nats=0.1, num_groups=2)",
    "Capacity(capacity=25.0, gamma=10.0)",
    "Capacity(capacity=Linear(fraction=0.4, end=25.0))",
    "BetaTC(beta=6.0, size=100)",
    "MMD(scaling=500.0, kernel=InverseMultiquadric(length=2.0))",
    "MMD(alpha=0.5, kernel=RBF())",
])  # fmt: skip
def test_expressions(text):
    assert write(parse(text, "estimator"), "estimator") == text


@each
def test_masked_data_count_for_nothing(estimator, problem):
    program, x = problem
    mask = torch.tensor([True] * 4 + [False] * 2)
    masked = nn.Module()
    masked.model, masked.guide = (poutine.mask(p, mask=mask) for p in (program.model, program.guide))
    other = torch.cat([x[:4], x[4:] + 3])
    with torch.no_grad():
        losses = []
        for batch, programs in ((x, masked), (other, masked), (x[:4], program)):
            torch.manual_seed(1)
            losses.append(estimator.loss(programs.model, programs.guide, batch))
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    if not isinstance(estimator, MMD):  # which draws as many from the prior as there are data
        assert losses[0] == pytest.approx(losses[2], rel=1e-12)
    nothing = torch.zeros(6, dtype=torch.bool)
    masked.model, masked.guide = (poutine.mask(p, mask=nothing) for p in (program.model, program.guide))
    program.zero_grad()
    loss = estimator.differentiable_loss(masked.model, masked.guide, x)
    loss.backward()
    assert loss == 0
    assert all((parameter.grad == 0).all() for parameter in program.parameters() if parameter.grad is not None)


@each
def test_the_loss_stands_for_all_data(estimator):
    vae = pyro_vae.build((8, 8), latent=2, network="MLP(hidden=[4])").double()
    x, losses = torch.rand(6, 8, 8, dtype=torch.float64).round(), []
    for vae.size in (None, 600):
        losses.append(evaluate(estimator, vae, x)[0])
    assert losses[1] == pytest.approx(100 * losses[0], rel=1e-10)


@pytest.mark.parametrize(
    "estimator", [FreeBits(0.3), FreeBits(0.3, num_groups=1), Capacity(2.0, gamma=10.0), BetaTC(1.0, size=9)]
)
def test_a_datum_may_weigh_more_than_another(estimator, problem):
    program, x = problem
    weights = torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0, 1.0], dtype=torch.float64)
    scaled = nn.Module()
    scaled.model, scaled.guide = (poutine.scale(p, scale=weights) for p in (program.model, program.guide))
    elbo = evaluate(Trace_ELBO(), scaled, x)[0] if isinstance(estimator, BetaTC) else None
    mean, std = program.posterior(x)
    std = program.scale * std
    rates = weights @ (0.5 * (mean**2 + std**2 - 1) - std.log())
    if isinstance(estimator, Capacity):
        penalty = 10 * (rates.sum() - 2 * weights.sum()).abs()
    else:
        groups = rates.sum() if getattr(estimator, "num_groups", None) else rates
        penalty = groups.clamp(min=0.3 * weights.sum().item()).sum()
    wanted = elbo or distortion(scaled, x) + penalty.item()
    assert evaluate(estimator, scaled, x)[0] == pytest.approx(wanted, rel=1e-10)


@pytest.mark.parametrize(("estimator", "posterior"), [
    (MMD(alpha=0.0, scaling=1.0), "Mixture()"),  # which has no closed form, as Trace_ELBO uses none
    (BetaTC(1.0), "DiagonalNormal()"),
])  # fmt: skip
def test_global_latents_count_once(estimator, posterior):
    vae = pyro_vae.build((8, 8), latent=2, prior="ARD()", posterior=posterior, network="MLP(hidden=[4])", size=100)
    x = torch.rand(5, 8, 8, dtype=torch.float64).round()
    agree(evaluate(estimator, vae.double(), x), evaluate(Trace_ELBO(), vae, x))


@each
def test_what_is_run_again_is_not_recorded(estimator):
    program, x = TwoLatents(), torch.rand(5, 64).round()
    recorded = record()
    found = []
    for chosen in (estimator, Trace_ELBO()):
        torch.manual_seed(1)
        with recorded:
            chosen.loss(recorded.model(program.model), recorded.guide(program.guide), x)
        found.append((recorded.rate, recorded.distortion))
    torch.testing.assert_close(*found)


@each
def test_trains_a_conv_net(estimator):
    vae = pyro_vae.build((1, 8, 8), latent=3, network="ConvEncoder(channels=[4]), ConvDecoder(channels=[4])")
    x = torch.rand(12, 1, 8, 8).round()
    history = pyro_vae.fit(vae, x, estimator=estimator, epochs=2, batch_size=6, progress=False)
    assert history is not None
    loss = estimator(vae.model, vae.guide)(x)
    vae.zero_grad()
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in vae.parameters())
    assert any((parameter.grad != 0).any() for parameter in vae.likelihood.parameters())
    assert any((parameter.grad != 0).any() for parameter in vae.posterior.parameters())


@each
def test_trains_under_svi(estimator, cleared_store):
    program, x = TwoLatents(), torch.rand(6, 64).round()
    before = [parameter.detach().clone() for parameter in program.parameters()]
    svi = SVI(program.model, program.guide, pyro.optim.Adam({"lr": 0.01}), loss=estimator)
    assert torch.isfinite(torch.tensor([svi.step(x), svi.step(x)])).all()
    assert svi.evaluate_loss(x)
    changed = [not torch.equal(old, new) for old, new in zip(before, program.parameters(), strict=True)]
    assert any(changed)
