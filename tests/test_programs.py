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


def build(**parts):
    return pyro_vae.build((4,), latent=4, network="MLP(hidden=[8])", **parts).double()


@pytest.mark.parametrize(("parts", "message"), [
    ({"posterior": "VonMisesFisher()"},
     "StandardNormal over real numbers and VonMisesFisher over the unit sphere; with StandardNormal fit the posteriors "
     "DiagonalNormal, .*, with VonMisesFisher the priors UniformSphere, VampPrior"),
    ({"prior": "OneHotCategorical()", "posterior": "RelaxedOneHotCategorical()"},
     "over one-hot vectors .* over simplices; .* the priors RelaxedOneHotCategorical, VampPrior"),
    ({"prior": "Bernoulli(3)", "posterior": "Bernoulli()"}, "Bernoulli of 3 and Bernoulli of 4 latent dimensions"),
    ({"prior": "OneHotCategorical(classes=2)", "posterior": "OneHotCategorical()"}, "got 2 in the prior, 4 in the"),
    ({"prior": "ARD()"}, r"ARD has a global latent, and needs the number of data: size=len\(train\)"),
    ({"prior": "VampPrior()", "posterior": "SemiAmortized(base=DiagonalNormal())"}, "VampPrior .* SemiAmortized"),
    ({"prior": "ARD()", "posterior": "SemiAmortized(base=DiagonalNormal())", "size": 9}, "without global latents"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_when_the_program_is_built(parts, message):
    with pytest.raises(ValueError, match=message):
        build(**parts)


def test_a_component_that_does_not_say_its_support_is_not_refused():
    class Own(nn.Module):
        def forward(self):
            return pyro.distributions.Normal(torch.zeros(4), 1.0).to_event(1)

    VAE(Own(), build().likelihood, posteriors.VonMisesFisher(networks.MLP(4, 5), 4))


def test_a_global_latent_stands_outside_a_plate_of_the_whole_size():
    vae = build(prior="ARD()", size=100)
    x = torch.ones(5, 4, dtype=torch.float64)
    guide = poutine.trace(vae.guide).get_trace(x)
    model = poutine.trace(poutine.replay(vae.model, trace=guide)).get_trace(x)
    for trace in (model, guide):
        assert trace.nodes["z_scale"]["cond_indep_stack"] == ()
        assert trace.nodes["z"]["scale"] == 20
    # The loss is that of 100 data, with the global site once.
    trace_sum = model.log_prob_sum() - guide.log_prob_sum()
    per_datum = sum(model.nodes[s]["fn"].log_prob(model.nodes[s]["value"]).sum() for s in ("z", "x"))
    per_datum -= guide.nodes["z"]["fn"].log_prob(guide.nodes["z"]["value"]).sum()
    once = model.nodes["z_scale"]["log_prob_sum"] - guide.nodes["z_scale"]["log_prob_sum"]
    torch.testing.assert_close(trace_sum, 20 * per_datum + once)


def test_a_larger_batch_than_the_size_is_no_subsample():
    trace = poutine.trace(build(prior="ARD()", size=3).model).get_trace(torch.ones(5, 4, dtype=torch.float64))
    assert trace.nodes["z"]["scale"] == 1


def test_an_exposure_multiplies_the_rate():
    vae = build(likelihood="Poisson(exposure=True)")
    x, exposure = torch.ones(5, 4, dtype=torch.float64), torch.arange(1.0, 6, dtype=torch.float64)
    assert vae.num_inputs == 2
    z = torch.zeros(3, 5, 4, dtype=torch.float64)
    rate = vae.likelihood(z).mean
    torch.testing.assert_close(vae.likelihood(z, exposure).mean, rate * exposure[:, None])
    trace = poutine.trace(vae.model).get_trace(x, exposure)
    assert trace.nodes["x"]["fn"].event_shape == (4,)
    with pytest.raises(ValueError, match="exposure: expected values above 0, got 0"):
        vae.likelihood(z, exposure - 1)


def test_a_flow_of_zuko_is_a_prior_and_a_posterior_as_it_is():
    from pyro_vae.distributions import import_zuko

    flows = import_zuko().flows

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.flow = flows.MAF(2, 4)

        def forward(self, x):
            return self.flow(x)

    vae = VAE(flows.NSF(2), likelihoods.Bernoulli(networks.MLP(2, 4), (4,)), Encoder())
    loss = Trace_ELBO(num_particles=3, vectorize_particles=True).differentiable_loss(
        vae.model, vae.guide, torch.ones(5, 4)
    )
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None for p in vae.parameters())
    assert poutine.trace(vae.model).get_trace(torch.ones(5, 4)).nodes["z"]["value"].shape == (5, 2)


def test_a_vamp_prior_is_the_average_of_the_programs_own_posterior():
    vae = build(prior="VampPrior(components=3)")
    assert vae.prior.posterior is vae.posterior
    z = torch.randn(6, 4, dtype=torch.float64)
    each = torch.stack([vae.posterior(u).log_prob(z) for u in vae.prior.inputs])
    torch.testing.assert_close(vae.prior().log_prob(z), each.logsumexp(0) - torch.tensor(3.0).double().log())
    data = torch.rand(7, 4, dtype=torch.float64)
    fixed = priors.VampPrior(vae.posterior, data)
    assert fixed.components == 7
    assert not any(name == "inputs" for name, _ in fixed.named_parameters())
    with pytest.raises(ValueError, match="expected pseudo_inputs"):
        priors.VampPrior(vae.posterior)


def test_semi_amortized_steps_climb_the_elbo():
    """Gradient steps on one datum's variational parameters raise its ELBO, with and without gradients around them."""
    torch.manual_seed(0)
    base = build()
    x = (torch.rand(20, 4) > 0.5).double()
    elbos = []
    for steps in (1, 30):
        posterior = posteriors.SemiAmortized(base.posterior, base.likelihood, base.prior, steps=steps, lr=0.1)
        vae = VAE(base.prior, base.likelihood, posterior)
        with torch.no_grad():
            elbos.append(-Trace_ELBO(num_particles=2000, vectorize_particles=True).loss(vae.model, vae.guide, x) / 20)
    assert elbos[1] > elbos[0] + 0.1
    vae.posterior(x).rsample().sum().backward()
    assert all(p.grad is not None for p in base.posterior.parameters())
    with pytest.raises(ValueError, match="second derivatives, got Mixture"):
        posteriors.SemiAmortized(posteriors.Mixture(networks.MLP(4, 27), 4), base.likelihood, base.prior)
    with pytest.raises(ValueError, match="without exposure"):
        build(posterior="SemiAmortized(base=DiagonalNormal())", likelihood="Poisson(exposure=True)")
    with pytest.raises(ValueError, match="reparameterized draws"):
        posteriors.SemiAmortized(posteriors.Bernoulli(networks.MLP(4, 4), 4), base.likelihood, base.prior)(x.float())


@pytest.mark.parametrize("prior", ["GaussianMixture()", "VampPrior(components=3)", "Laplace()", "Flow()"])
def test_nuts_runs_under_other_priors(prior):
    vae = pyro_vae.build((4,), latent=2, network="MLP(hidden=[8])", prior=prior)
    for parameter in vae.parameters():
        parameter.requires_grad_(False)
    mcmc = MCMC(NUTS(vae.model, max_tree_depth=3), num_samples=3, warmup_steps=2, disable_progbar=True)
    mcmc.run(torch.ones(1, 4))
    assert mcmc.get_samples()["z"].shape == (3, 1, 2)
