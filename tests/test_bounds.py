"""Importance-weighted estimators against quadrature over their noise, in float64: nothing here is left to chance."""

import itertools
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import GlobalMean, Mixture, ProbabilisticPCA, TwoLatents, TwoSites
from pyro import poutine
from pyro.distributions import transforms
from pyro.infer import SVI, Trace_ELBO
from torch import nn

import pyro_vae
from pyro_vae import handlers
from pyro_vae.estimators import CIWAE, IWAE, MIWAE, PIWAE, VIMCO, DReG, Particles, Renyi, StickingTheLanding

NODES = 24


def grid(sites, nodes=NODES):
    """Gauss-Hermite nodes of `sites` normal variables, of shape (sites, nodes^sites), and their weights."""
    points, weights = np.polynomial.hermite_e.hermegauss(nodes)
    points, weights = torch.tensor(points), torch.tensor(weights / math.sqrt(2 * math.pi))
    noise = torch.stack([p.flatten() for p in torch.meshgrid(*[points] * sites, indexing="ij")])
    weight = torch.stack([w.flatten() for w in torch.meshgrid(*[weights] * sites, indexing="ij")]).prod(0)
    return noise, weight


class Quadrature:
    """Expectations of an estimator over K particles of each site: the batch runs over the grid, weighted by a scale."""

    def __init__(self, monkeypatch, num_particles, sites=1, nodes=NODES):
        noise, self.weight = grid(num_particles * sites, nodes)
        self.noise = noise.reshape(sites, num_particles, -1)
        self.draws = itertools.cycle(range(sites))

        def standard_normal(shape, dtype, device):
            return self.noise[next(self.draws)].reshape(shape)

        monkeypatch.setattr("torch.distributions.normal._standard_normal", standard_normal)

    def data(self, x):
        return x.expand(len(self.weight), -1)

    def loss(self, estimator, program, x):
        scaled = [poutine.scale(run, scale=self.weight) for run in (program.model, program.guide)]
        return estimator.differentiable_loss(*scaled, self.data(x))

    def gradient(self, estimator, program, x):
        return gradient(self.loss(estimator, program, x), program)


def gradient(loss, program):
    names, parameters = zip(*program.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return dict(zip(names, grads, strict=True))


MODEL = ("weight", "bias", "log_noise", "couple")


def part(gradients, of):
    return {name: g for name, g in gradients.items() if (name in MODEL) == (of == "model")}


def by_hand(bound, program, x, quadrature):
    """The exact expectation of a bound, as a function of the parameters."""
    log_weights = program.log_weights(quadrature.data(x), quadrature.noise[0][..., None])
    return -(quadrature.weight * bound(log_weights)).sum()


def log_mean_exp(log_weights, dim=0):
    return log_weights.exp().mean(dim).log()


BOUNDS = {
    "StickingTheLanding": (StickingTheLanding(2), lambda w: w.mean(0)),
    "IWAE": (IWAE(2), log_mean_exp),
    "DReG": (DReG(2), log_mean_exp),
    "Renyi, 0.5": (Renyi(0.5, 2), lambda w: 2 * (0.5 * w).exp().mean(0).log()),
    "Renyi, -1": (Renyi(-1.0, 2), lambda w: 0.5 * (2 * w).exp().mean(0).log()),
    "Renyi, 1": (Renyi(1.0, 2), lambda w: w.mean(0)),
    "CIWAE": (CIWAE(0.3, 2), lambda w: 0.3 * w.mean(0) + 0.7 * log_mean_exp(w)),
    "MIWAE, 1": (MIWAE(1, 2), log_mean_exp),
    "MIWAE, 2": (MIWAE(2, 1), lambda w: w.mean(0)),
}


@pytest.fixture
def x():
    return torch.tensor([0.7, -1.2], dtype=torch.float64)


@pytest.mark.parametrize("name", BOUNDS)
def test_value_and_gradient_in_expectation(name, x, monkeypatch):
    """Sticking the landing and DReG too: integration by parts is exact but for the error of the quadrature."""
    estimator, bound = BOUNDS[name]
    program, quadrature = ProbabilisticPCA(), Quadrature(monkeypatch, 2)
    loss, exact = quadrature.loss(estimator, program, x), by_hand(bound, program, x, quadrature)
    assert loss.item() == pytest.approx(exact.item(), abs=1e-10)
    found, expected = gradient(loss, program), gradient(exact, program)
    rtol = 1e-5 if name in ("DReG", "StickingTheLanding") else 1e-10
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=rtol, atol=rtol)


def test_sticking_the_landing_on_iwae_is_biased(x, monkeypatch):
    program, quadrature = ProbabilisticPCA(), Quadrature(monkeypatch, 2)
    exact = gradient(by_hand(log_mean_exp, program, x, quadrature), program)
    found = quadrature.gradient(StickingTheLanding(bound=IWAE(2)), program, x)
    torch.testing.assert_close(part(found, "model"), part(exact, "model"))
    assert max((found[name] - exact[name]).abs().max() for name in part(exact, "guide")) > 0.01


def test_piwae_takes_the_guides_gradient_from_miwae(x, monkeypatch):
    program, quadrature = ProbabilisticPCA(), Quadrature(monkeypatch, 4, nodes=8)
    found = quadrature.gradient(PIWAE(2, 2), program, x)
    torch.testing.assert_close(part(found, "model"), part(quadrature.gradient(IWAE(4), program, x), "model"))
    torch.testing.assert_close(part(found, "guide"), part(quadrature.gradient(MIWAE(2, 2), program, x), "guide"))


def test_piwae_keeps_groups_of_hopeless_weights():
    """In float32, where all but one of the normalized weights are zero: of groups of one, the guide's is the ELBO's."""
    program, x = ProbabilisticPCA().float(), torch.full((3, 2), 2.0)
    with torch.no_grad():
        program.log_noise.fill_(-5.0)
    found = []
    for estimator in (PIWAE(4, 1), Renyi(1.0, 4)):
        torch.manual_seed(0)
        found.append(part(gradient(estimator.differentiable_loss(program.model, program.guide, x), program), "guide"))
    torch.testing.assert_close(*found, rtol=1e-5, atol=0)


def test_bounds_are_ordered_and_rise_with_the_particles(x, monkeypatch):
    program = ProbabilisticPCA()
    evidence = program.evidence(x[None]).item()

    def expected(estimator, nodes):
        return -Quadrature(monkeypatch, estimator.num_particles, nodes=nodes).loss(estimator, program, x).item()

    elbo, *importance = [expected(IWAE(k), nodes) for k, nodes in ((1, 40), (2, 40), (3, 30), (4, 16))]
    grouped, combined = expected(MIWAE(2, 2), 16), expected(CIWAE(0.5, 2), 40)
    assert [elbo, *importance, evidence] == sorted([elbo, *importance, evidence])
    assert elbo < grouped < importance[-1]
    assert elbo < combined < importance[0]
    orders = [expected(Renyi(alpha, 2), 40) for alpha in (2.0, 1.0, 0.5, 0.0)]
    assert orders == sorted(orders)
    assert orders[1] == pytest.approx(elbo, abs=1e-6)
    assert orders[3] == pytest.approx(importance[0], abs=1e-9)


ALL = [
    *(StickingTheLanding(3), StickingTheLanding(bound=IWAE(3)), IWAE(3), DReG(3), Renyi(0.5, 3), CIWAE(0.3, 3)),
    *(MIWAE(2, 2), PIWAE(2, 2)),
]


def name(estimator):
    return type(estimator).__name__ + (
        " on IWAE" if getattr(estimator, "bound", None) is not None and not callable(estimator.bound) else ""
    )


@pytest.mark.parametrize("estimator", ALL, ids=name)
@pytest.mark.parametrize("chunk", [None, 2])
def test_at_the_maximum_likelihood_solution_every_bound_is_the_evidence(estimator, chunk):
    """The guide is exact, and every draw gives the evidence: no gradient for a guide without its score."""
    x = torch.randn(20, 4, dtype=torch.float64) @ torch.randn(4, 4, dtype=torch.float64)
    program = ProbabilisticPCA(latent=2, features=4).to_maximum_likelihood(x)
    estimator.chunk = chunk
    loss = estimator.differentiable_loss(program.model, program.guide, x)
    estimator.chunk = None
    assert loss.item() == pytest.approx(-program.evidence(x).sum().item(), abs=1e-10)
    if isinstance(estimator, StickingTheLanding | DReG):
        grads = gradient(loss, program)
        assert max(g.abs().max() for g in part(grads, "guide").values()) < 1e-10


def test_the_models_gradient_is_that_of_the_evidence_where_the_guide_is_exact():
    x = torch.randn(50, 4, dtype=torch.float64)
    program = ProbabilisticPCA(latent=2, features=4).to_maximum_likelihood(x)
    grads = gradient(program.evidence(x[:10]).sum(), program)
    found = [gradient(-DReG(2).differentiable_loss(program.model, program.guide, x[:10]), program) for _ in range(400)]
    for key in ("weight", "bias", "log_noise"):
        draws = torch.stack([f[key] for f in found])
        error = draws.std(0) / 20
        assert ((draws.mean(0) - grads[key]).abs() < 4 * error).all()  # 13 numbers, false alarm 1e-3, seed 0


@pytest.mark.parametrize("estimator", ALL, ids=name)
@pytest.mark.parametrize("chunk", [None, 2])
def test_two_sites_at_the_exact_posterior(estimator, chunk):
    """What depends on another latent is followed: sticking the landing leaves no gradient at all."""
    x = torch.randn(5, 2, dtype=torch.float64)
    program = TwoSites(exact=True)
    estimator.chunk = chunk
    loss = estimator.differentiable_loss(program.model, program.guide, x)
    estimator.chunk = None
    assert loss.item() == pytest.approx(-program.evidence(x).sum().item(), abs=1e-10)
    if isinstance(estimator, StickingTheLanding | DReG):
        grads = gradient(loss, program)
        assert max(g.abs().max() for g in part(grads, "guide").values() if g.ndim < 2) < 1e-10


@pytest.mark.parametrize("estimator", [DReG(2), StickingTheLanding(2), PIWAE(1, 2)], ids=name)
def test_two_sites_in_expectation(estimator, x, monkeypatch):
    program, quadrature = TwoSites(), Quadrature(monkeypatch, 2, sites=2, nodes=14)
    exact = Renyi(1.0, 2) if isinstance(estimator, StickingTheLanding) else IWAE(2)
    found, expected = (quadrature.gradient(e, program, x) for e in (estimator, exact))
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-5)
    assert max(g.abs().max() for g in part(expected, "guide").values()) > 0.1


class FlowGuide(ProbabilisticPCA):
    """The same guide as an affine flow, which remembers what its draws came from."""

    def guide(self, x):
        with self.plate(x):
            flow = transforms.AffineTransform(
                x @ self.slope.T + self.shift, self.log_scale.exp(), event_dim=1, cache_size=1
            )
            base = dist.Normal(x.new_zeros(self.latent), 1.0).expand([len(x), self.latent]).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(base, [flow]))


@pytest.mark.parametrize("estimator", [DReG(2), StickingTheLanding(2), PIWAE(2, 1), IWAE(2)], ids=name)
def test_flows_that_remember_their_draws(estimator, x, monkeypatch):
    programs = ProbabilisticPCA(), FlowGuide()
    quadrature = Quadrature(monkeypatch, 2)
    plain, flow = (quadrature.gradient(estimator, program, x) for program in programs)
    for key in plain:
        torch.testing.assert_close(flow[key], plain[key], rtol=1e-10, atol=1e-10)


@pytest.fixture
def row_by_row(monkeypatch):
    """Noise that is drawn a particle at a time, so that chunks of any size draw the same."""

    def standard_normal(shape, dtype, device):
        return torch.stack([torch.randn(shape[1:], dtype=dtype) for _ in range(shape[0])])

    monkeypatch.setattr("torch.distributions.normal._standard_normal", standard_normal)


@pytest.mark.parametrize("estimator", ALL, ids=name)
@pytest.mark.parametrize("beta", [1.0, 0.3])
@pytest.mark.filterwarnings("ignore:.*under beta")
def test_chunks_give_the_same_loss_gradient_and_random_numbers(estimator, beta, row_by_row):
    program = ProbabilisticPCA(latent=2, features=4, size=1000)
    x = torch.randn(10, 4, dtype=torch.float64)
    found = []
    for chunk in (None, 1, 2):
        torch.manual_seed(0)
        if chunk is None:
            program.guide(x)  # as chunks do first, for global latents
        estimator.chunk = chunk
        with handlers.beta(beta):
            loss = estimator.differentiable_loss(program.model, program.guide, x)
        grads = gradient(loss, program)
        found.append((loss.detach(), grads, torch.rand(())))
    estimator.chunk = None
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-12, atol=1e-12)


def test_chunks_draw_global_latents_once():
    x = torch.randn(6, dtype=torch.float64)
    program = GlobalMean(6)
    for chunk in (None, 2):
        loss = IWAE(5, chunk=chunk).differentiable_loss(program.model, program.guide, x)
        assert loss.item() == pytest.approx(-program.evidence(x).item(), abs=1e-10)
        loss = DReG(5, chunk=chunk).differentiable_loss(program.model, program.guide, x)
        grads = gradient(loss, program)
        assert grads["log_local"].abs() < 1e-10  # the local guide is exact


def test_global_latents_in_chunks_have_the_same_gradient(monkeypatch):
    """The noise of the global draw is 0.3, of the local ones 0.1, 0.2, ... for each particle."""
    x, program = torch.randn(6, dtype=torch.float64), GlobalMean(6)
    with torch.no_grad():
        program.log_local += 0.3
        program.slope += 0.1
    found = []
    for chunk in (None, 2):
        served = itertools.count()

        def standard_normal(shape, dtype, device, served=served):
            if len(shape) < 2:
                return torch.full(shape, 0.3, dtype=dtype)
            rows = torch.tensor([next(served) % 4 for _ in range(shape[0])])
            return (0.1 * (rows + 1.0)).to(dtype)[:, None].expand(shape)

        monkeypatch.setattr("torch.distributions.normal._standard_normal", standard_normal)
        loss = IWAE(4, chunk=chunk).differentiable_loss(program.model, program.guide, x)
        found.append((loss.detach(), gradient(loss, program)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)


def test_a_global_latent_bounds_the_evidence_of_all_data():
    """10,000 losses against the exact evidence of six data together; 4 standard errors on one side, seed 0."""
    x, program = torch.randn(6, dtype=torch.float64), GlobalMean(6)
    with torch.no_grad():
        program.log_scale += 0.7
        losses = torch.tensor([IWAE(50).loss(program.model, program.guide, x) for _ in range(300)])
    assert -losses.mean() < program.evidence(x) + 4 * losses.std() / 300**0.5
    # Exactly its KL divergence is lost: that of N(m, (2s)^2) from N(m, s^2), less what the local guide, which is exact
    # given m, does not lose.
    lost = 0.5 * (math.exp(1.4) - 1 - 1.4)
    assert (losses.mean() + program.evidence(x)).item() == pytest.approx(lost, abs=4 * losses.std().item() / 300**0.5)


def test_a_subsampled_plate_scales_the_bound_and_not_the_weights():
    x = torch.randn(10, 4, dtype=torch.float64)
    found = []
    for size in (None, 1000):
        program = ProbabilisticPCA(latent=2, features=4, size=size)
        torch.manual_seed(0)
        loss = IWAE(5).differentiable_loss(program.model, program.guide, x)
        found.append((loss.detach(), gradient(loss, program)))
    (small, grads), (large, scaled) = found
    assert large.item() == pytest.approx(100 * small.item(), rel=1e-12)
    for key in grads:
        torch.testing.assert_close(scaled[key], 100 * grads[key])


def test_a_subsampled_bound_does_not_exceed_the_evidence():
    """Where stock `RenyiELBO` does: 100 batches of 10, 4 standard errors, seed 0."""
    program = ProbabilisticPCA(latent=2, features=4, size=1000)
    x = torch.randn(1000, 4, dtype=torch.float64)
    losses = torch.tensor(
        [IWAE(8).loss(program.model, program.guide, x[torch.randint(1000, (10,))]) for _ in range(400)]
    )
    assert -losses.mean() < program.evidence(x).sum() + 4 * losses.std() / 20


@pytest.mark.filterwarnings("ignore:.*under beta")
@pytest.mark.parametrize("beta", [0, 0.3, 4.0, torch.tensor(0.3)])
def test_beta_weighs_the_rate_within_the_weights(beta, x, monkeypatch):
    program, quadrature = ProbabilisticPCA(), Quadrature(monkeypatch, 2)
    with handlers.beta(beta):
        loss = quadrature.loss(IWAE(2), program, x)
    z = x @ program.slope.T + program.shift + program.log_scale.exp() * quadrature.noise[0][..., None]
    posterior = dist.Normal(x @ program.slope.T + program.shift, program.log_scale.exp()).log_prob(z).sum(-1)
    prior = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    likelihood = program.log_weights(quadrature.data(x), quadrature.noise[0][..., None]) - prior + posterior
    exact = -(quadrature.weight * log_mean_exp(likelihood + beta * (prior - posterior))).sum()
    assert loss.item() == pytest.approx(exact.item(), abs=1e-10)
    torch.testing.assert_close(gradient(loss, program), gradient(exact, program), rtol=1e-9, atol=1e-10)


def test_beta_in_an_importance_weighted_bound_warns():
    program, x = ProbabilisticPCA(), torch.zeros(3, 2, dtype=torch.float64)
    for estimator in (IWAE(2), DReG(2), Renyi(0.5, 2), MIWAE(2, 2), PIWAE(2, 1), StickingTheLanding(bound=IWAE(2))):
        with handlers.beta(0.5), pytest.warns(UserWarning, match="under beta != 1 is no bound"):
            estimator.loss(program.model, program.guide, x)
    for estimator in (StickingTheLanding(2), Renyi(1.0, 2), IWAE(1), MIWAE(2, 1)):
        with handlers.beta(0.5):
            estimator.loss(program.model, program.guide, x)
    with poutine.scale(scale=0.1):  # of data and latents alike: no beta
        scaled = IWAE(2).loss(program.model, program.guide, x)
    torch.manual_seed(0)
    assert scaled != 0


def test_an_outer_scale_stands_outside():
    program, x = ProbabilisticPCA(), torch.zeros(3, 2, dtype=torch.float64)
    torch.manual_seed(0)
    loss = IWAE(4).loss(program.model, program.guide, x)
    torch.manual_seed(0)
    with poutine.scale(scale=0.1):
        assert IWAE(4).loss(program.model, program.guide, x) == pytest.approx(0.1 * loss, rel=1e-12)


@pytest.mark.parametrize("make", [TwoLatents, lambda: GlobalMean(5)], ids=["two latents", "global latent"])
def test_the_elbo_is_pyros(make):
    """With one particle, under a scale and beta, and on the same random numbers."""
    program = make()
    x = torch.rand(5, dtype=torch.float64) if isinstance(program, GlobalMean) else torch.rand(5, 64).round()
    found = []
    for estimator in (Renyi(1.0, 1), Trace_ELBO()):
        torch.manual_seed(0)
        with handlers.beta(0.3), poutine.scale(scale=2.0):
            loss = estimator.differentiable_loss(program.model, program.guide, x)
        found.append((loss.detach(), gradient(loss, program)))
    torch.testing.assert_close(*found)


def test_to_run_the_guide_again_draws_no_new_random_numbers():
    program, x = TwoSites(), torch.zeros(3, 2, dtype=torch.float64)
    particles = Particles(program.model, program.guide, (x,), {}, 4)
    torch.rand(10)
    state = torch.get_rng_state()
    assert torch.equal(particles.log_posterior_at_fixed(weighted=True), particles.log_posterior)
    assert torch.equal(torch.get_rng_state(), state)


def test_masked_data_do_not_count():
    program, x = ProbabilisticPCA(), torch.randn(4, 2, dtype=torch.float64)
    mask = torch.tensor([True, False, True, True])
    masked = [poutine.mask(run, mask=mask) for run in (program.model, program.guide)]
    torch.manual_seed(0)
    loss = DReG(3).differentiable_loss(*masked, x)
    grads = gradient(loss, program)
    x[1] += 100
    torch.manual_seed(0)
    again = DReG(3).differentiable_loss(*masked, x)
    torch.testing.assert_close((again, gradient(again, program)), (loss, grads))


@pytest.mark.parametrize("estimator", [DReG(3), StickingTheLanding(3)], ids=name)
def test_a_convolutional_program(estimator):
    """40 gradients of 200 data against those of the bound itself; 2 numbers, 4 standard errors, false alarm 1e-4."""
    vae = pyro_vae.build((1, 4, 4), latent=1, network="ConvEncoder(channels=(2,)), ConvDecoder(channels=(2,))").double()
    x = torch.rand(1, 1, 4, 4, dtype=torch.float64).round().expand(200, 1, 4, 4)
    exact = Renyi(1.0, 3) if isinstance(estimator, StickingTheLanding) else IWAE(3)
    bias = next(p for n, p in vae.posterior.named_parameters() if n.endswith("bias") and p.numel() == 2)

    def draws(estimator):
        losses = [estimator.differentiable_loss(vae.model, vae.guide, x) for _ in range(40)]
        return torch.stack([torch.autograd.grad(loss, bias)[0] for loss in losses])

    found, expected = draws(estimator), draws(exact)
    error = ((found.var(0) + expected.var(0)) / 40).sqrt()
    assert ((found.mean(0) - expected.mean(0)).abs() < 4 * error).all()
    assert found.mean(0).abs().max() > 4 * error.max()  # or it would show nothing


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["IWAE", "DReG", "VIMCO"])
def test_thousands_of_particles_fit_into_little_memory(estimator):
    """5,000 particles of 20 images, of which the pixels alone would take 300 MiB a layer, in a process of its own.

    Its peak is that of its own memory: what `getrusage` says of a process on Linux begins with what started it.
    """
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc/self/status")
    code = f"""
import torch, pyro_vae
torch.set_num_threads(1)
vae = pyro_vae.build((28, 28), latent=50, network="MLP(hidden=[200, 200])")
estimator = pyro_vae.estimators.{estimator}(5000, chunk=50)
estimator.differentiable_loss(vae.model, vae.guide, torch.rand(20, 28, 28).round()).backward()
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2**20  # KiB


@pytest.mark.parametrize("estimator", [IWAE(2), DReG(2), StickingTheLanding()], ids=name)
def test_discrete_latents_are_refused_with_what_fits(estimator):
    program = Mixture()
    with pytest.raises(ValueError, match="Categorical at site 'z'; use VIMCO"):
        estimator.loss(program.model, program.guide, torch.zeros(2, 2, dtype=torch.float64))


def test_latents_that_differ_are_refused():
    program, other = ProbabilisticPCA(), TwoSites()
    with pytest.raises(ValueError, match=r"latents \['z'\], got \['z1', 'z2'\]"):
        IWAE(2).loss(program.model, other.guide, torch.zeros(2, 2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: IWAE(0), "num_particles >= 1, got 0"),
        (lambda: IWAE(2.5), "integer num_particles >= 1, got 2.5"),
        (lambda: IWAE(2, chunk=0), "chunk >= 1, got 0"),
        (lambda: CIWAE(1.5), r"beta in \[0, 1\], got 1.5"),
        (lambda: MIWAE(0, 2), "m >= 1 and k >= 1"),
        (lambda: StickingTheLanding(3, IWAE(2)), "bound's 2 particles, got 3"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("estimator", ALL, ids=name)
def test_they_train_under_fit_svi_and_as_modules(estimator, cleared_store):
    x = torch.rand(6, 8, 8).round()
    vae = pyro_vae.build((8, 8), latent=2)
    before = [p.clone() for p in vae.parameters()]
    pyro_vae.fit(vae, x, estimator=estimator, epochs=1, batch_size=3, progress=False)
    assert all((p != b).any() for p, b in zip(vae.parameters(), before, strict=True))
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-2}), loss=estimator)
    assert math.isfinite(svi.step(x))
    assert math.isfinite(svi.evaluate_loss(x))
    module = estimator(vae.model, vae.guide)
    assert isinstance(module, nn.Module)
    module(x).backward()


@pytest.mark.parametrize("estimator", ALL, ids=name)
def test_expressions_write_and_read_them(estimator):
    text = pyro_vae.expressions.write(estimator, "estimator")
    assert pyro_vae.expressions.write(pyro_vae.expressions.parse(text, "estimator"), "estimator") == text


def test_a_weight_of_the_data_is_no_outer_scale():
    """`weigh` stands within the weights, for one observed site as for several; `poutine.scale` stands outside."""
    program, x = ProbabilisticPCA(), torch.randn(3, 2, dtype=torch.float64)
    torch.manual_seed(0)
    with handlers.weigh({"x": 2.0}), poutine.scale(scale=3.0):
        found = Particles(program.model, program.guide, (x,), {}, 4)
    torch.manual_seed(0)
    plain = Particles(program.model, program.guide, (x,), {}, 4)
    assert found.scale == 3.0
    prior = dist.Normal(0.0, 1.0).log_prob(plain.guide.nodes["z"]["value"]).sum(-1)
    torch.testing.assert_close(found.log_joint, 2 * plain.log_joint - prior)
    torch.testing.assert_close(found.log_posterior, plain.log_posterior)
    with handlers.weigh({"x": 0.0}):
        assert Particles(program.model, program.guide, (x,), {}, 4).scale == 1.0


class Window(nn.Module):
    """z ~ N(0, 1), x uniform within 1 of z: a particle further off cannot be."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Uniform(z - 1, z + 1, validate_args=False), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(self.slope * x, 1.0))


@pytest.mark.parametrize("estimator", [IWAE(8), DReG(8), MIWAE(1, 8), PIWAE(2, 4), Renyi(0.5, 8), VIMCO(8)], ids=name)
def test_a_particle_that_cannot_be_leaves_loss_and_gradient_finite(estimator):
    program, x = Window(), torch.linspace(-0.5, 0.5, 5, dtype=torch.float64)
    with pyro.validation_enabled(False):
        torch.manual_seed(0)
        value = estimator.loss(program.model, program.guide, x)
        torch.manual_seed(0)
        assert estimator.loss_and_grads(program.model, program.guide, x) == pytest.approx(value, rel=1e-12)
    assert math.isfinite(value)
    assert program.slope.grad.isfinite()


@pytest.mark.parametrize("chunk", [None, 2])
def test_a_program_that_is_held_fixed_has_a_loss(chunk):
    program = ProbabilisticPCA().requires_grad_(False)
    assert math.isfinite(IWAE(4, chunk=chunk).loss_and_grads(program.model, program.guide, torch.zeros(3, 2).double()))
