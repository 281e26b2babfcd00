"""The contract of components: any leading dimensions, gradients, state, dtype, support. One line a component."""

import copy
import itertools

import pytest
import torch

from pyro_vae import likelihoods, networks, posteriors, priors
from pyro_vae.distributions import SoftBernoulli
from pyro_vae.networks import scale

LEADING = [(), (5,), (3, 5)]
COMPONENTS = {  # name: (component, shape of one input or None, event shape)
    "StandardNormal": (lambda: priors.StandardNormal(3), None, (3,)),
    "Bernoulli": (lambda: likelihoods.Bernoulli(networks.MLP(3, 8, hidden=(6,)), (2, 4)), (3,), (2, 4)),
    "DiagonalNormal": (lambda: posteriors.DiagonalNormal(networks.MLP((2, 4), 6, hidden=(6,)), 3), (2, 4), (3,)),
}
NETWORKS = {
    "MLP": (lambda: networks.MLP(3, 8, hidden=(6,)), (3,), (8,)),
    "MLP of a shape": (lambda: networks.MLP((2, 4), 8, hidden=(6, 5), activation="tanh"), (2, 4), (8,)),
    "MLP without hidden layers": (lambda: networks.MLP(3, 8, hidden=()), (3,), (8,)),
}


@pytest.fixture(params=COMPONENTS)
def component(request):
    torch.manual_seed(0)
    make, in_shape, event_shape = COMPONENTS[request.param]
    return make().double(), in_shape, event_shape


def inputs(leading, in_shape):
    return () if in_shape is None else (torch.randn(*leading, *in_shape, dtype=torch.float64),)


@pytest.mark.parametrize("leading", LEADING)
def test_shapes(component, leading):
    module, in_shape, event_shape = component
    fn = module(*inputs(leading, in_shape))
    assert fn.event_shape == event_shape
    assert fn.batch_shape == (() if in_shape is None else leading)
    value = fn.sample()
    assert fn.log_prob(value).shape == fn.batch_shape
    assert fn.support.check(value).all()


@pytest.mark.parametrize("leading", LEADING)
def test_leading_dimensions_are_a_batch(component, leading):
    module, in_shape, _ = component
    if in_shape is None or not leading:
        return
    (x,) = inputs(leading, in_shape)
    value = module(x).sample()
    one_by_one = [module(x[i]).log_prob(value[i]) for i in itertools.product(*map(range, leading))]
    torch.testing.assert_close(module(x).log_prob(value).flatten(), torch.stack(one_by_one))


def test_a_gradient_reaches_every_parameter(component):
    module, in_shape, _ = component
    fn = module(*inputs((64,), in_shape))
    if not list(module.parameters()):
        return
    fn.log_prob(fn.sample()).sum().backward()
    assert all((p.grad != 0).any() for p in module.parameters())


def test_state_dtype_repr(component):
    module, in_shape, _ = component
    other = copy.deepcopy(module)
    for parameter in other.parameters():
        torch.nn.init.zeros_(parameter)
    other.load_state_dict(module.state_dict())
    (x,) = inputs((5,), in_shape) or (None,)
    arguments = () if x is None else (x,)
    value = module(*arguments).sample()
    assert torch.equal(module(*arguments).log_prob(value), other(*arguments).log_prob(value))
    single = module.float()(*(a.float() for a in arguments))
    assert single.sample().dtype == torch.float32
    assert type(module).__name__ in repr(module)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("leading", LEADING)
def test_networks(name, leading):
    make, in_shape, out_shape = NETWORKS[name]
    net = make().double()
    x = torch.randn(*leading, *in_shape, dtype=torch.float64)
    assert net(x).shape == (*leading, *out_shape)


def test_a_number_of_features_takes_a_batch_of_images():
    net = networks.MLP(8, 3)
    assert net(torch.zeros(1, 1, 2, 4)).shape == (1, 3)  # one image: its batch dimension stays
    assert net(torch.zeros(5, 2, 4)).shape == (5, 3)


def test_glorot_initialization():
    weight = networks.MLP(300, 1, hidden=(500,)).layers[0].weight
    bound = (6 / 800) ** 0.5
    assert weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)


def test_bernoulli_sums_to_one():
    fn = likelihoods.Bernoulli(networks.MLP(3, 4).double(), (2, 2))(torch.randn(3, dtype=torch.float64))
    values = torch.tensor(list(itertools.product((0.0, 1.0), repeat=4)), dtype=torch.float64).reshape(16, 2, 2)
    assert fn.log_prob(values).logsumexp(0).item() == pytest.approx(0, abs=1e-12)


def test_bernoulli_starts_at_the_mean():
    likelihood = likelihoods.Bernoulli(networks.MLP(3, 4).double(), (2, 2))
    mean = torch.tensor([[0.1, 0.9], [0.5, 0.0]], dtype=torch.float64)
    likelihood.start_at(mean)
    started = likelihood(torch.zeros(3, dtype=torch.float64)).mean
    torch.testing.assert_close(started, mean.clamp(min=1e-3))
    with pytest.raises(ValueError, match="output_bias"):
        likelihoods.Bernoulli(torch.nn.Linear(3, 4), (2, 2)).start_at(mean)


def test_soft_bernoulli_is_cross_entropy_and_refuses_the_rest():
    logits, target = torch.randn(5), torch.rand(5)
    expected = -torch.nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    torch.testing.assert_close(SoftBernoulli(logits=logits).log_prob(target), expected)
    with pytest.raises(ValueError, match="support"):
        SoftBernoulli(logits=logits, validate_args=True).log_prob(target + 1)


def test_diagonal_normal_density():
    """The density integrates to one, and its moments are the heads'."""
    posterior = posteriors.DiagonalNormal(networks.MLP(2, 2).double(), 1)
    x = torch.randn(2, dtype=torch.float64)
    fn, (mean, log_variance) = posterior(x), posterior.net(x).tolist()
    grid = torch.linspace(-20, 20, 200_001, dtype=torch.float64)
    density = fn.log_prob(grid[:, None]).exp()
    assert torch.trapezoid(density, grid).item() == pytest.approx(1, abs=1e-9)
    assert torch.trapezoid(density * grid, grid).item() == pytest.approx(mean, abs=1e-9)
    variance = torch.trapezoid(density * (grid - mean) ** 2, grid).log().item()
    assert variance == pytest.approx(log_variance, abs=1e-8)


def test_scale_is_the_textbooks_and_bounded():
    log_variance = torch.linspace(-15, 15, 31, dtype=torch.float64)
    assert torch.equal(scale(log_variance), torch.exp(0.5 * log_variance))
    extreme = scale(torch.tensor([-1e30, 1e30]))
    assert (extreme > 0).all()
    assert extreme.isfinite().all()
