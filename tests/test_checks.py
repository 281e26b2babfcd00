"""Where Pyro's estimators are silently wrong: each error shown against an exact value, and warned of there alone."""

import itertools
import math
import re
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import LinearGaussian, Mixture, TwoLatents
from pyro import infer, poutine
from pyro.contrib.gp.kernels import RBF
from pyro.poutine.messenger import Messenger
from torch import nn

import pyro_vae
from pyro_vae.estimators.checks import check
from pyro_vae.handlers import beta
from pyro_vae.programs import data_plate, declare_parameters

X = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)  # for Mixture
REALS = torch.tensor([1.5, -0.5, 1.0], dtype=torch.float64)


class Classes(Mixture):
    """`Mixture` with a skewed guide, a subsampled plate, and several ways to look up a class."""

    def __init__(self, size=None, lookup=lambda table, z: table[z]):
        super().__init__()
        self.size, self.lookup = size, lookup
        with torch.no_grad():
            self.posterior.copy_(torch.tensor([0.5, -0.3, 0.2]))

    def model(self, x):
        declare_parameters(self)
        with data_plate(x, self.size):
            z = pyro.sample("z", dist.Categorical(logits=self.prior))
            pyro.sample("x", dist.Bernoulli(logits=self.lookup(self.logits, z)).to_event(1), obs=x)

    def guide(self, x):
        declare_parameters(self)
        with data_plate(x, self.size):
            pyro.sample("z", dist.Categorical(logits=self.posterior))


class Coupled(Classes):
    """A sum of local classes is observed outside the plate."""

    def model(self, x):
        super().model(x)
        pyro.sample("x.sum", dist.Normal(self.total.to(x), 0.5), obs=x.new_tensor(3.0))

    def lookup_and_add(self, table, z):
        self.total = z.sum(-1)
        return table[z]

    def __init__(self):
        super().__init__(lookup=self.lookup_and_add)


class Shifted(nn.Module):
    """z ~ N(0, 1), x ~ N(z, 1), and a guide N(m x, 0.8); the site "y" adds a class to model and guide."""

    def __init__(self, size=None, likelihood=lambda z: dist.Normal(z, 1.0), prior=None, classes=False):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.2, dtype=torch.float64))
        self.logits = nn.Parameter(torch.tensor([0.5, -0.5], dtype=torch.float64))
        self.size, self.likelihood, self.classes = size, likelihood, classes
        self.prior = prior or (lambda x: dist.Normal(x.new_zeros(()), 1.0))

    def model(self, x):
        declare_parameters(self)
        with data_plate(x, self.size):
            if self.classes:
                pyro.sample("y", dist.Bernoulli(x.new_tensor(0.5)))
            z = pyro.sample("z", self.prior(x))
            pyro.sample("x", self.likelihood(z), obs=x)

    def guide(self, x):
        declare_parameters(self)
        with data_plate(x, self.size):
            if self.classes:
                pyro.sample("y", dist.Bernoulli(logits=self.logits[0]))
            pyro.sample("z", dist.Normal(self.slope * x, 0.8))


class Chain(nn.Module):
    """z1 ~ N(0, 1), z2 ~ N(z1, 1), x ~ N(z2, 1), and a guide from the top down, or up, or one that factorizes.

    With `independent`, z2 ~ N(0, 1).
    """

    def __init__(self, order=("z1", "z2"), coupling=0.7, independent=False):
        super().__init__()
        self.first = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
        self.coupling = nn.Parameter(torch.tensor(coupling, dtype=torch.float64)) if coupling else 0.0
        self.order, self.independent = order, independent

    def model(self, x):
        declare_parameters(self)
        with data_plate(x):
            z1 = pyro.sample("z1", dist.Normal(x.new_zeros(()), 1.0))
            z2 = pyro.sample("z2", dist.Normal(0.0 if self.independent else z1, 1.0).expand(z1.shape))
            pyro.sample("x", dist.Normal(z2, 1.0), obs=x)

    def guide(self, x):
        declare_parameters(self)
        with data_plate(x):
            first = pyro.sample(self.order[0], dist.Normal(self.first, 0.8))
            pyro.sample(self.order[1], dist.Normal(self.coupling * first + 0.2, 0.6))


class Auxiliary(nn.Module):
    """The guide of `Shifted` with a site "a" of its own: a class of each datum, or a number common to all."""

    def __init__(self, common=False):
        super().__init__()
        self.common = common
        self.logits = nn.Parameter(torch.tensor([0.5, -0.5], dtype=torch.float64))
        self.means = nn.Parameter(torch.tensor([0.0, 1.0], dtype=torch.float64))

    def model(self, x):
        declare_parameters(self)
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(self, x):
        declare_parameters(self)
        if self.common:
            mean = pyro.sample("a", dist.Normal(self.means[0], 0.5), infer={"is_auxiliary": True})
        with data_plate(x):
            if not self.common:
                a = pyro.sample("a", dist.Categorical(logits=self.logits), infer={"is_auxiliary": True})
                mean = self.means[a]
            pyro.sample("z", dist.Normal(mean, 1.0))


class Global(nn.Module):
    """A latent g outside the plate, which carries the size of the data set, and a local one inside."""

    def __init__(self, size=None, discrete=False):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([0.5, -0.5], dtype=torch.float64))
        self.mean = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
        self.size, self.discrete = size, discrete

    def model(self, x):
        declare_parameters(self)
        plain = dist.Bernoulli(x.new_tensor(0.5)) if self.discrete else dist.Normal(x.new_zeros(()), 1.0)
        g = pyro.sample("g", plain)
        with data_plate(x, self.size):
            z = pyro.sample("z", dist.Bernoulli(logits=g - 0.5) if self.discrete else dist.Normal(g, 1.0))
            pyro.sample("x", dist.Normal(z + g, 1.0), obs=x)

    def guide(self, x):
        declare_parameters(self)
        pyro.sample("g", dist.Bernoulli(logits=self.logits[0]) if self.discrete else dist.Normal(self.mean, 0.5))
        with data_plate(x, self.size):
            local = dist.Bernoulli(logits=self.logits[1]) if self.discrete else dist.Normal(0.4 * x, 0.8)
            pyro.sample("z", local)


# Exact expectations.


class given(Messenger):
    """Give latents their values in turn, pass by pass: an enumeration from outside."""

    def __init__(self, values):
        super().__init__()
        self.values = {name: iter(passes) for name, passes in values.items()}

    def _pyro_sample(self, msg):
        if msg["name"] in self.values:
            msg["value"] = next(self.values[msg["name"]])


def step(estimator, program, x, guide=None):
    """Loss and gradients, as one vector, of a training step."""
    program.zero_grad()
    with pyro.get_param_store().scope(), poutine.trace(param_only=True):
        loss = estimator.loss_and_grads(program.model, guide or program.guide, x)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in program.parameters()]
    return torch.tensor(loss, dtype=torch.float64).sum(), torch.cat([g.flatten() for g in gradients])


def expected_step(make, program, x, num_particles=1):
    """Expected loss and gradients of an estimator: the sum over all classes of all particles of all data."""
    loss, gradient = 0.0, 0.0
    q = program.posterior.detach().softmax(0)
    for classes in itertools.product(range(3), repeat=num_particles * len(x)):
        z = torch.tensor(classes).reshape(num_particles, len(x))
        one_loss, one_gradient = step(make(), program, x, given({"z": list(z)})(program.guide))
        loss, gradient = loss + q[z].prod() * one_loss, gradient + q[z].prod() * one_gradient
    return loss, gradient


def exact_step(program, x, num_particles=1, alpha=0.0, joint=False, rate=1.0):
    """What it should be: the expected bound of order alpha, and the gradients of this expectation."""
    log_p = program.prior.log_softmax(0)
    log_likelihood = dist.Bernoulli(logits=program.logits).to_event(1).log_prob(x[:, None])
    log_q = program.posterior.log_softmax(0)
    log_weights = log_likelihood + rate * (log_p - log_q)
    loss = 0.0
    for classes in itertools.product(range(3), repeat=num_particles * len(x)):
        z = torch.tensor(classes).reshape(num_particles, len(x))
        weights = log_weights[torch.arange(len(x)), z]
        weights = weights.sum(1, keepdim=True) if joint else weights
        bounds = ((1 - alpha) * weights).logsumexp(0) - math.log(num_particles)
        loss = loss - log_q[z].sum().exp() * bounds.sum() / (1 - alpha)
    return loss.detach(), torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(program.parameters()))])


def assert_steps(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


def off(got, wanted):
    return (got - wanted).abs().max().item()


GUIDE = slice(-3, None)  # the parameters of Mixture's guide come last


# Where they are right.


EXPECTATIONS = {
    "Trace_ELBO": infer.Trace_ELBO,
    "TraceGraph_ELBO": infer.TraceGraph_ELBO,
    "TraceEnum_ELBO, sampled": lambda: infer.TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False),
}


@pytest.mark.parametrize("rate", [1.0, 0.5])
@pytest.mark.parametrize("name", EXPECTATIONS)
def test_elbos_are_right_for_sampled_classes(name, rate):
    program = Classes()
    with beta(rate):
        assert_steps(expected_step(EXPECTATIONS[name], program, X), exact_step(program, X, rate=rate))


@pytest.mark.parametrize("name", EXPECTATIONS)
def test_elbos_scale_a_subsample(name):
    program = Classes(size=20)
    loss, gradient = exact_step(program, X)
    assert_steps(expected_step(EXPECTATIONS[name], program, X), (10 * loss, 10 * gradient))


@pytest.mark.parametrize("rate", [1.0, 0.5])
@pytest.mark.parametrize("how", ["parallel", "sequential"])
def test_trace_enum_is_right_for_enumerated_classes(how, rate):
    program = Classes()
    with beta(rate):
        got = step(infer.TraceEnum_ELBO(max_plate_nesting=1), program, X, infer.config_enumerate(program.guide, how))
    assert_steps(got, exact_step(program, X, rate=rate))


@pytest.mark.parametrize("name", ["Trace_ELBO", "TraceGraph_ELBO"])
def test_elbos_are_right_for_a_class_outside_a_subsampled_plate(name):
    program, x = Global(size=8, discrete=True), REALS[:2]
    values = torch.tensor([0.0, 1.0], dtype=torch.float64)
    probability = dist.Bernoulli(logits=program.logits)
    loss, got_loss, got = 0.0, 0.0, 0.0
    for g, *z in itertools.product(values, repeat=3):
        z = torch.stack(z)
        log_q = (
            probability.log_prob(torch.stack([g, z[0]]))[0] + dist.Bernoulli(logits=program.logits[1]).log_prob(z).sum()
        )
        scaled = dist.Bernoulli(logits=g - 0.5).log_prob(z) + dist.Normal(z + g, 1.0).log_prob(x)
        scaled = scaled - dist.Bernoulli(logits=program.logits[1]).log_prob(z)
        elbo = math.log(0.5) - dist.Bernoulli(logits=program.logits[0]).log_prob(g) + 4 * scaled.sum()
        loss = loss - log_q.exp() * elbo
        guide = given({"g": [g], "z": [z]})(program.guide)
        one = step(getattr(infer, name)(), program, x, guide)
        got_loss, got = got_loss + log_q.exp().detach() * one[0], got + log_q.exp().detach() * one[1]
    assert_steps(got_loss, loss.detach())
    assert_steps(got[:2], torch.autograd.grad(loss, program.logits)[0])


def test_tmc_and_trace_enum_find_the_evidence_by_enumeration():
    program = Classes()
    evidence = program.evidence(X).sum()
    wanted = (
        -evidence.detach(),
        -torch.cat([g.flatten() for g in torch.autograd.grad(evidence, [program.prior, program.logits])]),
    )
    guide = infer.config_enumerate(program.guide, "parallel")
    loss, gradient = step(infer.TraceTMC_ELBO(max_plate_nesting=1), program, X, guide)
    assert_steps((loss, gradient[:-3]), wanted)
    program.model = infer.config_enumerate(program.model)
    loss, gradient = step(infer.TraceEnum_ELBO(max_plate_nesting=1), program, X, lambda x: None)
    assert_steps((loss, gradient[:-3]), wanted)
    with beta(0.5), pytest.raises(ValueError, match="common poutine.scale"):  # not silent
        step(infer.TraceEnum_ELBO(max_plate_nesting=1), program, X, lambda x: None)


# Where they are silently wrong. Each test shows the error, and that the named estimator has none.


def test_renyi_puts_the_scale_inside():
    make = lambda: infer.RenyiELBO(num_particles=3)  # noqa: E731
    program, x = Classes(size=20), X[:1]
    got, _ = expected_step(make, program, x, 3)
    loss, _ = exact_step(program, x, 3)
    evidence = 20 * program.evidence(x).sum().item()
    assert -20 * loss.item() < evidence < -got.item() - 1  # more than the evidence, by more than a nat
    assert_steps(expected_step(make, Classes(), x, 3)[0], loss)


@pytest.mark.parametrize("alpha", [0.0, 0.5, -1.0])
def test_renyi_has_no_right_gradient_for_classes(alpha):
    program = Classes()
    loss, gradient = expected_step(lambda: infer.RenyiELBO(alpha=alpha, num_particles=2), program, X, 2)
    exact_loss, exact = exact_step(program, X, 2, alpha=alpha)
    assert_steps((loss, gradient[:-3]), (exact_loss, exact[:-3]))
    assert off(gradient[GUIDE], exact[GUIDE]) > 0.2
    assert (gradient[GUIDE] == 0).all() == (alpha == 0)


def test_renyi_under_beta_is_no_bound():
    """At beta = 0 the log-sum-exp is of likelihoods, whose mean is not the evidence unless the guide is the prior."""
    program = Classes()
    with beta(0):
        got, _ = expected_step(lambda: infer.RenyiELBO(num_particles=2), program, X, 2)
    assert_steps(got, exact_step(program, X, 2, rate=0.0)[0])
    with torch.no_grad():
        program.posterior.copy_(torch.tensor([-9.0, 0.0, -9.0]))
        program.prior.copy_(torch.tensor([9.0, 0.0, 0.0]))
    with beta(0):
        got, _ = expected_step(lambda: infer.RenyiELBO(num_particles=2), program, X[:1], 2)
    assert -got > program.evidence(X[:1]).sum() + 0.3


def test_renyi_counts_a_common_auxiliary_site_for_every_datum():
    program = Auxiliary(common=True)
    a, z = torch.tensor(0.4, dtype=torch.float64), torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    losses = [
        step(e, program, REALS, given({"a": [a], "z": [z]})(program.guide))[0]
        for e in (infer.Trace_ELBO(), infer.RenyiELBO(num_particles=1))
    ]
    log_q = dist.Normal(program.means[0].detach(), 0.5).log_prob(a)
    assert_steps(losses[1] - losses[0], 2 * log_q)  # three times in place of once


def test_renyi_is_right_with_a_global_latent():
    """10,000 particles against the evidence of a normal; within 4 standard errors of its logarithm, seed 0."""
    program = Global()
    estimator = infer.RenyiELBO(num_particles=10_000, vectorize_particles=True, max_plate_nesting=1)
    loss = estimator.loss(program.model, program.guide, REALS)
    covariance = 2 * torch.eye(3, dtype=torch.float64) + 4  # x = 2 g + two standard normals
    evidence = dist.MultivariateNormal(torch.zeros(3, dtype=torch.float64), covariance).log_prob(REALS).item()
    particles = infer.RenyiELBO(num_particles=1)
    weights = torch.tensor([-particles.loss(program.model, program.guide, REALS) for _ in range(400)])
    error = (weights - evidence).exp().std().item() / 100
    assert error < 0.05
    assert -loss == pytest.approx(evidence, abs=4 * error)


def test_wake_sleep_has_one_weight_a_batch():
    program = Classes()
    make = lambda: infer.ReweightedWakeSleep(num_particles=2, vectorize_particles=False)  # noqa: E731
    _, got = expected_step(make, program, X, 2)
    _, exact = exact_step(program, X, 2)
    _, joint = exact_step(program, X, 2, joint=True)
    assert_steps(got[:-3], joint[:-3])
    assert off(got[:-3], exact[:-3]) > 0.04
    assert_steps(expected_step(make, program, X[:1], 2)[1][:-3], exact_step(program, X[:1], 2)[1][:-3])


def test_wake_sleep_lets_gradients_through_earlier_sites():
    program, x = Chain(), REALS[:1]
    torch.manual_seed(0)
    noise = torch.randn(2, 2, 1, dtype=torch.float64)
    torch.manual_seed(0)
    _, got = step(infer.ReweightedWakeSleep(max_plate_nesting=1), program, x)
    z1 = (program.first + 0.8 * noise[0]).detach()
    z2 = (program.coupling * z1 + 0.2 + 0.6 * noise[1]).detach()
    log_q = dist.Normal(program.first, 0.8).log_prob(z1)
    log_q = log_q + dist.Normal(program.coupling * z1 + 0.2, 0.6).log_prob(z2)
    log_p = dist.Normal(0.0, 1.0).log_prob(z1) + dist.Normal(z1, 1.0).log_prob(z2) + dist.Normal(z2, 1.0).log_prob(x)
    weights = (log_p - log_q).detach().softmax(0)
    wanted = torch.stack(torch.autograd.grad(-(weights * log_q).sum(), list(program.parameters())))
    assert_steps(got[1], wanted[1])  # of the later site, as it should be
    assert off(got[0], wanted[0]) > 0.1  # of the earlier one, not


@pytest.mark.parametrize(("size", "rate"), [(20, 1.0), (None, 0.2)])
def test_wake_sleep_puts_scales_where_renyi_does(size, rate):
    program, z = Classes(size=size), [torch.tensor([0]), torch.tensor([2])]
    renyi, wake = infer.RenyiELBO(), infer.ReweightedWakeSleep(vectorize_particles=False)
    with beta(rate):
        wanted = renyi.loss(program.model, given({"z": z})(program.guide), X[:1])
        got, _ = wake.loss(program.model, given({"z": z})(program.guide), X[:1])
    assert got.item() == pytest.approx(wanted)


def test_tmc_gives_classes_no_gradient():
    program = Classes()
    loss, got = expected_step(
        lambda: infer.TraceTMC_ELBO(max_plate_nesting=1, strict_enumeration_warning=False), program, X
    )
    exact_loss, exact = exact_step(program, X)
    assert_steps((loss, got[:-3]), (exact_loss, exact[:-3]))
    assert (got[GUIDE].abs() < 1e-12).all()
    assert (exact[GUIDE].abs() > 0.1).any()
    several = infer.config_enumerate(program.guide, "parallel", num_samples=4)
    assert (step(infer.TraceTMC_ELBO(max_plate_nesting=1), program, X, several)[1][GUIDE].abs() < 1e-12).all()


def test_tmc_adds_up_logarithms_in_turn():
    program = Classes()
    guide = infer.config_enumerate(program.guide, "sequential")
    loss, _ = step(infer.TraceTMC_ELBO(max_plate_nesting=1), program, X, guide)
    terms = program.prior.log_softmax(0) + dist.Bernoulli(logits=program.logits).to_event(1).log_prob(X[:, None])
    assert loss > -program.evidence(X).sum() + 10
    assert_steps(loss, -(terms - math.log(3)).sum().detach())


def test_tmc_puts_the_scale_inside():
    program, estimator = Classes(size=20), infer.TraceTMC_ELBO(max_plate_nesting=1)
    loss, _ = step(estimator, program, X, infer.config_enumerate(program.guide, "parallel"))
    assert -loss > 10 * program.evidence(X).sum() + 5
    program.size = None
    with beta(0.2):
        loss, _ = step(estimator, program, X, infer.config_enumerate(program.guide, "parallel"))
    assert -loss > program.evidence(X).sum() + 0.1  # no bound


@pytest.mark.parametrize(
    ("offsets", "fractions", "right"),
    [([0.0, 1.0, 2.0], [1 / 3, 1 / 2, 1], [1, 1 / 2, 1 / 3]), ([0.0, 2.0, 1.0], [1 / 2, 1 / 3, 1], [1, 1 / 3, 1 / 2])],
)
def test_tail_adaptive_weights_are_in_the_wrong_order(offsets, fractions, right):
    """Particle k has an offset b_k, and log p = -b_k^2 / 2 + const, whose gradient is gamma_k b_k.

    Of Wang, Liu and Liu (2018), gamma is proportional to 1 over the rank, and the greatest weight has rank 1. Pyro
    divides by the number of particles once more.
    """
    program, x = Shifted(), torch.zeros(1, dtype=torch.float64)
    program.offsets = nn.Parameter(torch.tensor(offsets, dtype=torch.float64)[:, None])
    program.likelihood = lambda z: dist.Normal(program.offsets, 1.0)
    estimator = infer.TraceTailAdaptive_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    z = torch.zeros(3, 1, dtype=torch.float64)
    step(estimator, program, x, given({"z": [z]})(program.guide))
    gamma = 3 * program.offsets.grad[1:, 0] / program.offsets[1:, 0].detach()
    assert_steps(gamma, torch.tensor(fractions[1:], dtype=torch.float64) / sum(fractions))
    assert off(gamma, torch.tensor(right[1:], dtype=torch.float64) / sum(right)) > 0.2


def test_mean_field_ignores_a_scale_of_the_model():
    program, x = LinearGaussian(scale=1.3), torch.randn(4, 3, dtype=torch.float64)
    estimator = infer.TraceMeanField_ELBO()
    losses = []
    for scale in (1.0, 0.5):
        torch.manual_seed(0)
        losses.append(estimator.loss(poutine.scale(program.model, scale=scale), program.guide, x))
    torch.manual_seed(0)
    with pyro_vae.handlers.record() as recorded:
        estimator.loss(recorded.model(program.model), recorded.guide(program.guide), x)
    rate, distortion = program.rate(x).sum().item(), recorded.distortion.sum().item()
    assert losses[1] == pytest.approx(0.5 * distortion + rate)
    assert losses[0] == pytest.approx(distortion + rate)
    mean, std = program.posterior(x)
    prior = -(0.5 * (mean**2 + (1.3 * std) ** 2) + 0.5 * math.log(2 * math.pi)).sum().item()
    assert abs(0.5 * prior) > 1  # what the scale should have taken off the rate, and did not


def test_mean_field_needs_a_guide_in_the_order_of_the_model():
    """20,000 particles against a closed form; 4 standard errors, seed 0: a false alarm in 16,000 runs."""
    program, x = Chain(order=("z2", "z1")), REALS[:1]
    options = {"num_particles": 20_000, "vectorize_particles": True, "max_plate_nesting": 1}
    m2, s2, c, s1 = 0.3, 0.8, 0.7, 0.6
    m1, v1 = c * m2 + 0.2, (c * s2) ** 2 + s1**2
    half_log = 0.5 * math.log(2 * math.pi)
    log_p = -0.5 * (m1**2 + v1) - half_log  # of z1
    log_p += -0.5 * ((m2 - m1) ** 2 + s2**2 + v1 - 2 * c * s2**2) - half_log  # of z2 given z1
    log_p += -0.5 * ((x.item() - m2) ** 2 + s2**2) - half_log
    exact = -log_p - (math.log(s1 * s2) + 2 * half_log + 1)
    assert infer.Trace_ELBO(**options).loss(program.model, program.guide, x) == pytest.approx(exact, abs=0.05)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Failed to verify mean field")  # Pyro's, which names no other estimator
        loss = infer.TraceMeanField_ELBO(**options).loss(program.model, program.guide, x)
    assert abs(loss - exact) > 0.3


def in_place(table, z):
    hot = torch.zeros(*z.shape, 3, dtype=table.dtype)
    hot.scatter_(-1, z[..., None], 1.0)
    return hot @ table


def by_number(table, z):
    return torch.stack([table[int(i)] for i in z])


@pytest.mark.parametrize("lookup", [in_place, by_number])
def test_trace_graph_loses_track(lookup):
    program = Classes(lookup=lookup)
    loss, exact = exact_step(program, X)
    assert_steps(expected_step(infer.Trace_ELBO, program, X), (loss, exact))
    got_loss, got = expected_step(infer.TraceGraph_ELBO, program, X)
    assert_steps(got_loss, loss)
    assert off(got[GUIDE], exact[GUIDE]) > 0.1


def test_trace_enum_leaves_out_what_depends_on_a_plate_from_outside():
    program = Coupled()
    steps = {name: expected_step(make, program, X) for name, make in EXPECTATIONS.items()}
    assert_steps(steps["Trace_ELBO"], steps["TraceGraph_ELBO"])
    assert_steps(steps["TraceEnum_ELBO, sampled"][0], steps["Trace_ELBO"][0])
    assert off(steps["TraceEnum_ELBO, sampled"][1], steps["Trace_ELBO"][1]) > 1
    log_q = program.posterior.log_softmax(0)
    z = torch.tensor(list(itertools.product(range(3), repeat=2)))
    added = (log_q[z].sum(-1).exp() * dist.Normal(z.sum(-1).double(), 0.5).log_prob(torch.tensor(3.0))).sum()
    exact = exact_step(program, X)[1][GUIDE] - torch.autograd.grad(added, program.posterior)[0]
    assert_steps(steps["Trace_ELBO"][1][GUIDE], exact)


def test_trace_elbo_leaves_auxiliary_classes_out_of_the_gradient():
    """2,000 particles of z for each class; 4 standard errors, seed 0: a false alarm in 16,000 runs."""
    program, x = Auxiliary(), REALS[:1]
    log_q = program.logits.log_softmax(0)
    # E log p(z, x) - log q(z given a), up to what does not depend on a
    inner = -0.5 * (program.means**2 + (x - program.means) ** 2)
    wanted = torch.autograd.grad(-(log_q.exp() * (inner - log_q)).sum(), program.logits)[0]
    for name, right in (("Trace_ELBO", False), ("TraceGraph_ELBO", True)):
        estimator = getattr(infer, name)(num_particles=2000, vectorize_particles=True, max_plate_nesting=1)
        torch.manual_seed(0)
        got = 0.0
        for a in range(2):
            values = torch.full((2000, 1), a)
            got = (
                got
                + log_q[a].exp().detach() * step(estimator, program, x, given({"a": [values]})(program.guide))[1][:2]
            )
        # The spread of a particle's term is below 2 nats, times q (1 - q) = 0.2.
        assert (off(got, wanted) < 4 * 2 * 0.2 / math.sqrt(2000)) == right


def test_mmd_compares_each_posterior_with_the_prior(cleared_store):
    """x ~ N(0, 1) and q(z given x) = N(0.8 x, 0.6): the aggregate is the prior, and MMD should be 0. Seed 0."""
    program, x = Shifted(), torch.randn(400, dtype=torch.float64)
    with torch.no_grad():
        program.slope.copy_(torch.tensor(0.8))
    program.guide = lambda x: _normal_in_plate(0.8 * x, 0.6)
    z = 0.8 * x + 0.6 * torch.randn(400, dtype=torch.float64)
    prior = torch.randn(400, dtype=torch.float64)
    kernels = [(-((a[:, None] - b) ** 2) / 2).exp().mean() for a, b in ((z, z), (prior, prior), (z, prior))]
    aggregate = kernels[0] + kernels[1] - 2 * kernels[2]
    kernel = RBF(400, lengthscale=torch.tensor(20.0, dtype=torch.float64))
    penalties = []
    for rate in (1.0, 0.1):
        torch.manual_seed(1)
        estimator = infer.Trace_MMD(kernel, num_particles=50, max_plate_nesting=1)
        without = infer.Trace_MMD(kernel, mmd_scale=0.0, num_particles=50, max_plate_nesting=1)
        with beta(rate):
            state = torch.get_rng_state()
            loss = estimator.loss(program.model, program.guide, x)
            torch.set_rng_state(state)
            penalties.append(loss - without.loss(program.model, program.guide, x))
    assert aggregate < 0.02
    assert penalties[0] > 0.1
    assert penalties[0] == penalties[1]  # and beta weighs nothing


def _normal_in_plate(mean, std):
    with data_plate(mean):
        pyro.sample("z", dist.Normal(mean, std))


@pytest.mark.parametrize("num_particles", [2, 8])
def test_energy_distance_counts_the_prior_for_every_particle(num_particles):
    """800 particles against a closed form; 4 standard errors, seed 0: a false alarm in 16,000 runs."""
    program = Shifted()
    losses = []
    for prior_scale in (0.0, 1.0):
        torch.manual_seed(0)
        estimator = infer.EnergyDistance(prior_scale=prior_scale, num_particles=num_particles, max_plate_nesting=2)
        losses.append(
            torch.stack([estimator(program.model, program.guide, REALS).detach() for _ in range(800 // num_particles)])
        )
    added = (losses[1] - losses[0]) / num_particles
    mean = 0.2 * REALS
    wanted = (0.5 * (mean**2 + 0.8**2) + 0.5 * math.log(2 * math.pi)).sum()
    error = added.std() / len(added) ** 0.5
    assert (added.mean() - wanted).abs() < 4 * error < 0.5  # once for every particle, where once was promised


def test_energy_distance_has_no_gradient_through_classes():
    program = Shifted(likelihood=lambda z: dist.Bernoulli(logits=z))
    loss = infer.EnergyDistance(max_plate_nesting=2)(program.model, program.guide, (REALS > 0).double())
    assert not loss.requires_grad  # SVI would go on without a word


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:FutureWarning")
def test_jit_keeps_its_first_beta_and_its_first_program(cleared_store):
    def programs(name, shift):
        def model(x):
            pyro.param("shift" + name, x.new_tensor(shift))
            with data_plate(x):
                z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
                pyro.sample("x", dist.Normal(z + shift, 1.0), obs=x)

        def guide(x):
            with data_plate(x):
                pyro.sample("z", dist.Normal(pyro.param("slope" + name, x.new_tensor(0.3)) * x, 1.3))

        return model, guide

    def loss(estimator, name, shift, rate=1.0):
        torch.manual_seed(0)
        with beta(rate):
            return estimator.loss_and_grads(*models[name, shift], REALS)

    models = {key: programs(*key) for key in (("a", 0.5), ("b", 3.0))}
    for name in ("JitTrace_ELBO", "JitTraceGraph_ELBO", "JitTraceEnum_ELBO"):
        options = {"max_plate_nesting": 1, "strict_enumeration_warning": False}
        plain = getattr(infer, name.removeprefix("Jit"))(**options)
        jit = getattr(infer, name)(ignore_jit_warnings=True, **options)
        loss(jit, "a", 0.5)
        assert loss(jit, "a", 0.5) == pytest.approx(loss(plain, "a", 0.5))
        assert loss(jit, "a", 0.5, 0.1) == pytest.approx(loss(plain, "a", 0.5))
        assert abs(loss(plain, "a", 0.5, 0.1) - loss(plain, "a", 0.5)) > 0.1
        assert abs(loss(jit, "b", 3.0) - loss(plain, "b", 3.0)) > 1
        with pytest.warns(UserWarning, match="its first call"):
            check(jit, *models["b", 3.0], REALS)


# The table: estimator, situation, and what is said.


def vae():
    return pyro_vae.build((8, 8), latent=2).double()


IMAGES = torch.ones(5, 8, 8, dtype=torch.float64)
MIXED_PRIOR = dist.MixtureSameFamily(
    dist.Categorical(torch.ones(2).double()),
    dist.Normal(torch.tensor([-1.0, 1.0]).double(), torch.ones(2).double()),
)


def subsampled_vae():
    program = vae()
    program.size = 1000
    return program


def conv_vae():
    return pyro_vae.build((1, 8, 8), latent=2, network="ConvEncoder(), ConvDecoder()").double()


def enumerated(how, **options):
    program = Classes()
    program.guide = infer.config_enumerate(program.guide, how, **options)
    return program


def scaled_model(program, scale=0.5):
    program.model = poutine.scale(program.model, scale=scale)
    return program


def masked_model():
    program = Shifted()
    program.model = poutine.mask(program.model, mask=torch.tensor([True, False, True]))
    return program


def weighted_data(scale):
    program = Shifted()
    program.model, program.guide = poutine.scale(program.model, scale=scale), poutine.scale(program.guide, scale=scale)
    return program


SITUATIONS = {
    "vae": (vae, IMAGES, 1.0),
    "vae, subsampled": (subsampled_vae, IMAGES, 1.0),
    "vae, beta": (vae, IMAGES, 0.5),
    "vae, tensor beta": (vae, IMAGES, torch.tensor(0.3)),
    "vae, subsampled, beta": (subsampled_vae, IMAGES, 0.3),
    "conv vae": (conv_vae, IMAGES[:, None], 1.0),
    "one datum": (Shifted, REALS[:1], 1.0),
    "linear": (LinearGaussian, torch.zeros(4, 3, dtype=torch.float64), 1.0),
    "two latents": (lambda: TwoLatents().double(), torch.ones(3, 64, dtype=torch.float64), 1.0),
    "chain": (Chain, REALS, 1.0),
    "chain, upward": (lambda: Chain(order=("z2", "z1")), REALS, 1.0),
    "chain, upward, factorized": (lambda: Chain(order=("z2", "z1"), coupling=None), REALS, 1.0),
    "independent, upward": (lambda: Chain(order=("z2", "z1"), independent=True), REALS, 1.0),
    "classes": (Classes, X, 1.0),
    "class": (Classes, X[:1], 1.0),
    "classes, subsampled": (lambda: Classes(size=20), X, 1.0),
    "classes, beta": (Classes, X, 0.5),
    "classes, one-hot": (lambda: Classes(lookup=lambda t, z: nn.functional.one_hot(z, 3).to(t) @ t), X, 1.0),
    "classes, in place": (lambda: Classes(lookup=in_place), X, 1.0),
    "classes, by number": (lambda: Classes(lookup=by_number), X, 1.0),
    "classes, parallel": (lambda: enumerated("parallel"), X, 1.0),
    "classes, parallel, beta": (lambda: enumerated("parallel"), X, 0.5),
    "classes, sequential": (lambda: enumerated("sequential"), X, 1.0),
    "classes, several": (lambda: enumerated("parallel", num_samples=4), X, 1.0),
    "classes, coupled": (Coupled, X, 1.0),
    "class beside": (lambda: Shifted(classes=True), REALS, 1.0),
    "auxiliary": (Auxiliary, REALS, 1.0),
    "auxiliary, common": (lambda: Auxiliary(common=True), REALS, 1.0),
    "global": (Global, REALS, 1.0),
    "global, subsampled": (lambda: Global(size=30), REALS, 1.0),
    "global, classes": (lambda: Global(discrete=True), REALS, 1.0),
    "model scaled": (lambda: scaled_model(Shifted()), REALS, 1.0),
    "model scaled by tensor": (lambda: scaled_model(Shifted(), torch.tensor([1.0, 2.0, 1.0])), REALS, 1.0),
    "model scaled, no closed form": (lambda: scaled_model(Shifted(prior=lambda x: MIXED_PRIOR)), REALS, 1.0),
    "model masked": (masked_model, REALS, 1.0),
    "weighted data": (lambda: weighted_data(torch.tensor([1.0, 2.0, 1.0])), REALS, 1.0),
    "unweighted data": (lambda: weighted_data(torch.ones(3)), REALS, 1.0),
    "binary data": (lambda: Shifted(likelihood=lambda z: dist.Bernoulli(logits=z)), (REALS > 0).double(), 1.0),
}
PLAIN = [
    "vae",
    "vae, subsampled",
    "vae, beta",
    "vae, tensor beta",
    "vae, subsampled, beta",
    "conv vae",
    "linear",
    "two latents",
]
MAKE = {
    "Trace_ELBO": infer.Trace_ELBO,
    "TraceGraph_ELBO": infer.TraceGraph_ELBO,
    "TraceMeanField_ELBO": infer.TraceMeanField_ELBO,
    "TraceEnum_ELBO": infer.TraceEnum_ELBO,
    "RenyiELBO": lambda: infer.RenyiELBO(num_particles=3),
    "RenyiELBO, alpha": lambda: infer.RenyiELBO(alpha=0.5, num_particles=3),
    "RenyiELBO, 1 particle": lambda: infer.RenyiELBO(num_particles=1),
    "ReweightedWakeSleep": infer.ReweightedWakeSleep,
    "TraceTMC_ELBO": infer.TraceTMC_ELBO,
    "TraceTailAdaptive_ELBO": lambda: infer.TraceTailAdaptive_ELBO(num_particles=3, vectorize_particles=True),
    "TraceTailAdaptive_ELBO, 1 particle": lambda: infer.TraceTailAdaptive_ELBO(vectorize_particles=True),
    "Trace_MMD": lambda: infer.Trace_MMD(RBF(1)),
    "EnergyDistance": infer.EnergyDistance,
    "EnergyDistance, prior": lambda: infer.EnergyDistance(prior_scale=1.0),
    "JitTrace_ELBO": infer.JitTrace_ELBO,
    "JitTraceMeanField_ELBO": infer.JitTraceMeanField_ELBO,
}
INSIDE, NO_BOUND, TRACK = "inside its log-sum-exp.*IWAE", "no bound.*Trace_ELBO", "loses track.*'z'.*use Trace_ELBO"
NO_GRADIENT, ONE_WEIGHT, PATH = "no right gradient.*VIMCO", "one importance weight", "flow back through"
ONE_SIDE, REFUSED, LOST = "the model's differ; use Trace_ELBO", "ValueError", "gives the guide no gradient"
TABLE = [
    *[(name, at, []) for name in ("Trace_ELBO", "TraceGraph_ELBO", "TraceEnum_ELBO") for at in PLAIN],
    *[("TraceMeanField_ELBO", at, []) for at in PLAIN if at != "two latents"],
    *[("Trace_ELBO", at, []) for at in SITUATIONS if not at.startswith("auxiliary")],
    *[
        ("TraceGraph_ELBO", at, [])
        for at in ("classes", "classes, one-hot", "classes, beta", "class beside", "auxiliary")
    ],
    *[("TraceGraph_ELBO", at, []) for at in ("classes, coupled", "global, classes", "chain, upward")],
    ("TraceGraph_ELBO", "classes, in place", [TRACK]),
    ("TraceGraph_ELBO", "classes, by number", [TRACK]),
    ("Trace_ELBO", "auxiliary", ["auxiliary sites.*'a'; use TraceGraph_ELBO"]),
    ("Trace_ELBO", "auxiliary, common", []),
    ("TraceMeanField_ELBO", "chain", []),
    ("TraceMeanField_ELBO", "chain, upward", ["got 'z2'; use Trace_ELBO"]),
    ("TraceMeanField_ELBO", "chain, upward, factorized", []),
    ("TraceMeanField_ELBO", "independent, upward", []),
    ("TraceMeanField_ELBO", "two latents", ["got 'z1'; use Trace_ELBO"]),
    ("TraceMeanField_ELBO", "global, subsampled", []),
    ("TraceMeanField_ELBO", "weighted data", []),
    ("TraceMeanField_ELBO", "model scaled", [ONE_SIDE]),
    ("TraceMeanField_ELBO", "model scaled by tensor", [ONE_SIDE]),
    ("TraceMeanField_ELBO", "model masked", [ONE_SIDE]),
    ("TraceMeanField_ELBO", "model scaled, no closed form", []),
    *[("TraceMeanField_ELBO", at, [REFUSED]) for at in ("classes", "class beside", "auxiliary")],
    *[("TraceEnum_ELBO", at, []) for at in ("classes", "classes, parallel", "classes, sequential", "global, classes")],
    ("TraceEnum_ELBO", "classes, parallel, beta", []),
    ("TraceEnum_ELBO", "classes, coupled", ["depends on 'z' outside its plate.*Trace_ELBO"]),
    *[
        ("RenyiELBO", at, [])
        for at in ("vae", "conv vae", "two latents", "global", "chain", "unweighted data", "linear")
    ],
    ("RenyiELBO", "vae, subsampled", [INSIDE]),
    ("RenyiELBO, alpha", "vae, subsampled", [INSIDE]),
    ("RenyiELBO", "weighted data", [INSIDE]),
    ("RenyiELBO", "global, subsampled", [INSIDE]),
    ("RenyiELBO", "vae, beta", [NO_BOUND]),
    ("RenyiELBO", "vae, tensor beta", [NO_BOUND]),
    ("RenyiELBO", "vae, subsampled, beta", [INSIDE, NO_BOUND]),
    ("RenyiELBO, 1 particle", "vae, subsampled, beta", []),
    ("RenyiELBO", "classes", [NO_GRADIENT]),
    ("RenyiELBO, alpha", "classes", ["alpha=0.5.*'z'"]),
    ("RenyiELBO", "class beside", ["at 'y' without rsample"]),
    ("RenyiELBO, 1 particle", "classes", [NO_GRADIENT]),
    ("RenyiELBO", "auxiliary, common", ["counts 'a'"]),
    ("RenyiELBO", "auxiliary", [NO_GRADIENT]),
    ("ReweightedWakeSleep", "vae", [ONE_WEIGHT]),
    ("ReweightedWakeSleep", "one datum", []),
    ("ReweightedWakeSleep", "class", []),
    ("ReweightedWakeSleep", "global", []),
    ("ReweightedWakeSleep", "classes, subsampled", [INSIDE, ONE_WEIGHT]),
    ("ReweightedWakeSleep", "global, subsampled", [INSIDE]),
    ("ReweightedWakeSleep", "classes, beta", [NO_BOUND, ONE_WEIGHT]),
    ("ReweightedWakeSleep", "chain", [ONE_WEIGHT, PATH + " 'z1'"]),
    ("ReweightedWakeSleep", "chain, upward, factorized", [ONE_WEIGHT]),
    ("TraceTMC_ELBO", "vae", []),
    ("TraceTMC_ELBO", "classes, parallel", []),
    ("TraceTMC_ELBO", "classes, parallel, beta", [NO_BOUND]),
    ("TraceTMC_ELBO", "classes", [LOST]),
    ("TraceTMC_ELBO", "classes, several", [LOST]),
    ("TraceTMC_ELBO", "classes, sequential", ["adds up the logarithms.*'parallel'"]),
    ("TraceTMC_ELBO", "classes, subsampled", [LOST]),
    ("TraceTailAdaptive_ELBO", "vae", ["ranks particles wrongly.*Renyi"]),
    ("TraceTailAdaptive_ELBO, 1 particle", "vae, subsampled", []),
    ("TraceTailAdaptive_ELBO, 1 particle", "classes", [REFUSED]),
    ("Trace_MMD", "vae", ["aggregate.*estimators.MMD"]),
    ("Trace_MMD", "classes", [REFUSED]),
    ("EnergyDistance", "one datum", []),
    ("EnergyDistance", "binary data", [REFUSED]),
    ("EnergyDistance", "classes", [REFUSED]),
    ("EnergyDistance, prior", "one datum", ["num_particles=2"]),
    ("JitTrace_ELBO", "vae", []),
    ("JitTrace_ELBO", "vae, beta", ["keeps the scales"]),
    ("JitTrace_ELBO", "vae, subsampled", ["keeps the scales"]),
    ("JitTraceMeanField_ELBO", "vae, beta", []),
]


@pytest.mark.parametrize(
    ("name", "situation", "said"), TABLE, ids=lambda value: value if isinstance(value, str) else ""
)
def test_it_is_said_where_it_is_wrong_and_only_there(name, situation, said):
    make, x, rate = SITUATIONS[situation]
    program, estimator = make(), MAKE[name]()
    with warnings.catch_warnings(record=True) as caught, beta(rate):
        warnings.simplefilter("always")
        if said == [REFUSED]:
            with pytest.raises(ValueError, match=f"^{type(estimator).__name__} .*use Trace_ELBO"):
                check(estimator, program.model, program.guide, x)
            said = []
        else:
            check(estimator, program.model, program.guide, x)
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == len(said), messages
    assert all(warning.filename == __file__ for warning in caught)
    for message, pattern in zip(messages, said, strict=True):
        assert message.startswith(type(estimator).__name__ + " ")
        assert "\n" not in message
        assert re.search(pattern, message), message


def test_others_pass_and_nothing_is_disturbed():
    program = Classes()
    torch.manual_seed(7)
    state = torch.get_rng_state()
    check(object(), None, None)
    check(infer.TraceGraph_ELBO(), program.model, program.guide, X)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in program.parameters())


def test_dropout_is_no_dependence():
    """In training mode, an encoder with dropout gives two runs two answers; not here."""
    program, x = Shifted(classes=True), REALS.repeat(5)

    def guide(x):
        hidden = nn.functional.dropout(x, 0.5)
        with data_plate(x):
            pyro.sample("y", dist.Bernoulli(logits=hidden))
            pyro.sample("z", dist.Normal(hidden, 0.8))

    with pytest.warns(UserWarning, match="one importance weight") as caught:
        check(infer.ReweightedWakeSleep(), program.model, guide, x)
    assert len(caught) == 1
