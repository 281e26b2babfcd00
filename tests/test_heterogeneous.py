"""Tables of mixed columns: the joint distribution of their parts, the likelihood, and training on real tables."""

import copy
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from scipy import stats
from sklearn.datasets import load_diabetes, load_wine
from sklearn.decomposition import FactorAnalysis
from torch import nn
from torch.distributions import constraints

from pyro_vae import VAE, data, evaluation, expressions, fit, networks, posteriors, priors
from pyro_vae.distributions.joint import Joint
from pyro_vae.likelihoods import Categorical, Gaussian, Poisson
from pyro_vae.likelihoods.heterogeneous import Heterogeneous
from pyro_vae.networks.standardized import Standardized

PARTS = {"sex": partial(Categorical, num_classes=3), ("height", "weight"): Gaussian, "visits": Poisson}
LEADING = [(), (5,), (3, 5)]


def table(parts=PARTS, num_outputs=3 + 2 * 2 + 1):
    return Heterogeneous(networks.MLP(2, num_outputs, hidden=(6,)), parts).double()


def latents(*leading):
    return torch.randn(*leading, 2, dtype=torch.float64)


def independent(**parts):
    return {name: part.to_event(1) for name, part in parts.items()}


LOGITS = torch.tensor([[[0.1, -1.0, 0.7]], [[0.0, 0.3, -0.2]]], dtype=torch.float64)
LOC, SCALE, RATE = (torch.tensor(v, dtype=torch.float64) for v in ([0.3, -2.0], [1.5, 0.2], [2.5]))
VALUES = torch.tensor([[2.0, 0.1, -2.1, 4.0], [1.0, -1.0, -1.8, 0.0]], dtype=torch.float64)


def mixed():
    """Three parts, of one batch shape only when broadcast."""
    return Joint(independent(a=dist.Categorical(logits=LOGITS), b=dist.Normal(LOC, SCALE), c=dist.Poisson(RATE)))


def test_joint_log_prob_is_the_sum_over_parts():
    """Against scipy, column by column; the parameters differ, so that no two columns can be exchanged."""
    probs = LOGITS[:, 0].softmax(-1).numpy()
    a, b1, b2, c = VALUES.numpy().T
    expected = np.log(probs[[0, 1], a.astype(int)]) + stats.norm(0.3, 1.5).logpdf(b1)
    expected = expected + stats.norm(-2.0, 0.2).logpdf(b2) + stats.poisson(2.5).logpmf(c)
    np.testing.assert_allclose(mixed().log_prob(VALUES).numpy(), expected, rtol=1e-12)


def test_joint_samples_have_the_moments_of_the_parts():
    """Within 4 standard errors of the exact mean; 8 columns, so one false alarm in 2,000 seeds."""
    samples = mixed().sample((20_000,))
    assert samples.shape == (20_000, 2, 4)
    assert samples.dtype == torch.float64
    means = mixed().mean
    probs = torch.tensor([[0.1, -1.0, 0.7], [0.0, 0.3, -0.2]]).double().softmax(-1)
    assert means[:, 0].isnan().all()  # of nominal categories there is no mean, but of their codes there is
    exact = torch.cat([probs @ torch.arange(3.0).double()[:, None], means[:, 1:]], -1)
    torch.testing.assert_close(exact[:, 1:], torch.tensor([[0.3, -2.0, 2.5]] * 2).double())
    error = (samples.mean(0) - exact) / (samples.std(0) / 20_000**0.5)
    assert error.abs().max() < 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_joint_samples_are_floats_of_the_parameters_dtype(dtype):
    codes = dist.Categorical(logits=torch.zeros(5, 2, 3, dtype=dtype)).to_event(1)
    assert Joint({"a": codes, "b": codes}).sample().dtype == dtype
    assert Joint({"a": codes, "b": dist.Normal(torch.zeros(1, dtype=dtype), 1).to_event(1)}).sample().dtype == dtype


def test_joint_rsample_where_all_parts_have_it():
    loc = torch.zeros(2, requires_grad=True)
    smooth = Joint(independent(a=dist.Normal(loc, 1.0), b=dist.Gamma(loc[:1] + 2, 1.0)))
    assert smooth.has_rsample
    draws = smooth.rsample((5,))
    assert draws.shape == (5, 3)
    draws[:, 1].sum().backward()
    assert loc.grad.tolist() == [0, 5]
    assert not mixed().has_rsample
    assert not smooth.sample().requires_grad
    with pytest.raises(NotImplementedError):
        mixed().rsample()


def test_joint_support_is_that_of_each_part():
    joint = mixed()
    assert joint.support.check(VALUES).tolist() == [True, True]
    for column, wrong in ((0, 3.0), (0, 0.5), (3, -1.0), (3, 1.5)):
        values = VALUES.clone()
        values[1, column] = wrong
        assert joint.support.check(values).tolist() == [True, False]
        with pyro.validation_enabled(), pytest.raises(ValueError, match="support"):
            mixed().log_prob(values)
    # A constraint of a whole part gives one truth value for it.
    simplex = Joint({"share": dist.Dirichlet(torch.ones(3)), **independent(a=dist.Normal(torch.zeros(1), 1.0))})
    assert simplex.support.check(torch.tensor([[0.2, 0.3, 0.5, 9.0], [0.2, 0.3, 0.6, 9.0]])).tolist() == [True, False]
    assert joint.support.is_discrete
    assert joint.support.event_dim == 1


def test_joint_expands():
    joint = mixed()
    assert joint.batch_shape == (2,)
    assert Joint(dict(reversed(joint.parts.items())) | independent(c=dist.Poisson(RATE))).batch_shape == (2,)
    expanded = joint.expand((7, 2))
    assert expanded.batch_shape == (7, 2)
    assert expanded.sample((3,)).shape == (3, 7, 2, 4)
    torch.testing.assert_close(expanded.log_prob(VALUES), joint.log_prob(VALUES).expand(7, 2))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({}, "at least one"),
        ({"a": dist.Normal(torch.zeros(3), 1.0)}, r"part 'a': expected an event shape \(width,\), got \(\)"),
        ({"a": dist.Normal(torch.zeros(3, 2), 1.0).to_event(2)}, r"got \(3, 2\)"),
    ],
)
def test_joint_refuses(parts, message):
    with pytest.raises(ValueError, match=message):
        Joint(parts)


def test_joint_refuses_values_of_another_width():
    with pytest.raises(ValueError, match=r"expected values of shape \(\*, 4\), got \(2, 3\)"):
        mixed().log_prob(VALUES[:, :3])


def test_a_site_for_each_part_is_the_same_model():
    """The sum over named sites is the joint's log-probability, under particles too."""
    likelihood, x = table(), table()(latents(5)).sample()

    def model(sites):
        with pyro.plate("particles", 3, dim=-2), pyro.plate("data", 5, dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            fn = likelihood(z)
            for name, part, value in fn.split(x) if sites else [("", fn, x)]:
                pyro.sample(f"x.{name}", part, obs=value)

    one = poutine.trace(partial(model, False)).get_trace()
    many = poutine.trace(poutine.replay(partial(model, True), trace=one)).get_trace()
    assert [name for name in many.nodes if name.startswith("x")] == ["x.sex", "x.height_weight", "x.visits"]
    torch.testing.assert_close(many.log_prob_sum(), one.log_prob_sum())
    one.compute_log_prob()
    assert one.nodes["x."]["log_prob"].shape == (3, 5)


@pytest.mark.parametrize("leading", LEADING)
def test_each_part_takes_its_share_of_the_outputs(leading):
    """Against scipy, from the outputs of the network in the order that the class states."""
    likelihood, z = table(), latents(*leading)
    x = likelihood(z).sample()
    out, sex, height, weight, visits = (
        likelihood.net(z).detach().numpy(),
        *x.numpy().transpose(-1, *range(len(leading))),
    )
    logits = out[..., :3] - np.log(np.exp(out[..., :3]).sum(-1, keepdims=True))
    expected = np.take_along_axis(logits, sex[..., None].astype(int), -1)[..., 0]
    expected = expected + stats.norm(out[..., 3], np.exp(out[..., 5] / 2)).logpdf(height)
    expected = expected + stats.norm(out[..., 4], np.exp(out[..., 6] / 2)).logpdf(weight)
    expected = expected + stats.poisson(np.exp(out[..., 7])).logpmf(visits)
    fn = likelihood(z)
    assert fn.batch_shape == leading
    np.testing.assert_allclose(fn.log_prob(x).detach().numpy(), expected, rtol=1e-10)


def test_the_density_sums_and_integrates_to_one():
    parts = {"sex": partial(Categorical, num_classes=3), "height": Gaussian, "visits": Poisson}
    fn = table(parts, num_outputs=6)(latents())
    grid = torch.linspace(-15, 15, 2001, dtype=torch.float64)
    values = torch.cartesian_prod(torch.arange(3.0).double(), torch.arange(40.0).double(), grid)[:, [0, 2, 1]]
    density = fn.log_prob(values).exp().reshape(3 * 40, -1)
    assert torch.trapezoid(density, grid).sum().item() == pytest.approx(1, abs=1e-9)


def test_columns_and_sizes():
    likelihood = table()
    assert likelihood.columns == ("sex", "height", "weight", "visits")
    assert likelihood.event_shape == (4,)
    assert likelihood.num_outputs == 8
    assert list(likelihood(latents(5)).parts) == ["sex", "height_weight", "visits"]
    supports = {"sex": Categorical.support, "height_weight": constraints.real, "visits": Poisson.support}
    assert likelihood.support == supports
    assert likelihood.parts == PARTS
    assert "columns=('sex', 'height', 'weight', 'visits')" in repr(likelihood)


def test_it_is_written_and_parsed():
    text = expressions.write(table(), "likelihood")
    again = expressions.parse(text, "likelihood")
    assert (again.columns, again.num_outputs, again.parts["visits"]) == (table().columns, 8, Poisson)
    assert expressions.write(again, "likelihood") == text


def test_parameters_of_parts_are_the_modules():
    parts = {"a.b": partial(Gaussian, scale="global"), "c": partial(Gaussian, scale="global")}
    likelihood = table(parts, num_outputs=2)
    assert {p.dtype for p in likelihood.parameters()} == {torch.float64}
    assert {"likelihoods.0.log_variance", "likelihoods.1.log_variance"} < likelihood.state_dict().keys()
    likelihood(latents(64)).log_prob(torch.randn(64, 2)).sum().backward()
    assert all((p.grad != 0).any() for p in likelihood.parameters())
    other = copy.deepcopy(likelihood)
    for parameter in other.parameters():
        nn.init.ones_(parameter)
    other.load_state_dict(likelihood.state_dict())
    assert torch.equal(other(z := latents(5)).log_prob(torch.ones(5, 2)), likelihood(z).log_prob(torch.ones(5, 2)))
    assert likelihood.float()(z.float()).sample().dtype == torch.float32


def test_it_starts_at_the_mean():
    """Parts that have a mean start there, and categories from equal probabilities, whatever the bias was before."""
    likelihood = table()
    nn.init.ones_(likelihood.net.output_bias)
    likelihood.start_at(torch.tensor([1.2, 170.0, 65.0, 3.0]))
    fn = likelihood(torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(fn.mean[1:], torch.tensor([170.0, 65.0, 3.0]).double())
    torch.testing.assert_close(fn.parts["sex"].base_dist.probs, torch.full((1, 3), 1 / 3).double())
    torch.testing.assert_close(fn.parts["height_weight"].base_dist.scale, torch.ones(2).double())
    with pytest.raises(ValueError, match="Linear: expected an output_bias of 8 values"):
        Heterogeneous(nn.Linear(2, 8), PARTS).start_at(torch.zeros(4))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({}, "at least one column"),
        ({1: Gaussian}, "expected the name of a column, or a tuple of names, got 1"),
        ({(): Gaussian}, r"got \(\)"),
        ({("a", 2): Gaussian}, r"got \('a', 2\)"),
        ({"a": Gaussian, ("b", "a"): Gaussian}, "expected each name once, got a twice"),
        ({"a_b": Gaussian, ("a", "b"): Gaussian}, "expected each name once, got a_b twice"),
        ({"a": Gaussian(nn.Identity(), (1,))}, "part 'a': expected a likelihood's class or functools.partial"),
        ({"a": "Gaussian"}, "got 'Gaussian'"),
    ],
)
def test_it_refuses(parts, message):
    with pytest.raises(ValueError, match=message):
        Heterogeneous(nn.Identity(), parts)


def test_it_refuses_an_output_of_another_size():
    with pytest.raises(ValueError, match="expected 8 values"):
        table(num_outputs=7)(latents(5))


def standardized(frame):
    return (frame - frame.mean()) / frame.std(ddof=0)


def fitted(frame, parts, num_outputs, latent, hidden, **options):
    """A program whose encoder standardizes, fitted, and its history."""
    likelihood = Heterogeneous(networks.MLP(latent, num_outputs, hidden), parts)
    encoder = Standardized.of(networks.MLP(frame.shape[1], 2 * latent, hidden), data.InMemory(frame).x)
    vae = VAE(priors.StandardNormal(latent), likelihood, posteriors.DiagonalNormal(encoder, latent))
    return vae, fit(vae, frame, start_at_mean=True, seed=0, progress=False, **options).history


def test_a_linear_program_is_factor_analysis():
    """On a real table the highest likelihood is known: that of factor analysis, by expectation maximization.

    The estimate is of 178 wines from 500 particles each. Nothing can be above, but for its error, below 0.001 nats.
    """
    frame = standardized(load_wine(as_frame=True).data.iloc[:, 5:9])
    exact = FactorAnalysis(1, tol=1e-6, max_iter=10_000).fit(frame).score(frame)
    parts = {name: partial(Gaussian, scale="global") for name in frame.columns}
    vae, _ = fitted(frame, parts, 4, 1, (), epochs=150, batch_size=178, lr=0.1, lr_schedule="cosine")
    reached = evaluation.log_likelihood(vae, frame, num_particles=500).mean().item()
    assert exact - 0.03 < reached < exact + 0.01


def test_a_table_of_text_counts_and_numbers():
    """Held-out patients are likelier than under the same likelihoods without latents, fitted column by column."""
    frame = load_diabetes(scaled=False, as_frame=True).data[["sex", "age", "bmi", "bp"]]
    frame = frame.assign(sex=frame.sex.map({1: "one", 2: "two"}).astype("category"))
    frame[["bmi", "bp"]] = standardized(frame[["bmi", "bp"]])
    train, test = frame[:300], frame[300:]
    parts = {"sex": partial(Categorical, num_classes=2), "age": Poisson, ("bmi", "bp"): Gaussian}
    vae, history = fitted(train, parts, 2 + 1 + 2 * 2, 2, (32,), epochs=30, batch_size=50, lr=1e-2)
    assert history.elbo.iloc[-1] > history.elbo.iloc[0] + 0.5
    apart = stats.poisson(train.age.mean()).logpmf(test.age) + np.log(train.sex.value_counts(normalize=True)[test.sex])
    numbers = stats.norm(train[["bmi", "bp"]].mean(), train[["bmi", "bp"]].std()).logpdf(test[["bmi", "bp"]])
    gain = evaluation.log_likelihood(vae, test, num_particles=200).numpy() - apart.to_numpy() - numbers.sum(1)
    assert gain.mean() > 2 * gain.std() / len(gain) ** 0.5
    trace = poutine.trace(vae.model).get_trace(data.InMemory(test).x.float())
    assert trace.observation_nodes == ["x.sex", "x.age", "x.bmi_bp"]
    _, draws = evaluation.sample(vae, 100, (4,), seed=0)
    assert set(draws[:, 0].tolist()) == {0.0, 1.0}
    assert torch.equal(draws[:, 1], draws[:, 1].round())


def test_standardized_inputs():
    """Mean 0 and standard deviation 1 on the data that it was made of, whatever the unit; a constant feature stays."""
    x = torch.randn(5, 20, 3, dtype=torch.float64) * torch.tensor([300.0, 0.2, 0.0]) + torch.tensor([750.0, 1.0, 7.0])
    net = Standardized.of(nn.Identity(), x.flatten(0, 1)).double()
    out = net(x).flatten(0, 1)
    torch.testing.assert_close(out.mean(0), torch.zeros(3).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.std(0, correction=0), torch.tensor([1.0, 1.0, 0.0]).double(), atol=1e-5, rtol=0)
    assert torch.equal(net(x)[2, 7], net(x[2, 7]))
    assert not net.state_dict()
    again = expressions.parse(expressions.write(Standardized(networks.MLP(2, 3), (1, 2), (3, 4)), "net"), "net")
    assert (again.loc, again.scale, again.net.out_features) == ((1, 2), (3, 4), 3)


@pytest.mark.parametrize(("loc", "scale"), [((0, 0), (1,)), ((0,), (0,)), ((0,), (float("inf"),)), ((0,), (-1,))])
def test_standardized_refuses(loc, scale):
    with pytest.raises(ValueError, match=f"expected {len(loc)} scales above 0"):
        Standardized(nn.Identity(), loc, scale)


def test_standardized_refuses_an_input_of_another_size():
    with pytest.raises(ValueError, match=r"expected an input of shape \(\*, 1\), got \(5, 2\)"):
        Standardized(nn.Identity(), (0,), (1,))(torch.zeros(5, 2))
