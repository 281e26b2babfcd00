"""The autoregressive likelihood: its order, its density against enumeration, and its draws against its density."""

import copy
import itertools
from functools import partial

import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from scipy.stats import chisquare
from sklearn.datasets import load_digits

from pyro_vae import VAE, expressions, networks, posteriors, priors
from pyro_vae.distributions import autoregressive
from pyro_vae.likelihoods import Bernoulli
from pyro_vae.likelihoods.autoregressive import Autoregressive
from pyro_vae.likelihoods.continuous import Gaussian
from pyro_vae.likelihoods.counts import Binomial, Poisson
from pyro_vae.likelihoods.discrete import Categorical
from pyro_vae.likelihoods.discretized import DiscretizedLogisticMixture
from pyro_vae.likelihoods.factorized import Factorized
from pyro_vae.networks.autoregressive import PixelCNN

CLASSES = partial(Categorical, num_classes=3)
MIXTURE = partial(DiscretizedLogisticMixture, components=2, bins=3)
TRIALS = partial(Binomial, total_count=2)
PIXELS = {  # name: (pixel likelihood, all its values, what the network sees of them)
    "Bernoulli": (Bernoulli, [0.0, 1.0], [-1.0, 1.0]),
    "Categorical": (CLASSES, [0.0, 1.0, 2.0], [-1.0, 0.0, 1.0]),
    "mixture": (MIXTURE, [0.0, 0.5, 1.0], [-1.0, 0.0, 1.0]),
    "Binomial": (TRIALS, [0.0, 1.0, 2.0], [-1.0, 0.0, 1.0]),
}


class Certain(Factorized):
    """A pixel likelihood whose draws are its parameters, up to a sigmoid."""

    support = dist.constraints.real

    def distribution(self, logits):
        return dist.Delta(torch.sigmoid(logits))


def make(event_shape, pixel=Bernoulli, blocks=2, sharpen=3.0):
    """A likelihood with strong dependence between values: an untrained one would hide errors of order."""
    net = networks.MLP(2, 4 * event_shape[1] * event_shape[2], hidden=(5,))
    likelihood = Autoregressive(net, event_shape, pixel, channels=4, blocks=blocks, kernel_size=3).double()
    with torch.no_grad():
        net.layers[-1].weight *= 3
        for head in likelihood.pixel_cnn.heads:
            head[-1].weight *= 10 * sharpen
        likelihood.pixel_cnn.output_bias.normal_()
    return likelihood


def latents(*leading):
    return torch.randn(*leading, 2, dtype=torch.float64)


def all_images(event_shape, values=(0.0, 1.0)):
    images = list(itertools.product(values, repeat=torch.Size(event_shape).numel()))
    return torch.tensor(images, dtype=torch.float64).reshape(-1, *event_shape)


def order(event_shape):
    """Each value's place in the order: positions in raster order, then channels."""
    channels, height, width = event_shape
    return torch.arange(height * width * channels).reshape(height, width, channels).permute(2, 0, 1).flatten()


def dependence(event_shape, **options):
    """Whether the parameters of value i (rows) depend on value j (columns), both in memory order."""
    likelihood = make(event_shape, **options)
    context = torch.randn(4, *event_shape[1:], dtype=torch.float64)
    x = torch.randn(event_shape, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: likelihood.pixel_cnn(x, context)[0], x)
    return jacobian.reshape(x.numel(), x.numel()) != 0


@pytest.mark.parametrize("event_shape", [(1, 3, 4), (3, 3, 3), (2, 1, 4), (2, 3, 1)])
def test_parameters_depend_on_all_values_before_and_on_no_other(event_shape):
    place = order(event_shape)
    assert torch.equal(dependence(event_shape, blocks=3), place[None, :] < place[:, None])


def test_the_receptive_field_is_what_the_docstring_says():
    reach, size = 2, 9  # R of one block of kernels of width 3
    seen = dependence((1, size, size), blocks=1).reshape(size, size, size, size)[5, 5]
    up, right = 5 - torch.arange(size)[:, None], torch.arange(size)[None, :] - 5
    above = (up > 0) & (up <= reach + 1) & (right.abs() <= reach)
    assert torch.equal(seen, above | ((up == 0) & (right < 0) & (-right <= reach + 1)))


@pytest.mark.parametrize("event_shape", [(1, 2, 3), (3, 1, 2), (2, 3, 1)])
def test_probabilities_of_all_images_sum_to_one(event_shape):
    fn = make(event_shape)(latents(5))
    log_prob = fn.log_prob(all_images(event_shape)[:, None])
    assert log_prob.shape == (64, 5)
    torch.testing.assert_close(log_prob.logsumexp(0), torch.zeros(5).double(), atol=1e-10, rtol=0)
    assert (log_prob.exp().std(1) > 1e-6).any(), "the images' probabilities do not depend on z"


@pytest.mark.parametrize("name", PIXELS)
def test_pixel_likelihoods(name):
    pixel, values, inputs = PIXELS[name]
    likelihood = make((2, 1, 2), pixel)
    fn, seen = likelihood(latents()), []
    likelihood.pixel_cnn.first_above.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    images = all_images((2, 1, 2), values)
    assert fn.log_prob(images).logsumexp(0).item() == pytest.approx(0, abs=1e-10)
    torch.testing.assert_close(seen[0].unique(), torch.tensor(inputs, dtype=torch.float64), atol=1e-12, rtol=0)
    draws = fn.sample((50,))
    assert fn.support.check(draws).all()
    assert not fn.support.check(draws + 2.3).any()
    assert draws.dtype == torch.float64


def test_counts_and_reals():
    for pixel, value, seen_as in ((Poisson, 99.0, 4.605170186), (partial(Gaussian, scale="global"), 0.75, 0.5)):
        likelihood, seen = make((1, 2, 2), pixel, sharpen=0.1), []
        likelihood.pixel_cnn.first_above.register_forward_pre_hook(lambda _, a, seen=seen: seen.append(a[0]))
        fn = likelihood(latents(3))
        assert fn.log_prob(torch.full((1, 2, 2), value).double()).isfinite().all()
        torch.testing.assert_close(seen[0], torch.full((3, 1, 2, 2), seen_as).double())
        assert fn.support.check(fn.sample()).all()


@pytest.mark.parametrize("event_shape", [(1, 2, 3), (3, 1, 2), (2, 2, 1)])
def test_draws_have_the_density(event_shape):
    """Counts of 20,000 draws against all probabilities, those expected under 5 times in one; false alarms: 1e-4."""
    fn = make(event_shape)(latents())
    images = all_images(event_shape)
    weights = 2 ** torch.arange(len(images).bit_length() - 1).flip(0)
    counts = torch.bincount((fn.sample((20_000,)).flatten(1).long() * weights).sum(1), minlength=len(images))
    expected = 20_000 * fn.log_prob(images).exp()
    rare = expected < 5
    pooled = [torch.cat([c[~rare], c[rare].sum()[None]]).double() for c in (counts, expected)]
    assert len(pooled[0]) > 5
    observed, predicted = (p.detach()[p.detach() > 0] if rare.sum() == 0 else p.detach() for p in pooled)
    assert chisquare(observed, predicted).pvalue > 1e-4


@pytest.mark.parametrize("event_shape", [(1, 5, 6), (3, 4, 3), (2, 6, 1)])
def test_a_draw_follows_the_parameters_of_one_pass(event_shape):
    """Where values are certain given those before, the draw is the one image that predicts itself."""
    fn = make(event_shape, Certain)(latents(3))
    draw = fn.sample()
    assert draw.std(0).max() > 1e-2
    torch.testing.assert_close(draw, fn.given(draw).mean.detach(), atol=1e-12, rtol=0)


def test_mean_is_unbiased_and_varies_less_than_a_draw():
    """20,000 estimates against enumeration within 4 standard errors, seed 0; false alarms: 6 * 6.3e-5 = 4e-4."""
    fn = make((1, 2, 3))(latents())
    images = all_images((1, 2, 3))
    exact = (fn.log_prob(images).exp()[:, None, None, None] * images).sum(0).detach()
    estimates = fn.expand(torch.Size([20_000])).mean
    error = (estimates.mean(0) - exact).abs() / (estimates.std(0) / 20_000**0.5 + 1e-9)  # the first does not vary
    assert error.max() < 4
    assert (estimates.var(0) < exact * (1 - exact)).all()


def test_leading_dimensions_are_a_batch():
    likelihood = make((2, 2, 3))
    z, x = latents(3, 5), torch.rand(5, 2, 2, 3, dtype=torch.float64).round()
    fn = likelihood(z)
    assert fn.batch_shape == (3, 5)
    assert fn.event_shape == likelihood.event_shape == (2, 2, 3)
    assert fn.sample((7,)).shape == (7, 3, 5, 2, 2, 3)
    assert likelihood(z[0, 0]).sample().shape == (2, 2, 3)
    one_by_one = [likelihood(z[k, b]).log_prob(x[b]) for k in range(3) for b in range(5)]
    torch.testing.assert_close(fn.log_prob(x), torch.stack(one_by_one).reshape(3, 5))
    torch.testing.assert_close(fn.expand([2, 3, 5]).log_prob(x), fn.log_prob(x).expand(2, 3, 5))


def test_draws_of_one_batch_differ_and_have_their_own_latent():
    """400 draws at each of two distant latents, within 5 standard errors of each one's own mean: false alarms 5e-6."""
    likelihood = make((1, 2, 2))
    fn = likelihood(torch.tensor([[-9.0, 3.0], [9.0, -3.0]], dtype=torch.float64))
    images = all_images((1, 2, 2))
    exact = torch.einsum("nb,ncij->bcij", fn.log_prob(images[:, None]).exp(), images).detach()
    draws = fn.sample((400,))
    assert (exact[0] - exact[1]).abs().max() > 0.4
    assert ((draws.mean(0) - exact).abs() <= 5 * (exact * (1 - exact) / 400).sqrt() + 1e-6).all()


def test_values_outside_the_support_raise():
    fn = make((1, 2, 2), CLASSES)(latents())
    with pytest.raises(ValueError, match="support"):
        fn.log_prob(torch.full((1, 2, 2), 3.0).double())


def test_a_gradient_reaches_every_parameter():
    likelihood = make((3, 4, 4), MIXTURE)
    fn = likelihood(latents(16))
    fn.log_prob(fn.sample()).sum().backward()
    assert not [name for name, p in likelihood.named_parameters() if not (p.grad != 0).any()]
    assert not fn.sample().requires_grad
    assert not fn.has_rsample


def test_state_dtype_repr():
    likelihood, other = make((2, 3, 3)), make((2, 3, 3))
    z = latents(5)
    value = likelihood(z).sample()
    assert not torch.equal(likelihood(z).log_prob(value), other(z).log_prob(value))
    other.load_state_dict(likelihood.state_dict())
    assert torch.equal(likelihood(z).log_prob(value), other(z).log_prob(value))
    single = copy.deepcopy(likelihood).float()(z.float())
    assert single.sample().dtype == single.mean.dtype == torch.float32
    exact = likelihood(z).log_prob(value)
    torch.testing.assert_close(single.log_prob(value.float()).double(), exact, rtol=1e-5, atol=0)
    assert "Autoregressive(\n  event_shape=(2, 3, 3)" in repr(likelihood)


def test_expression():
    likelihood = Autoregressive(networks.MLP(2, 8 * 9), (1, 3, 3), CLASSES, channels=8)
    written = expressions.write(likelihood, "likelihood")
    assert "Autoregressive(net=MLP(in_features=2, out_features=72), event_shape=(1, 3, 3), pixel=" in written
    assert written.endswith("Categorical(num_classes=3), channels=8)")


@pytest.mark.parametrize("depth", [1, 4, 30])
def test_features_neither_vanish_nor_blow_up_with_depth(depth):
    net = PixelCNN((1, 12, 12), 1, channels=16, blocks=depth)
    x, context = 2 * torch.rand(8, 1, 12, 12).round() - 1, torch.randn(8, 16, 12, 12)
    features = net.left_of(x, net.above(x, context))
    assert 0.3 < features.std() < 0.3 + depth
    assert 0.01 < net(x, context).std() < 0.5 + 0.1 * depth


def test_starts_at_the_mean():
    likelihood = Autoregressive(networks.MLP(2, 16 * 9), (3, 3, 3), MIXTURE).double()
    mean = torch.rand(3, 3, 3, dtype=torch.float64)
    likelihood.start_at(mean)
    locations = likelihood.pixel_cnn.output_bias[:2].detach() + 0.5
    torch.testing.assert_close(locations.mean(0), mean)

    real = Autoregressive(networks.MLP(2, 16 * 9), (3, 3, 3), Gaussian).double()
    with torch.no_grad():
        real.start_at(mean)
        real.pixel_cnn.output_bias[1] = torch.log(mean + 1)
        for head in real.pixel_cnn.heads:
            head[-1].weight.zero_()
    start = real(torch.zeros(2, dtype=torch.float64)).given(mean)
    torch.testing.assert_close(start.mean.detach(), mean)
    torch.testing.assert_close(start.variance.detach(), mean + 1)

    binary = Autoregressive(networks.MLP(2, 16 * 9), (1, 3, 3)).double()
    wanted = torch.tensor([[0.1, 0.9, 0.5], [0.2, 0.8, 0.4], [0.0, 0.3, 1.0]], dtype=torch.float64)[None]
    binary.start_at(wanted)
    start = binary(torch.zeros(2, dtype=torch.float64)).given(wanted.round()).mean
    torch.testing.assert_close(start.detach(), wanted, atol=0.1, rtol=0)


def test_trains_in_a_vae():
    x = torch.tensor(load_digits().images > 8, dtype=torch.float32)[:, None]
    likelihood = Autoregressive(networks.MLP(4, 8 * 64, hidden=(32,)), (1, 8, 8), channels=8)
    likelihood.start_at(x.mean(0))
    posterior = posteriors.DiagonalNormal(networks.MLP((1, 8, 8), 8, hidden=(32,)), 4)
    vae = VAE(priors.StandardNormal(4), likelihood, posterior)
    optimizer, losses = torch.optim.Adam(vae.parameters(), lr=5e-3), []
    for _ in range(40):
        loss = Trace_ELBO().differentiable_loss(vae.model, vae.guide, x[torch.randint(len(x), (64,))]) / 64
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < sum(losses[:5]) / 5 - 2  # nats


def test_progress_bar(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    fn = make((1, 3, 2))(latents())
    fn.sample()
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(autoregressive, "_PATIENCE", 0.0)
    assert fn.sample().shape == (1, 3, 2)
    out, err = capsys.readouterr()
    assert "sampling" in err
    assert out == ""


def test_bad_sizes_raise():
    net = networks.MLP(2, 7)
    with pytest.raises(ValueError, match=r"expected 144 values .* got shape \(5, 7\)"):
        Autoregressive(net, (1, 3, 3))(torch.zeros(5, 2))
    with pytest.raises(ValueError, match=r"expected an event shape \(C, H, W\)"):
        Autoregressive(net, (28, 28))
    with pytest.raises(ValueError, match="odd kernel_size of at least 3, got 4"):
        Autoregressive(net, (1, 3, 3), kernel_size=4)
    with pytest.raises(ValueError, match="blocks=0"):
        Autoregressive(net, (1, 3, 3), blocks=0)
    with pytest.raises(ValueError, match=r"expected images \('\*', 1, 3, 3\)"):
        PixelCNN((1, 3, 3), 1)(torch.zeros(1, 3, 4), torch.zeros(16, 3, 4))
    assert Autoregressive(net, (3, 4, 5)).num_outputs == 16 * 4 * 5
