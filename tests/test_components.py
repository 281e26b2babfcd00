"""The contract of components, over all lines of `contract.py`.

What is random is drawn from seed 0. Statistics are compared within 4 standard errors: over the some 400 comparisons of
this file a false alarm has a probability of 3 %, which a change of random number generator may bring up, once.
"""

import itertools
import math

import pytest
import torch
from contract import BAD, LATENT, LIKELIHOODS, POSTERIORS, PRIORS
from pyro import poutine
from quadrature import points
from scipy.stats import chi2
from torch import nn
from torch.distributions import kl_divergence

from pyro_vae import expressions, likelihoods, posteriors, priors
from pyro_vae.distributions import SoftBernoulli
from pyro_vae.networks import scale

LEADING = [(), (5,), (3, 5)]
TABLES = {"prior": PRIORS, "likelihood": LIKELIHOODS, "posterior": POSTERIORS}
LINES = {f"{slot}: {name}": (slot, line) for slot, table in TABLES.items() for name, line in table.items()}
WITH_INPUT = [name for name, (_, line) in LINES.items() if line.in_shape is not None]
REPARAMETERIZED = [name for name in POSTERIORS if not name.startswith(("Bernoulli", "OneHot", "SemiAmortized"))]


def make(name, dtype=torch.float64):
    """The component of a line in evaluation, away from the zeros and ones that parameters start at."""
    torch.manual_seed(0)
    module = LINES[name][1].make().to(dtype).eval()
    with torch.no_grad():
        for parameter_name, parameter in module.named_parameters():
            if not parameter_name.startswith("transforms"):  # flows start anywhere; wilder ones need a finer grid
                noise = 0.5 / math.sqrt(parameter.shape[-1] if parameter.ndim > 1 else 1)
                parameter += noise * torch.randn_like(parameter)
    return module


def inputs(name, module, leading=(), dtype=torch.float64):
    """What a component is called with: nothing, x, z, or z and an exposure, which has no particles."""
    slot, (_, in_shape, _) = LINES[name]
    if in_shape is None:
        return ()
    if slot == "posterior":
        return (torch.rand(*leading, *in_shape, dtype=dtype).round(),)
    exposure = (0.5 + torch.rand(leading[-1:], dtype=dtype),) if getattr(module, "exposure", False) else ()
    return (torch.randn(*leading, *in_shape, dtype=dtype), *exposure)


def call(module, arguments=()):
    """The distribution, the same each time where the component draws (SemiAmortized, ARD)."""
    torch.manual_seed(1)
    return module(*arguments)


def fixed(name):
    """The line's distribution at one input."""
    module = make(name)
    fn = call(module, inputs(name, module))
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return fn


# Shapes, gradients, state


@pytest.mark.parametrize(("module", "table"), [(priors, PRIORS), (likelihoods, LIKELIHOODS), (posteriors, POSTERIORS)])
def test_every_component_has_a_line(module, table):
    made = {type(line.make()).__name__ for line in table.values()}
    assert made == set(module.__all__), "each name in __all__ is to have a line in contract.py, and no other"


@pytest.mark.parametrize("leading", LEADING)
@pytest.mark.parametrize("name", LINES)
def test_shapes(name, leading):
    _, line = LINES[name]
    module = make(name)
    fn = call(module, inputs(name, module, leading))
    batch_shape = () if line.in_shape is None else leading
    assert (fn.batch_shape, fn.event_shape) == (batch_shape, line.event_shape)
    value = fn.sample()
    assert value.shape == batch_shape + line.event_shape
    assert fn.sample((4,)).shape == (4, *batch_shape, *line.event_shape)
    assert fn.log_prob(value).shape == batch_shape
    larger = fn.expand((7, *batch_shape))
    values = larger.sample()
    assert fn.support.check(values).all()
    assert (larger.batch_shape, larger.event_shape) == ((7, *batch_shape), line.event_shape)
    torch.testing.assert_close(larger.log_prob(values), fn.log_prob(values), rtol=1e-12, atol=1e-12)
    assert not (larger.expand((30, 7, *batch_shape)).sample().diff(dim=1) == 0).all(), (
        "expanded batches are drawn alike"
    )


@pytest.mark.parametrize("leading", LEADING[1:])
@pytest.mark.parametrize("name", [name for name in WITH_INPUT if "SemiAmortized" not in name])
def test_leading_dimensions_are_a_batch(name, leading):
    """One by one is as batched. (Where the component itself draws, draws differ.)"""
    module = make(name)
    arguments = inputs(name, module, leading)
    fn, draws = module(*arguments), module(*arguments).sample((500,)).double()
    value = fn.sample()
    for i in itertools.product(*map(range, leading)):
        alone = module(arguments[0][i], *(a[i[-1:]] for a in arguments[1:]))
        torch.testing.assert_close(fn.log_prob(value)[i], alone.log_prob(value[i]))
        ours, others = (
            features(d.flatten(1), 0.5, 1.0) for d in (draws[(slice(None), *i)], alone.sample((500,)).double())
        )
        error = ((ours.var(0) + others.var(0)) / 500).sqrt()
        assert ((ours.mean(0) - others.mean(0)).abs() < 5 * error + 0.02).all()


@pytest.mark.parametrize("name", LINES)
def test_a_gradient_reaches_every_parameter(name):
    module = make(name)
    fn = call(module, inputs(name, module, (64,)))
    loss = fn.log_prob(fn.sample((1 if fn.batch_shape else 64,))).sum()
    if hasattr(module, "guide"):
        loss = loss + poutine.trace(module.guide).get_trace().log_prob_sum()
    if not list(module.parameters()):
        return
    loss.backward()
    without = [n for n, p in module.named_parameters() if p.grad is None or not (p.grad != 0).any()]
    assert not without
    net = getattr(getattr(module, "base", module), "net", None)
    assert net is None or (net.output_bias.grad != 0).all(), "a head without a gradient"


@pytest.mark.parametrize("name", LINES)
def test_state(name):
    """A fresh component that loads the state is the same; a cast there and back changes no more than rounding."""
    module = make(name)
    arguments = inputs(name, module, (5,))
    fn = call(module, arguments)
    value = fn.sample()
    torch.manual_seed(3)
    fresh = LINES[name][1].make().double().eval()
    fresh.load_state_dict(module.state_dict())
    torch.testing.assert_close(call(fresh, arguments).log_prob(value), fn.log_prob(value), rtol=1e-12, atol=0)
    single = call(module.float(), tuple(a.float() for a in arguments))
    drawn = single.sample()
    assert drawn.dtype == torch.float32 or not drawn.is_floating_point()
    assert single.log_prob(drawn).dtype == torch.float32
    assert call(module.double(), arguments).log_prob(value).dtype == torch.float64


@pytest.mark.gpu
@pytest.mark.parametrize("name", LINES)
def test_device(name, accelerator):
    module = make(name, torch.float32).to(accelerator)
    arguments = tuple(a.to(accelerator) for a in inputs(name, module, (5,), torch.float32))
    fn = call(module, arguments)
    value = fn.sample()
    assert fn.log_prob(value).device.type == value.device.type == accelerator
    if (total := fn.log_prob(value).sum()).requires_grad:
        total.backward()


@pytest.mark.parametrize("name", LINES)
def test_text(name):
    """`repr` is short and names the class; the expression that is written builds the same again."""
    slot, line = LINES[name]
    module = line.make()
    assert type(module).__name__ in repr(module)
    nested = {"flow", "pixel_cnn", "likelihoods", "likelihood"} & vars(module).keys() | module._modules.keys() - {"net"}
    assert len(repr(module)) < (3000 if nested else 300)
    if isinstance(getattr(module, "pseudo_inputs", None), torch.Tensor):
        with pytest.raises(ValueError, match=r"^a tensor of shape \(3, 2, 3\) is no literal"):
            expressions.write(module, slot)
        return
    text = expressions.write(module, slot)
    again = expressions.parse(text, slot)
    assert expressions.write(again, slot) == text
    assert {n: p.shape for n, p in again.state_dict().items()} == {n: p.shape for n, p in module.state_dict().items()}


# Densities and samples


@pytest.mark.parametrize("name", LINES)
def test_density_sums_to_one(name):
    """By enumeration to 1e-9; by quadrature to 1e-6, and 2e-3 for flows, whose networks have kinks."""
    fn = fixed(name)
    value, log_weight = points(fn)
    tolerance = 2e-3 if "Flow" in name else 1e-6 if log_weight.any() else 1e-9
    assert (fn.log_prob(value) + log_weight).logsumexp(0).exp().item() == pytest.approx(1, abs=tolerance)


def features(value, middle, spread):
    """Bounded functions of values, which see their location, scale and dependence."""
    u = (value - middle) / spread
    products = [u[:, :1].tanh() * u[:, 1:].tanh()] if u.shape[1] > 1 else []
    return torch.cat([u.tanh(), (-0.5 * u**2).exp(), *products], -1)


@pytest.mark.parametrize("name", LINES)
def test_samples_are_of_the_density(name):
    """Discrete: a chi-square test of 20 000 draws, p > 1e-4. Others: the means of bounded functions of 20 000 draws.

    A scale that is off by 5 % moves a normal's by 9 standard errors.
    """
    fn = fixed(name)
    value, log_weight = points(fn)
    probability = (fn.log_prob(value) + log_weight).exp()
    torch.manual_seed(0)
    n = 20_000
    draws = fn.sample((n,)).double().flatten(1)
    if not log_weight.any():
        assert chi_square(value.flatten(1), probability, draws) > 1e-4
        return
    low, middle, high = fn.sample((999,)).double().flatten(1).quantile(draws.new_tensor([0.16, 0.5, 0.84]), 0)
    spread = (high - low).clamp(min=1e-3) / 2
    exact, drawn = features(value.flatten(1), middle, spread), features(draws, middle, spread)
    error = drawn.std(0) / math.sqrt(n)
    deviation = (drawn.mean(0) - probability @ exact) / error.clamp(min=1e-12)
    assert deviation.abs().max() < 4


def chi_square(value, probability, draws):
    """The p-value of draws of a discrete distribution; cells where less than 5 are expected are one."""
    key = torch.randn(value.shape[1], dtype=torch.float64)
    keys, order = (value @ key).sort()
    nearest = torch.searchsorted(keys, draws @ key - 1e-6)
    assert ((keys[nearest.clamp(max=len(keys) - 1)] - draws @ key).abs() < 1e-6).all(), "a draw outside the support"
    counts = torch.bincount(nearest, minlength=len(keys)).double()
    expected = probability[order] * len(draws)
    rare = expected < 5
    counts = torch.cat((counts[~rare], counts[rare].sum()[None]))
    expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    counts, expected = counts[expected > 1], expected[expected > 1]
    return chi2.sf(((counts - expected) ** 2 / expected).sum().item(), max(1, len(expected) - 1))


CLOSED_FORMS = [
    ("Bernoulli", "Bernoulli"),
    *itertools.product(
        ["DiagonalNormal", "Laplace", "SemiAmortized"], ["ARD", "DiagonalNormal", "Laplace", "StandardNormal"]
    ),
    ("VonMisesFisher", "UniformSphere"),
]


def closed_forms():
    """Pairs of lines whose divergence torch knows."""
    found = []
    for p, q in itertools.product(POSTERIORS, PRIORS):
        posterior, prior = fixed(f"posterior: {p}"), fixed(f"prior: {q}")
        if posterior.event_shape != prior.event_shape:
            continue
        try:
            kl_divergence(posterior, prior)
        except NotImplementedError:
            continue
        found.append((p, q))
    return found


def test_which_divergences_have_a_closed_form():
    assert closed_forms() == CLOSED_FORMS


@pytest.mark.parametrize(("p", "q"), CLOSED_FORMS)
def test_closed_forms_of_divergences(p, q):
    """By enumeration or quadrature to 1e-6, and 2e-3 where the prior has a kink that is not the posterior's."""
    posterior, prior = fixed(f"posterior: {p}"), fixed(f"prior: {q}")
    value, log_weight = points(posterior)
    log_density = posterior.log_prob(value)
    exact = ((log_density + log_weight).exp() * (log_density - prior.log_prob(value))).sum().item()
    tolerance = 2e-3 if q == "Laplace" else 1e-6
    assert kl_divergence(posterior, prior).item() == pytest.approx(exact, abs=tolerance)


def wave(value):
    phase = torch.arange(value.shape[-1], dtype=value.dtype)
    return (1.3 * value + phase).sin().sum(-1) + (value[..., 0] - 0.5 * value[..., 1]).tanh()


def bump(value):
    return (-((value - 0.5) ** 2)).exp().sum(-1)


@pytest.mark.parametrize("function", [wave, bump])
@pytest.mark.parametrize("name", REPARAMETERIZED)
def test_gradients_of_samples(name, function):
    """The mean of 20 000 pathwise gradients is that of the expectation, by quadrature and finite differences."""
    posterior = make(f"posterior: {name}")
    outputs = posterior.outputs(*inputs(f"posterior: {name}", posterior)).detach()
    value, log_weight = points(posterior.distribution(outputs))

    def expectation(outputs):
        return ((posterior.distribution(outputs).log_prob(value) + log_weight).exp() * function(value)).sum()

    with torch.no_grad():
        steps = 1e-4 * torch.eye(len(outputs), dtype=torch.float64)
        exact = torch.stack([expectation(outputs + step) - expectation(outputs - step) for step in steps]) / 2e-4
    torch.manual_seed(0)
    many = outputs.expand(20_000, -1).clone().requires_grad_()
    (drawn,) = torch.autograd.grad(function(posterior.distribution(many).rsample()).sum(), many)
    error = drawn.std(0) / math.sqrt(len(drawn))
    assert (error < 0.1).all()
    slack = 2e-3 if "Flow" in name else 1e-6
    assert ((drawn.mean(0) - exact).abs() < 4 * error + slack).all()


def test_reparameterized_is_what_has_rsample():
    found = [name for name in POSTERIORS if fixed(f"posterior: {name}").has_rsample and name != "SemiAmortized"]
    assert found == REPARAMETERIZED


# Starts, extremes, errors

STARTS = {  # how far from the mean: rounding, except where the family has no parameter that is the mean
    "Bernoulli": 1e-9,
    "Beta": 1e-9,
    "Binomial": 1e-9,
    "ContinuousBernoulli": 1e-6,
    "DiscretizedLogistic": 0.03,  # tails are cut off
    "DiscretizedLogisticMixture": 0.03,
    "Gamma": 1e-9,
    "Gaussian": 1e-9,
    "Gaussian of a global scale": 1e-9,
    "Gaussian of a given scale": 1e-9,
    "Gaussian of the optimal scale": 1e-9,
    "Laplace": 1e-9,
    "LogNormal": 1e-9,
    "NegativeBinomial": 1e-9,
    "Poisson": 1e-9,
    "StudentT": 1e-9,
    "ZeroInflatedNegativeBinomial": 1e-9,
    "ZeroInflatedPoisson": 1e-9,
}


@pytest.mark.parametrize("name", STARTS)
def test_starts_at_the_mean(name):
    torch.manual_seed(0)
    module = LIKELIHOODS[name].make().double().eval()
    torch.nn.init.zeros_(module.net.layers[-1].weight)
    mean = torch.tensor([[0.4], [0.7]], dtype=torch.float64)
    module.start_at(mean)
    torch.testing.assert_close(module(torch.randn(3, LATENT).double()).mean[0], mean, rtol=0, atol=STARTS[name])


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_starting_needs_an_output_bias_and_is_possible_for_all(name):
    """A likelihood whose `start_at` raised would stop the command line, which starts at the mean where it can."""
    module = LIKELIHOODS[name].make()
    module.start_at(torch.full(module.event_shape, 0.5))
    if hasattr(module, "num_params"):
        module.net = nn.Linear(LATENT, module.num_outputs)
        with pytest.raises(ValueError, match="^Linear: expected an output_bias of"):
            module.start_at(torch.full(module.event_shape, 0.5))


class Constant(nn.Module):
    """A network of given outputs."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs = nn.Parameter(outputs)

    def forward(self, x):
        return self.outputs.expand(len(x), -1)


def extremes(num_outputs):
    """All high, all low, every second one, the first half, and at random."""
    signs = torch.ones(5, num_outputs)
    signs[1], signs[2, ::2], signs[3, num_outputs // 2 :] = -1, -1, -1
    signs[4] = torch.randn(num_outputs).sign()
    return signs


@pytest.mark.parametrize("size", [1e4, 1e30])
@pytest.mark.parametrize("name", WITH_INPUT)
def test_extreme_outputs_stay_finite(name, size):
    """In float32, at a value that outputs of zero draw: heads are bounded by construction."""
    torch.manual_seed(0)
    module = LINES[name][1].make().eval()
    owner = getattr(module, "base", module)
    arguments = inputs(name, module, (5,), torch.float32)
    num_outputs = owner.num_outputs
    owner.net = Constant(torch.zeros(num_outputs))
    value = module(*arguments).sample()
    for signs in extremes(num_outputs):
        owner.net = Constant(size * signs)
        fn = module(*arguments)
        log_prob = fn.log_prob(value)
        assert log_prob.isfinite().all(), f"log_prob {log_prob} at {signs}"
        (gradient,) = torch.autograd.grad(log_prob.sum(), owner.net.outputs)
        assert gradient.isfinite().all(), f"gradient {gradient} at {signs}"
        draws = fn.sample()
        assert draws.isfinite().all()
        assert fn.support.check(draws).all(), f"draws {draws} at {signs}"
        if fn.has_rsample:
            (gradient,) = torch.autograd.grad(module(*arguments).rsample().sum(), owner.net.outputs)
            assert gradient.isfinite().all(), f"gradient of draws {gradient} at {signs}"


@pytest.mark.parametrize(("make_it", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_options(make_it, message):
    with pytest.raises(ValueError, match=message) as caught:
        make_it()
    assert "\n" not in str(caught.value)


# What single components promise besides


def test_soft_bernoulli_is_cross_entropy_and_refuses_the_rest():
    logits, target = torch.randn(5), torch.rand(5)
    expected = -torch.nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    torch.testing.assert_close(SoftBernoulli(logits=logits).log_prob(target), expected)
    with pytest.raises(ValueError, match="support"):
        SoftBernoulli(logits=logits, validate_args=True).log_prob(target + 1)


def test_scale_is_the_textbooks_and_bounded():
    log_variance = torch.linspace(-15, 15, 31, dtype=torch.float64)
    assert torch.equal(scale(log_variance), torch.exp(0.5 * log_variance))
    extreme = scale(torch.tensor([-1e30, 1e30]))
    assert (extreme > 0).all()
    assert extreme.isfinite().all()
