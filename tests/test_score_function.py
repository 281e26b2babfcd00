"""Score-function estimators against enumeration of all that particles can be, in float64."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import Mixture, ProbabilisticPCA
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import nn

import pyro_vae
from pyro_vae import handlers
from pyro_vae.estimators import IWAE, VIMCO, Reinforce, ReweightedWakeSleep, Thermodynamic
from pyro_vae.programs import declare_parameters

X = torch.tensor([1.0, 0.0], dtype=torch.float64)


@pytest.fixture
def program():
    program = Mixture()
    with torch.no_grad():
        program.posterior.copy_(torch.tensor([0.3, -0.2, 0.5]))
    return program


class Enumerated:
    """Expectations over K particles of three classes: the batch runs over all tuples, weighted by a scale."""

    def __init__(self, program, num_particles):
        self.program = program
        self.tuples = torch.tensor(list(itertools.product(range(3), repeat=num_particles))).T  # (K, 3^K)
        self.x = X.expand(self.tuples.shape[1], 2)

    def log_q(self):
        return self.program.posterior.log_softmax(0)

    def probability(self):
        return self.log_q()[self.tuples].sum(0).exp()

    def log_weights(self, beta=1.0):
        """By hand, of each tuple."""
        prior = self.program.prior.log_softmax(0)
        likelihood = dist.Bernoulli(logits=self.program.logits).log_prob(X).sum(-1)
        return (likelihood + beta * (prior - self.log_q()))[self.tuples]

    def exact(self, bound, beta=1.0):
        """Minus the expectation of a bound: a function of the parameters, through the probabilities too."""
        return -(self.probability() * bound(self.log_weights(beta))).sum()

    def loss(self, estimator, model=None, scale=None):
        weight = self.probability().detach() if scale is None else scale
        runs = [poutine.scale(run, scale=weight) for run in (self.program.model, self.program.guide)]

        class fixed(poutine.messenger.Messenger):
            def _pyro_post_sample(_, msg):  # noqa: N805
                if msg["name"] == "z":
                    msg["value"] = self.tuples

        with fixed():
            return estimator.differentiable_loss(*runs, self.x)


def gradient(loss, program):
    return dict(
        zip(("prior", "logits", "posterior"), torch.autograd.grad(loss, list(program.parameters())), strict=True)
    )


def log_mean_exp(w):
    return w.logsumexp(0) - math.log(len(w))


@pytest.mark.parametrize("num_particles", [2, 3, 5])
@pytest.mark.parametrize(("estimator", "bound"), [(VIMCO, log_mean_exp), (Reinforce, lambda w: w.mean(0))])
def test_the_gradient_is_unbiased(estimator, bound, num_particles, program):
    enumerated = Enumerated(program, num_particles)
    loss, exact = enumerated.loss(estimator(num_particles)), enumerated.exact(bound)
    assert loss.item() == pytest.approx(exact.item(), abs=1e-12)
    found, expected = gradient(loss, program), gradient(exact, program)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert expected["posterior"].abs().max() > 0.05


@pytest.mark.filterwarnings("ignore:.*under beta")
@pytest.mark.parametrize("beta", [0, 0.3, 3.0])
@pytest.mark.parametrize(("estimator", "bound"), [(VIMCO, log_mean_exp), (Reinforce, lambda w: w.mean(0))])
def test_the_gradient_is_unbiased_under_beta(estimator, bound, beta, program):
    enumerated = Enumerated(program, 3)
    with handlers.beta(beta):
        loss = enumerated.loss(estimator(3))
    exact = enumerated.exact(bound, beta)
    assert loss.item() == pytest.approx(exact.item(), abs=1e-12)
    found, expected = gradient(loss, program), gradient(exact, program) if beta else None
    if beta:
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    else:  # the prior has no gradient at all
        assert found["prior"].abs().max() < 1e-12
        (expected_posterior,) = torch.autograd.grad(exact, program.posterior)
        torch.testing.assert_close(found["posterior"], expected_posterior, rtol=1e-10, atol=1e-12)


def test_the_baselines_lower_the_variance(program):
    """Of the score's weight; and VIMCO's still does with thousands of particles, where differences would cancel."""
    log_weights = torch.randn(5000, 3, dtype=torch.float64)
    bound, weights = VIMCO(5000).weigh(log_weights)
    one = log_weights.clone()
    one[7] = torch.cat([log_weights[:7], log_weights[8:]]).mean(0)
    torch.testing.assert_close(weights.reinforce[7], bound - log_mean_exp(one), rtol=1e-6, atol=1e-14)
    assert weights.reinforce.abs().max() < 0.05 * bound.abs().max()


def test_the_baseline_of_a_particle_that_cannot_be():
    bound, weights = VIMCO(3).weigh(torch.tensor([[0.0], [-torch.inf], [0.5]], dtype=torch.float64))
    others = math.log((1 + math.exp(0.5) + math.exp(0.25)) / 3)
    assert weights.reinforce[1].item() == pytest.approx(bound.item() - others, abs=1e-12)
    assert weights.reinforce.isfinite().all()


def test_wake(program):
    """The guide's gradient is that of the weighted log-densities with the weights held, the model's is that of IWAE."""
    enumerated = Enumerated(program, 3)
    found = gradient(enumerated.loss(ReweightedWakeSleep(3)), program)
    weights = enumerated.log_weights().softmax(0).detach()
    probability = enumerated.probability().detach()
    log_q = enumerated.log_q()[enumerated.tuples]
    (guide,) = torch.autograd.grad(-(probability * (weights * log_q).sum(0)).sum(), program.posterior)
    torch.testing.assert_close(found["posterior"], guide, rtol=1e-10, atol=1e-12)
    model = torch.autograd.grad(
        -(probability * log_mean_exp(enumerated.log_weights())).sum(), [program.prior, program.logits]
    )
    torch.testing.assert_close((found["prior"], found["logits"]), model, rtol=1e-10, atol=1e-12)


class Recognition(Mixture):
    """With a guide that looks at the data, in a dream too."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(4, 3, dtype=torch.float64))

    def guide(self, x):
        declare_parameters(self)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Categorical(logits=self.table[(x @ x.new_tensor([1.0, 2.0])).long()]))


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_sleep(scale):
    """40,000 dreams against the sum over all; 12 numbers at 4 standard errors, false alarm 8e-4, seed 0."""
    program, num_data = Recognition(), 40_000
    x = torch.zeros(num_data, 2, dtype=torch.float64)
    with poutine.scale(scale=scale), handlers.beta(1.0):
        loss = ReweightedWakeSleep(2, insomnia=0.0).differentiable_loss(program.model, program.guide, x)
    (found,) = torch.autograd.grad(loss, program.table)
    cells = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    likelihood = dist.Bernoulli(logits=program.logits).to_event(1).log_prob(cells[:, None]).exp()
    joint = (likelihood * program.prior.softmax(0)).detach()  # (cells, classes)
    (exact,) = torch.autograd.grad(-(joint * program.table.log_softmax(-1)).sum(), program.table)
    error = (joint.sum(1, keepdim=True) / num_data).sqrt()  # an entry of the gradient is at most 1
    assert ((found / num_data / scale - exact).abs() < 4 * error).all()
    assert (exact.abs() > 4 * error).any()


def test_dreams_follow_their_latents():
    """Also by a deterministic site, which is not drawn: the dreams of one seed are then the same."""

    class Named(Recognition):
        def model(self, x):
            declare_parameters(self)
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", dist.Categorical(logits=self.prior))
                logits = pyro.deterministic("logits", self.logits[z])
                pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    found, table = [], torch.randn(4, 3, dtype=torch.float64)
    for program in (Recognition(), Named()):
        program.table.data.copy_(table)
        torch.manual_seed(0)
        x = torch.zeros(20, 2, dtype=torch.float64)
        loss = ReweightedWakeSleep(2, insomnia=0.0).differentiable_loss(program.model, program.guide, x)
        found.append(torch.autograd.grad(loss, program.table)[0])
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)
    assert found[0].abs().max() > 0.1


def test_wake_and_sleep_are_mixed():
    program = Recognition()
    x = torch.zeros(10, 2, dtype=torch.float64)

    def found(insomnia):
        torch.manual_seed(0)
        loss = ReweightedWakeSleep(3, insomnia).differentiable_loss(program.model, program.guide, x)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [program.table, program.logits])]), loss

    (wake, value), (sleep, _), (both, mixed) = found(1.0), found(0.0), found(0.25)
    torch.testing.assert_close(both, 0.25 * wake + 0.75 * sleep)
    assert mixed.item() == pytest.approx(value.item(), abs=1e-12)


def tempered(program, estimator):
    """The thermodynamic objective itself, with expectations over the three classes and not over draws."""
    prior, log_q = program.prior.log_softmax(0), program.posterior.log_softmax(0)
    log_w = prior + dist.Bernoulli(logits=program.logits).log_prob(X).sum(-1) - log_q
    points = [0.0, *torch.logspace(math.log10(estimator.first), 0, estimator.partitions).tolist()]
    terms = [(b - a) * ((log_q + a * log_w).softmax(0) * log_w).sum() for a, b in itertools.pairwise(points)]
    return -sum(terms)


@pytest.mark.parametrize("partitions", [2, 4])
def test_the_thermodynamic_objective_in_the_limit(partitions, program):
    """2,000 data of 1,000 particles; of order 1/K is the bias, which 4 standard errors exceed; seed 0."""
    estimator = Thermodynamic(1000, partitions, 0.1)
    exact = tempered(program, estimator)
    x = X.expand(2000, 2)
    loss = estimator.differentiable_loss(program.model, program.guide, x) / 2000
    found, expected = gradient(loss, program), gradient(exact, program)
    assert loss.item() == pytest.approx(exact.item(), abs=2e-3)
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=0, atol=4e-3)
    assert expected["posterior"].abs().max() > 0.05


def test_the_thermodynamic_objective_of_one_step_is_the_elbo_and_of_many_the_evidence(program):
    x = X.expand(3000, 2)
    with torch.no_grad():
        torch.manual_seed(0)
        one = Thermodynamic(4, 1).loss(program.model, program.guide, x)
        torch.manual_seed(0)
        assert one == pytest.approx(Reinforce(4).loss(program.model, program.guide, x), rel=1e-12)
        bounds = [-tempered(program, Thermodynamic(2, steps, 0.01)).item() for steps in (2, 5, 50, 1000)]
        evidence = program.evidence(X[None]).item()
    elbo = -Enumerated(program, 1).exact(lambda w: w.mean(0)).item()
    assert [elbo, *bounds] == sorted([elbo, *bounds])
    assert bounds[-1] < evidence < bounds[-1] + 0.01


def test_they_serve_reparameterized_guides_too():
    """400 gradients of VIMCO against IWAE's; 4 standard errors for 3 numbers, false alarm 2e-4, seed 0."""
    program, x = ProbabilisticPCA(), torch.tensor([[0.7, -1.2]], dtype=torch.float64).expand(500, 2)

    def draws(estimator):
        parameters = [program.slope, program.log_scale]
        losses = [estimator.differentiable_loss(program.model, program.guide, x) / 500 for _ in range(200)]
        return torch.stack([torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]) for loss in losses])

    score, path = draws(VIMCO(4)), draws(IWAE(4))
    error = ((score.var(0) + path.var(0)) / 200).sqrt()
    assert ((score.mean(0) - path.mean(0)).abs() < 4 * error).all()
    assert path.mean(0).abs().max() > 10 * error.max()


ALL = [VIMCO(3), Reinforce(3), ReweightedWakeSleep(3), Thermodynamic(3, 3)]


@pytest.mark.parametrize("estimator", ALL, ids=lambda e: type(e).__name__)
def test_chunks_give_the_same(estimator, program, monkeypatch):
    """Classes are drawn a particle at a time, so that chunks of any size draw the same."""
    draw = torch.multinomial

    def multinomial(probs, num_samples, replacement=True):
        return torch.stack([draw(row[None], num_samples, replacement)[0] for row in probs])

    monkeypatch.setattr(torch, "multinomial", multinomial)
    found = []
    x = torch.randint(2, (5, 2)).double()
    for chunk in (None, 1, 2):
        torch.manual_seed(0)
        if chunk is None:
            program.guide(x)
        estimator.chunk = chunk
        loss = estimator.differentiable_loss(program.model, program.guide, x)
        found.append((loss.detach(), gradient(loss, program)))
    estimator.chunk = None
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-12, atol=1e-12)


def test_importance_weighted_ones_warn_under_beta(program):
    for estimator in (VIMCO(2), ReweightedWakeSleep(2), Thermodynamic(2)):
        with handlers.beta(0.5), pytest.warns(UserWarning, match="under beta != 1"):
            estimator.loss(program.model, program.guide, X[None])
    with handlers.beta(0.5):
        Reinforce(2).loss(program.model, program.guide, X[None])


@pytest.mark.parametrize("estimator", ALL, ids=lambda e: type(e).__name__)
def test_they_train_discrete_latents(estimator, cleared_store):
    x = torch.rand(6, 8, 8).round()
    vae = pyro_vae.build((8, 8), latent=4, prior="Bernoulli()", posterior="Bernoulli()")
    before = [p.clone() for p in vae.parameters()]
    pyro_vae.fit(vae, x, estimator=estimator, epochs=2, batch_size=3, progress=False)
    assert all((p != b).any() for p, b in zip(vae.parameters(), before, strict=True))
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-2}), loss=estimator)
    assert math.isfinite(svi.step(x))
    text = pyro_vae.expressions.write(estimator, "estimator")
    assert pyro_vae.expressions.write(pyro_vae.expressions.parse(text, "estimator"), "estimator") == text


def test_they_find_the_exact_posterior(program):
    """The ELBO of a guide without data, trained on one datum, comes to its evidence."""
    x = X.expand(200, 2)
    program.prior.requires_grad_(False)
    program.logits.requires_grad_(False)
    pyro_vae.fit(program, x, estimator=Reinforce(4), epochs=60, batch_size=200, lr=0.1, progress=False)
    with torch.no_grad():
        gap = program.evidence(X[None]) + Trace_ELBO(num_particles=50).loss(program.model, program.guide, x) / 200
    assert 0 <= gap.item() < 0.01


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VIMCO(1), "num_particles >= 2"),
        (lambda: Reinforce(1), "num_particles >= 2"),
        (lambda: ReweightedWakeSleep(2, 1.5), r"insomnia in \[0, 1\]"),
        (lambda: Thermodynamic(2, 0), "partitions >= 1"),
        (lambda: Thermodynamic(2, 3, 1.0), r"first in \(0, 1\)"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
