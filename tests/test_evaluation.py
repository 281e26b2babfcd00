"""Evaluation against exact evidence, and without a trace of its having run."""

import math
import subprocess
import sys

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import LinearGaussian, Mixture, TwoLatents
from pyro.distributions import Normal
from scipy import integrate, stats
from torch import nn
from torch.utils.data import IterableDataset

import pyro_vae
from pyro_vae import evaluation
from pyro_vae.data import InMemory


def test_log_likelihood_is_exact_at_the_exact_posterior(monkeypatch):
    monkeypatch.setattr(evaluation.batches, "VALUES_AT_ONCE", 3 * 4 * 2)  # several batches, the last one smaller
    monkeypatch.setattr(evaluation.summary, "PARTICLES_AT_ONCE", 4)  # several passes, the last one smaller
    program, x = LinearGaussian(), torch.randn(5, 3, dtype=torch.float64)
    got = evaluation.log_likelihood(program, x, num_particles=10)
    torch.testing.assert_close(got, program.evidence(x).detach(), rtol=0, atol=1e-10)


def test_log_likelihood_converges_off_the_posterior():
    """4 data, 20,000 particles, bias below 1e-3, standard error about 0.005; the tolerance is 5 of these, seed 0."""
    program, x = LinearGaussian(scale=1.2), torch.randn(4, 3, dtype=torch.float64)
    got = evaluation.log_likelihood(program, x, num_particles=20_000)
    torch.testing.assert_close(got, program.evidence(x).detach(), rtol=0, atol=0.025)


def test_log_likelihood_of_a_discrete_model():
    """Off by more than 0.05 nats with probability below 1e-6 at 20,000 particles, seed 0."""
    program, x = Mixture(), torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    got = evaluation.log_likelihood(program, x, num_particles=20_000)
    torch.testing.assert_close(got, program.evidence(x).detach(), rtol=0, atol=0.05)


def test_rate_distortion_and_elbo():
    """Means of 50,000 draws against closed forms; standard errors below 0.01, tolerance 0.05, seed 0."""
    program, x = LinearGaussian(scale=1.3), torch.randn(4, 3, dtype=torch.float64)
    summary = evaluation.summarize(program, x, 50_000)
    torch.testing.assert_close(summary.rate, program.rate(x).detach(), rtol=0, atol=0.05)
    torch.testing.assert_close(summary.distortion, program.distortion(x).detach(), rtol=0, atol=0.05)
    torch.testing.assert_close(summary.elbo, -(summary.rate + summary.distortion))
    assert (summary.elbo < program.evidence(x)).all()
    rate, distortion = evaluation.rate_distortion(program, x, 10)
    torch.testing.assert_close(evaluation.elbo(program, x, 10), -(rate + distortion))


def test_the_bound_rises_with_particles():
    program, x = LinearGaussian(scale=1.5), torch.randn(200, 3, dtype=torch.float64)
    bounds = [evaluation.log_likelihood(program, x, k).mean().item() for k in (1, 10, 1000)]
    assert bounds[0] < bounds[1] < bounds[2] < program.evidence(x).mean().item() + 0.02


def test_active_units_counts_what_the_data_move():
    class Program(nn.Module):
        def __init__(self):
            super().__init__()
            # Posterior means are x times these; x has variance 1, and 0.01 is the threshold.
            self.weight = nn.Parameter(torch.tensor([1.0, 0.11, 0.09, 0.0]))

        def model(self, x):
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", Normal(0.0, 1.0).expand([4]).to_event(1))
                pyro.sample("x", Normal(z[..., :1], 1.0).to_event(1), obs=x)

        def guide(self, x):
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", Normal(x * self.weight + 3.0, 1.0).to_event(1))

    x = torch.tensor([[-1.0], [1.0]]).repeat(50, 1)
    assert evaluation.active_units(Program(), x) == 2
    assert evaluation.active_units(Program(), x, threshold=0.001) == 3


@pytest.mark.parametrize(
    "call",
    [
        lambda program, x: evaluation.log_likelihood(program, x, 3),
        lambda program, x: evaluation.elbo(program, x),
        lambda program, x: evaluation.active_units(program, x),
        lambda program, x: evaluation.reconstruct(program, x),
        lambda program, x: evaluation.sample(program, 3, (8, 8)),
    ],
)
def test_everything_is_left_as_it_was(call):
    program = pyro_vae.build((8, 8), latent=2)
    program.posterior.net.layers.append(nn.Dropout(0.5))
    program.train()
    program.prior.eval()
    x = torch.rand(6, 8, 8).round()
    weights = {name: tensor.clone() for name, tensor in program.state_dict().items()}
    modes = [module.training for module in program.modules()]
    rng = torch.get_rng_state()
    first, second = call(program, x), call(program, x)
    assert torch.equal(torch.get_rng_state(), rng)
    assert [module.training for module in program.modules()] == modes
    assert all(torch.equal(weights[name], tensor) for name, tensor in program.state_dict().items())
    assert all(parameter.grad is None for parameter in program.parameters())
    first, second = (value if isinstance(value, tuple) else (value,) for value in (first, second))
    assert all(torch.as_tensor(a).equal(torch.as_tensor(b)) for a, b in zip(first, second, strict=True))


def test_hand_written_programs_of_two_latent_sites():
    program, x = TwoLatents(), torch.rand(10, 64).round()
    assert (evaluation.elbo(program, x, 500) < evaluation.log_likelihood(program, x, 500)).all()
    assert evaluation.posterior_means(program, x).shape == (10, 4 + 2)
    assert evaluation.reconstruct(program, x).shape == (10, 64)


def test_reconstructions_follow_the_data_and_samples_the_prior():
    """x = z + noise of 0.01, and a guide that knows z: reconstructions are the data, samples have the prior's moments
    (2,000 draws, false alarm 6e-5 at 4 standard errors, seed 0)."""

    class Program(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def model(self, x):
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", Normal(5.0, 1.0).expand([1]).to_event(1))
                pyro.sample("x", Normal(z, 0.01).to_event(1), obs=x)

        def guide(self, x):
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", Normal(x * self.weight, 0.01).to_event(1))

    x = torch.randn(50, 1)
    torch.testing.assert_close(evaluation.reconstruct(Program(), x), x, rtol=0, atol=0.06)
    means, draws = evaluation.sample(Program(), 2000, (1,), seed=0)
    for drawn in (means, draws):
        assert drawn.mean().item() == pytest.approx(5, abs=4 / 2000**0.5)
        assert drawn.std().item() == pytest.approx(1, abs=4 / 4000**0.5)


def test_latents_without_an_event_or_a_mean():
    assert evaluation.posterior_means(Mixture(), torch.ones(3, 2, dtype=torch.float64)).shape == (3, 1)
    assert evaluation.posterior_means(Mixture(), torch.ones(3, 2, dtype=torch.float64)).isfinite().all()


def test_bad_numbers_are_refused():
    vae, x = pyro_vae.build((8, 8), latent=2), torch.zeros(3, 8, 8)
    with pytest.raises(ValueError, match="num_particles: expected a positive number, got 0"):
        evaluation.log_likelihood(vae, x, 0)
    with pytest.raises(ValueError, match="number of samples"):
        evaluation.sample(vae, 0, (8, 8))
    with pytest.raises(ValueError, match=r"event shape \(8, 8\), got \(8, 9\)"):
        evaluation.elbo(vae, torch.zeros(3, 8, 9))


def test_streams_are_evaluated_whole():
    """In the batches of tensors, and so with their random numbers."""

    class Stream(IterableDataset):
        def __len__(self):
            return len(x)

        def __iter__(self):
            return iter(x)

    vae, x = pyro_vae.build((8, 8), latent=2), torch.rand(9, 8, 8).round()
    for particles in (1, 20):
        expected = evaluation.log_likelihood(vae, x, particles)
        assert torch.equal(evaluation.log_likelihood(vae, Stream(), particles), expected)


@pytest.mark.slow
def test_memory_does_not_follow_particles_or_data():
    """Peak memory of more particles, of more data, and of many batches of passes, in processes of their own."""
    script = """
import resource, sys, torch, pyro_vae
from pyro_vae import evaluation
vae = pyro_vae.build((784,), latent=10)
evaluation.log_likelihood(vae, torch.zeros(8, 784), 8)
evaluation.log_likelihood(vae, torch.zeros(int(sys.argv[1]), 784), int(sys.argv[2]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""

    def peak(*arguments):
        command = [sys.executable, "-c", script, *map(str, arguments)]
        return float(
            subprocess.run(command, check=True, capture_output=True, text=True, env={"OMP_NUM_THREADS": "1"}).stdout
        )

    base = peak(50, 50)
    assert peak(50, 5000) < base + 60
    assert peak(1000, 50) < base + 60
    assert peak(1000, 750) < base + 60


class TwoParts(nn.Module):
    """z ~ N(5, 1); a pair of columns at z and -z, and a column in {0, 1} that is 1 just if z > 5: two sites."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def model(self, x, *context):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", Normal(5.0, 1.0).expand([1]).to_event(1))
            z = pyro.deterministic("x.z", z, event_dim=1) * pyro.param("x.scale", self.weight)  # neither is data
            pyro.sample("x.a", Normal(torch.cat([z, -z], -1), 0.01).to_event(1), obs=x[..., :2])
            pyro.sample("x.b", dist.Bernoulli(logits=1e4 * (z - 5)).to_event(1), obs=x[..., 2:])

    def guide(self, x, *context):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", Normal(x[..., :1] * self.weight, 1e-4).to_event(1))


def test_sites_of_parts_are_joined():
    """The parts stand side by side, in order; the tolerance of a draw is 6 of its standard deviations, seed 0."""
    z = torch.tensor([[4.0], [4.5], [5.5], [7.0]])
    x = torch.cat([z, -z, (z > 5).float()], 1)
    torch.testing.assert_close(evaluation.reconstruct(TwoParts(), x), x, rtol=0, atol=1e-3)
    means, draws = evaluation.sample(TwoParts(), 50, (3,), seed=0)
    assert means.shape == draws.shape == (50, 3)
    torch.testing.assert_close(means[:, 0], -means[:, 1])
    torch.testing.assert_close(draws[:, :2], means[:, :2], rtol=0, atol=0.06)
    assert not torch.equal(draws[:, :2], means[:, :2])
    assert torch.equal(draws[:, 2], (means[:, 0] > 5).float())
    # Both sites count: two normal columns at their mean, and one that is certain.
    _, distortion = evaluation.rate_distortion(TwoParts(), x, 100)
    expected = -2 * Normal(0.0, 0.01).log_prob(torch.tensor(0.0)).expand(4)
    torch.testing.assert_close(distortion.float(), expected, rtol=0, atol=1e-3)


def test_sampling_needs_a_model_of_x_alone():
    assert evaluation.takes_x_alone(TwoParts())

    class Required(TwoParts):
        def model(self, x, y): ...

    class Optional(TwoParts):
        num_inputs = 2  # in training and evaluation it gets both

        def model(self, x, y=None):
            return super().model(x)

    assert evaluation.sample(Optional(), 2, (3,))[0].shape == (2, 3)
    with pytest.raises(ValueError, match=r"Required: expected a model of x alone, got model\(x, y\)"):
        evaluation.sample(Required(), 2, (3,))

    class Unnamed(TwoParts):
        def model(self, x):
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("data_x", Normal(x.new_zeros(3), 1.0).to_event(1), obs=x)

    with pytest.raises(ValueError, match=r"site .x., or sites .x.<part>., got .*data_x"):
        evaluation.sample(Unnamed(), 2, (3,))


def test_bits_per_dimension():
    """By hand: a log-likelihood of -12 log 2 over 2 x 3 dimensions is 2 bits each."""
    nats = torch.tensor([-12.0, 0.0, 6.0], dtype=torch.float64) * math.log(2)
    expected = torch.tensor([2.0, 0.0, -1.0], dtype=torch.float64)
    torch.testing.assert_close(evaluation.bits_per_dimension(nats, (2, 3)), expected)
    torch.testing.assert_close(evaluation.bits_per_dimension(nats, (2, 3), 32), expected + 5)
    torch.testing.assert_close(evaluation.bits_per_dimension(nats / 6, ()), expected)
    for shape, bins in (((0, 3), None), ((3,), 1)):
        with pytest.raises(ValueError, match=r"expected dimensions and at least 2 bins, got"):
            evaluation.bits_per_dimension(nats, shape, bins)


def test_bits_of_dequantized_data_bound_those_of_the_discrete():
    """For the uniform density the bits are log2(bins) exactly; for a Beta density they lie above those of the cells'
    probabilities, by the Jensen gap that quadrature gives.

    20,000 draws, within 4 standard errors: false alarm 6e-5, seed 0."""
    bins, n = 4, 20_000
    levels = torch.arange(n) % bins
    y = InMemory((levels / (bins - 1)).double()[:, None], dequantize=bins).frozen(0)[:]
    uniform = dist.Uniform(torch.zeros(1, dtype=torch.float64), 1.0).to_event(1)
    assert evaluation.bits_per_dimension(uniform.log_prob(y), (1,), bins).unique().tolist() == [2.0]
    a, b = 2.0, 3.0
    fn = dist.Beta(torch.tensor([a], dtype=torch.float64), b).to_event(1)
    bits = evaluation.bits_per_dimension(fn.log_prob(y), (1,), bins)
    exact = -np.log2(np.diff(stats.beta(a, b).cdf(np.arange(bins + 1) / bins))).mean()
    expected = 2 - integrate.quad(lambda v: stats.beta(a, b).logpdf(v) / math.log(2), 0, 1)[0]
    assert bits.mean().item() == pytest.approx(expected, abs=4 * bits.std().item() / n**0.5)
    assert bits.mean().item() > exact + 4 * bits.std().item() / n**0.5


def test_samples_take_global_latents_from_what_was_learned():
    vae = pyro_vae.build((2,), latent=2, prior="ARD()", likelihood="Gaussian(scale=0.001, net=MLP(hidden=[]))", size=9)
    with torch.no_grad():
        vae.prior.log_scale_loc.fill_(5.0)
        vae.prior.log_scale_scale.fill_(-9.0)
        vae.likelihood.net.layers[0].weight.copy_(torch.eye(2))
    for seed in range(3):  # under the prior of the scales, a draw's spread would be about 1
        _, draws = evaluation.sample(vae, 4000, (2,), seed=seed)
        torch.testing.assert_close(draws.std(0).log(), torch.full((2,), 5.0), atol=0.1, rtol=0)


def test_parameters_in_the_store_are_refused():
    """What `pyro.param` keeps there, evaluation would not see: it would be of the initial values."""

    class Stored(LinearGaussian):
        def guide(self, x):
            self.scale = pyro.param("scale", torch.tensor(0.1, dtype=torch.float64))
            super().guide(x)

    with pytest.raises(ValueError, match="param site 'scale' is no .* parameter of Stored"):
        evaluation.log_likelihood(Stored(), torch.randn(4, 3, dtype=torch.float64))
    assert not list(pyro.get_param_store())
