"""The VAE is the textbook's, and plain Pyro: poutine, SVI, Predictive and NUTS work on it."""

import copy

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from torch import nn
from torch.nn import functional as F

import pyro_vae
from pyro_vae import VAE, likelihoods, networks, posteriors, priors


def textbook(dtype=torch.float64):
    """784-128-20 with ReLU: mean and log-variance heads, sigmoid output."""
    return VAE(
        prior=priors.StandardNormal(20),
        likelihood=likelihoods.Bernoulli(networks.MLP(20, 784, hidden=(128,)), (1, 28, 28)),
        posterior=posteriors.DiagonalNormal(networks.MLP(784, 2 * 20, hidden=(128,)), 20),
    ).to(dtype)


class HandWritten(nn.Module):
    """The loop of the textbook, with the same weights."""

    def __init__(self, vae):
        super().__init__()
        first, _, heads = copy.deepcopy(vae.posterior.net.layers)
        self.hidden, self.decoder_hidden = first, copy.deepcopy(vae.likelihood.net.layers[0])
        self.output = copy.deepcopy(vae.likelihood.net.layers[2])
        self.mean, self.log_variance = nn.Linear(128, 20).double(), nn.Linear(128, 20).double()
        with torch.no_grad():
            for layer, rows in ((self.mean, slice(0, 20)), (self.log_variance, slice(20, 40))):
                layer.weight.copy_(heads.weight[rows])
                layer.bias.copy_(heads.bias[rows])

    def forward(self, x, eps):
        h = torch.relu(self.hidden(x.flatten(1)))
        mu, log_variance = self.mean(h), self.log_variance(h)
        z = mu + eps * torch.exp(0.5 * log_variance)
        probabilities = torch.sigmoid(self.output(torch.relu(self.decoder_hidden(z))))
        bce = F.binary_cross_entropy(probabilities, x.flatten(1), reduction="sum")
        kl = -0.5 * torch.sum(1 + log_variance - mu**2 - log_variance.exp())
        return bce, kl, z, mu, log_variance


@pytest.fixture
def pair():
    vae = textbook()
    x = (torch.rand(16, 1, 28, 28, dtype=torch.float64) < 0.3).double()
    torch.manual_seed(1)
    eps = torch.empty(16, 20, dtype=torch.float64).normal_()
    return vae, HandWritten(vae), x, eps


def gradients(vae, written):
    heads = (
        torch.cat([getattr(written.mean, p).grad, getattr(written.log_variance, p).grad]) for p in ("weight", "bias")
    )
    encoder = [written.hidden.weight.grad, written.hidden.bias.grad, *heads]
    decoder = [
        written.decoder_hidden.weight.grad,
        written.decoder_hidden.bias.grad,
        *(p.grad for p in written.output.parameters()),
    ]
    ours = [p.grad for p in (*vae.posterior.parameters(), *vae.likelihood.parameters())]
    return zip(ours, (*encoder, *decoder), strict=True)


def test_mean_field_loss_and_gradients_are_the_textbooks(pair):
    vae, written, x, eps = pair
    torch.manual_seed(1)
    loss = TraceMeanField_ELBO().differentiable_loss(vae.model, vae.guide, x)
    loss.backward()
    bce, kl, *_ = written(x, eps)
    (bce + kl).backward()
    assert loss.item() == pytest.approx((bce + kl).item(), rel=0, abs=1e-10)
    for ours, theirs in gradients(vae, written):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_trace_elbo_is_the_single_sample_estimate(pair):
    vae, written, x, eps = pair
    torch.manual_seed(1)
    loss = Trace_ELBO().differentiable_loss(vae.model, vae.guide, x)
    loss.backward()
    bce, _, z, mu, log_variance = written(x, eps)
    log_q = torch.distributions.Normal(mu, torch.exp(0.5 * log_variance)).log_prob(z).sum()
    total = bce + log_q - torch.distributions.Normal(0.0, 1.0).log_prob(z).sum()
    total.backward()
    assert loss.item() == pytest.approx(total.item(), rel=0, abs=1e-9)
    for ours, theirs in gradients(vae, written):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def test_trace_elbo_agrees_in_expectation(pair):
    """Means of 500 estimates of each; false alarm 6e-5 at 4 standard errors, seed 0."""
    vae, _, x, _ = pair
    torch.manual_seed(0)
    with torch.no_grad():
        trace, mean_field = (
            torch.tensor([elbo.loss(vae.model, vae.guide, x[:4]) for _ in range(500)], dtype=torch.float64)
            for elbo in (Trace_ELBO(), TraceMeanField_ELBO())
        )
    error = (trace.var() / 500 + mean_field.var() / 500).sqrt()
    assert abs(trace.mean() - mean_field.mean()) < 4 * error
    assert error < 1.0  # or the check could not fail


@pytest.mark.parametrize("estimator", [Trace_ELBO, TraceMeanField_ELBO])
@pytest.mark.usefixtures("cleared_store")
def test_svi_trains_every_parameter_of_its_own_program_only(estimator):
    first, second = textbook(), textbook()
    clone = copy.deepcopy(first)
    x = (torch.rand(8, 1, 28, 28, dtype=torch.float64) < 0.3).double()
    for vae, others in ((first, (second, clone)), (second, (first, clone)), (clone, (first, second))):
        kept = [[p.clone() for p in other.parameters()] for other in others]
        before = [p.clone() for p in vae.parameters()]
        svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), loss=estimator())
        for _ in range(3):
            svi.step(x)
        # A weight of a ReLU that is dead on all x has no gradient; whole tensors must move.
        assert all((a != b).any() for a, b in zip(before, vae.parameters(), strict=True))
        for other, parameters in zip(others, kept, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(parameters, other.parameters(), strict=True))


@pytest.mark.usefixtures("cleared_store")
def test_svi_trains_a_program_that_comes_after_a_deleted_one():
    x = torch.ones(4, 1, 28, 28, dtype=torch.float64)
    for _ in range(5):  # each may get the memory, and so the identity, of the last
        vae = textbook()
        before = [p.clone() for p in vae.parameters()]
        SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), loss=Trace_ELBO()).step(x)
        assert all((a != b).any() for a, b in zip(before, vae.parameters(), strict=True))
        del vae


def test_handlers_see_the_sites():
    vae = textbook()
    x = torch.ones(3, 1, 28, 28, dtype=torch.float64)
    trace = poutine.trace(vae.model).get_trace(x)
    assert [name for name, site in trace.nodes.items() if site["type"] == "sample"] == ["data", "z", "x"]
    assert not [site for site in trace.nodes.values() if site["type"] == "param"]
    z = torch.full((3, 20), 0.5, dtype=torch.float64)
    conditioned = poutine.trace(poutine.condition(vae.model, {"z": z})).get_trace(x)
    assert conditioned.nodes["z"]["is_observed"]
    assert torch.equal(conditioned.nodes["z"]["value"], z)


def test_predictive_draws_from_model_and_guide():
    vae = textbook()
    x = torch.ones(3, 1, 28, 28, dtype=torch.float64)
    draws = Predictive(poutine.uncondition(vae.model), guide=vae.guide, num_samples=5)(x)
    assert draws["x"].shape == (5, 3, 1, 28, 28)
    assert Predictive(vae.guide, num_samples=5, parallel=True)(x)["z"].shape == (5, 3, 20)


def test_nuts_runs_on_the_model():
    vae = pyro_vae.build((2, 2), latent=1).double()
    for parameter in vae.parameters():
        parameter.requires_grad_(False)
    mcmc = MCMC(NUTS(vae.model), num_samples=20, warmup_steps=20, disable_progbar=True)
    mcmc.run(torch.ones(1, 2, 2, dtype=torch.float64))
    assert mcmc.get_samples()["z"].shape == (20, 1, 1)


def test_wrong_sizes_name_expected_and_got():
    with pytest.raises(ValueError, match="expected 784 values .* got shape"):
        likelihoods.Bernoulli(networks.MLP(20, 100), (1, 28, 28))(torch.zeros(3, 20))
    with pytest.raises(ValueError, match=r"expected 40 values .* got shape \(3, 41\)"):
        posteriors.DiagonalNormal(networks.MLP(784, 41), 20)(torch.zeros(3, 784))
    with pytest.raises(ValueError, match="expected an input"):
        networks.MLP(784, 40)(torch.zeros(2, 3, 28, 28))
    with pytest.raises(ValueError, match="got 'tanhh'"):
        networks.MLP(784, 40, activation="tanhh")
    with pytest.raises(ValueError, match="latent > 0"):
        priors.StandardNormal(0)
