"""Distributions on the sphere against Bessel functions, quadrature, and exact expectations.

Monte Carlo estimates are held to 4 standard errors, a false alarm of 6e-5 for each figure compared, from seed 0.
"""

import math

import numpy as np
import pyro
import pytest
import scipy.special
import scipy.stats
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch.distributions import kl_divergence
from torch.nn.functional import normalize

from pyro_vae.distributions.sphere import UniformSphere, VonMisesFisher

DIMS = [2, 3, 5, 20, 100]


def unit(*shape, dtype=torch.float64):
    return normalize(torch.randn(*shape, dtype=dtype), dim=-1)


def tensor(value):
    return torch.tensor(value, dtype=torch.float64)


def log_c(dim, kappa):
    """Log-normalizer of the density, by the Bessel function."""
    order = dim / 2 - 1
    return order * np.log(kappa) - dim / 2 * np.log(2 * np.pi) - np.log(scipy.special.ive(order, kappa)) - kappa


def mean_cosine(dim, kappa):
    return scipy.special.ive(dim / 2, kappa) / scipy.special.ive(dim / 2 - 1, kappa)


def angle_grid(dim, kappa, size=50_001):
    """Angles, density and CDF of the angle by the trapezoidal rule, where the density is above exp(-45) of its mode."""
    angle = np.geomspace(1e-7, math.pi, 20_001)
    log_density = (dim - 2) * np.log(np.abs(np.sin(angle))) - 2 * kappa * np.sin(angle / 2) ** 2
    inside = angle[log_density > log_density.max() - 45]
    angle = np.linspace(0 if inside[0] < 1e-6 else inside[0], inside[-1], size)
    log_density = scipy.special.xlogy(dim - 2, np.sin(angle)) - 2 * kappa * np.sin(angle / 2) ** 2
    density = np.exp(log_density - log_density.max())
    cdf = np.concatenate([[0], np.cumsum(0.5 * (density[1:] + density[:-1]) * np.diff(angle))])
    return angle, density / cdf[-1], cdf / cdf[-1]


def angle_between(x, loc):
    return 2 * ((x - loc).norm(dim=-1) / 2).clamp(max=1).asin()


def within(values, expected, sigmas=4.0):
    """Whether the mean of `values` over its first dimension is what is expected, to 4 standard errors."""
    error = values.std(0) / len(values) ** 0.5
    return bool(((values.mean(0) - expected).abs() <= sigmas * error + 1e-12).all())


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("kappa", [1e-3, 0.1, 1.0, 30.0, 1e3, 1e4])
def test_log_density_is_scipys(dim, kappa):
    loc = unit(dim)
    fn = VonMisesFisher(loc, tensor(kappa))
    x = torch.cat([fn.sample((20,)), unit(20, dim), loc[None], -loc[None]])
    expected = scipy.stats.vonmises_fisher(loc.numpy(), kappa).logpdf(x.numpy())
    np.testing.assert_allclose(fn.log_prob(x).numpy(), expected, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("kappa", [1e-4, 1.0, 50.0])
def test_density_integrates_to_one(kappa):
    angle = torch.linspace(-math.pi, math.pi, 4001, dtype=torch.float64)
    circle = VonMisesFisher(unit(2), tensor(kappa))
    density = circle.log_prob(torch.stack([angle.cos(), angle.sin()], -1)).exp()
    assert torch.trapezoid(density, angle).item() == pytest.approx(1, abs=1e-10)

    nodes, weights = (torch.from_numpy(values) for values in np.polynomial.legendre.leggauss(100))
    angle = angle[::20]
    ring = (1 - nodes**2).sqrt()[:, None]
    points = torch.stack([ring * angle.cos(), ring * angle.sin(), nodes[:, None].expand(-1, len(angle))], -1)
    for fn in (VonMisesFisher(unit(3), tensor(kappa)), UniformSphere(3)):
        around = torch.trapezoid(fn.log_prob(points).exp(), angle, dim=1)
        assert (weights * around).sum().item() == pytest.approx(1, abs=1e-10)


@pytest.mark.parametrize("dim", DIMS)
def test_moments_of_draws(dim):
    """10 figures of 4 standard errors for each dimension, seed 0."""
    kappa = torch.tensor([1e-4, 1.0, 10.0, 300.0, 1e5], dtype=torch.float64)
    loc = unit(len(kappa), dim)
    fn = VonMisesFisher(loc, kappa)
    cosine = torch.from_numpy(mean_cosine(dim, kappa.numpy()))
    torch.testing.assert_close(fn.mean, cosine[:, None] * loc)

    x = fn.sample((10_000,))
    versine = 0.5 * (x - loc).square().sum(-1)
    assert within(versine, 1 - cosine)
    assert within((1 - versine) ** 2, 1 - (dim - 1) * cosine / kappa)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("kappa", [1e-4, 1.0, 20.0, 1e3, 1e5])
def test_angles_follow_their_distribution(dim, kappa):
    """Kolmogorov-Smirnov on 5000 angles, seed 0; each of the 25 cases alarms falsely with probability 1e-4."""
    loc = unit(dim)
    x = VonMisesFisher(loc, tensor(kappa)).sample((5000,))
    angle, _, cdf = angle_grid(dim, kappa)
    uniform = np.interp(angle_between(x, loc).numpy(), angle, cdf)
    assert scipy.stats.kstest(uniform, "uniform").pvalue > 1e-4


@pytest.mark.parametrize("dim", DIMS)
def test_directions_are_uniform_around_loc(dim):
    """Along any tangent: both signs (4 standard errors), squares of a beta variable (Kolmogorov-Smirnov, 1e-4)."""
    loc, other = unit(dim), unit(dim)
    along = normalize(other - (other @ loc) * loc, dim=-1)
    x = VonMisesFisher(loc, tensor(5.0)).sample((5000,))
    coordinate = normalize(x - (x @ loc)[:, None] * loc, dim=-1) @ along
    assert within(coordinate.sign(), 0.0)
    if dim == 2:
        torch.testing.assert_close(coordinate.abs(), torch.ones(5000, dtype=torch.float64))
    else:
        assert scipy.stats.kstest(coordinate.numpy() ** 2, scipy.stats.beta(0.5, dim / 2 - 1).cdf).pvalue > 1e-4


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("kappa", [1e-3, 1.0, 20.0, 1e3, 1e5])
def test_a_draw_moves_with_the_concentration_as_its_quantile_does(dim, kappa):
    """The gradient of each draw is minus the CDF's derivative over the density, by the trapezoidal rule."""
    concentration = torch.full((200,), kappa, dtype=torch.float64, requires_grad=True)
    loc = unit(200, dim)
    x = VonMisesFisher(loc, concentration).rsample()
    angle = angle_between(x, loc)
    (slope,) = torch.autograd.grad(angle.sum(), concentration)

    grid, density, cdf = angle_grid(dim, kappa)
    excess = density * 2 * (np.sin(angle_mean(grid, density) / 2) ** 2 - np.sin(grid / 2) ** 2)
    derivative = np.concatenate([[0], np.cumsum(0.5 * (excess[1:] + excess[:-1]) * np.diff(grid))])
    central = (cdf > 1e-3) & (cdf < 1 - 1e-3)  # further out the trapezoids, not the gradient, lack the digits
    inside = (angle.detach().numpy() > grid[central][0]) & (angle.detach().numpy() < grid[central][-1])
    expected = np.interp(angle.detach().numpy(), grid[central], -(derivative / np.maximum(density, 1e-300))[central])
    np.testing.assert_allclose(slope.numpy()[inside], expected[inside], rtol=2e-5)


def angle_mean(grid, density):
    """The angle whose cosine is the mean cosine."""
    return 2 * np.arcsin(np.trapezoid(density * np.sin(grid / 2) ** 2, grid) ** 0.5)


@pytest.mark.parametrize("dim", [2, 3, 10])
@pytest.mark.parametrize("kappa", [0.3, 10.0])
def test_gradients_of_expectations(dim, kappa):
    """Of exp(a.x) and (a.x)^2, whose expectations have closed forms: dim + 1 figures of 4 standard errors, seed 0.

    `loc` is normalized inside, hence the gradient that reaches a network.
    """
    direction, a = torch.randn(dim, dtype=torch.float64), 2 * unit(dim)

    def exponential(parameters):
        mu, k = parameters[:-1] / np.linalg.norm(parameters[:-1]), parameters[-1]
        return np.exp(log_c(dim, k) - log_c(dim, np.linalg.norm(k * mu + a.numpy())))

    def square(parameters):
        mu, k = parameters[:-1] / np.linalg.norm(parameters[:-1]), parameters[-1]
        second, along = 1 - (dim - 1) * mean_cosine(dim, k) / k, (a.numpy() @ mu) ** 2
        return second * along + (1 - second) / (dim - 1) * (4 - along)

    parameters = torch.cat([direction, tensor(kappa)[None]])
    for function, expectation in ((torch.exp, exponential), (torch.square, square)):
        leaf = parameters.expand(10_000, -1).clone().requires_grad_()
        x = VonMisesFisher(normalize(leaf[:, :-1], dim=-1), leaf[:, -1]).rsample()
        value = function(x @ a)
        (gradients,) = torch.autograd.grad(value.sum(), leaf)
        assert within(value.detach(), expectation(parameters.numpy()))
        assert within(gradients, torch.tensor(differences(expectation, parameters.numpy())))


def differences(function, at, step=1e-5):
    return [(function(at + step * e) - function(at - step * e)) / (2 * step) for e in np.eye(len(at))]


@pytest.mark.parametrize("dim", [2, 3, 20])
def test_gradients_of_the_density_and_the_divergence(dim):
    x, direction = unit(4, dim), torch.randn(4, dim, dtype=torch.float64, requires_grad=True)
    concentration = torch.tensor([1e-2, 1.0, 30.0, 1e3], dtype=torch.float64, requires_grad=True)

    def log_prob(direction, concentration):
        return VonMisesFisher(normalize(direction, dim=-1), concentration).log_prob(x)

    def divergence(concentration):
        return kl_divergence(VonMisesFisher(x, concentration), UniformSphere(dim))

    assert torch.autograd.gradcheck(log_prob, (direction, concentration), atol=1e-4)
    (gradient,) = torch.autograd.grad(divergence(concentration).sum(), concentration)
    kappa = concentration.detach().numpy()
    cosine = mean_cosine(dim, kappa)
    np.testing.assert_allclose(gradient, kappa * (1 - cosine**2 - (dim - 1) * cosine / kappa), rtol=1e-6)


@pytest.mark.parametrize("dim", DIMS)
def test_divergence_from_uniform(dim):
    """Against Bessel functions, its limit at zero, and Monte Carlo: 4 figures of 4 standard errors, seed 0."""
    kappa = torch.tensor([1.0, 10.0, 300.0, 1e4], dtype=torch.float64)
    fn, uniform = VonMisesFisher(unit(4, dim), kappa), UniformSphere(dim, like=kappa)
    divergence = kl_divergence(fn, uniform)
    log_area = math.log(2) + dim / 2 * math.log(math.pi) - math.lgamma(dim / 2)
    expected = log_c(dim, kappa.numpy()) + kappa.numpy() * mean_cosine(dim, kappa.numpy()) + log_area
    np.testing.assert_allclose(divergence, expected, rtol=1e-10)
    x = fn.sample((10_000,))
    assert within(fn.log_prob(x) - uniform.log_prob(x), divergence)

    small = kl_divergence(VonMisesFisher(unit(dim), tensor(1e-4)), uniform)
    assert small.item() == pytest.approx(1e-8 / (2 * dim), abs=1e-12)


def test_uniform_sphere():
    """The coordinates' squares are beta variables (Kolmogorov-Smirnov, each of 5 alarms falsely at 1e-4), seed 0."""
    for dim in DIMS:
        fn = UniformSphere(dim, like=torch.zeros(3, dtype=torch.float64))
        x = fn.sample((5000,))
        assert within(x @ unit(dim), 0.0)
        assert scipy.stats.kstest(x[:, 0].numpy() ** 2, scipy.stats.beta(0.5, (dim - 1) / 2).cdf).pvalue > 1e-4
        assert fn.log_prob(x[0]).item() == pytest.approx(log_c(dim, 1e-3), abs=1e-6)


@pytest.mark.parametrize("batch", [(), (5,), (3, 5)])
def test_shapes(batch):
    kappa = torch.rand(batch, dtype=torch.float64) + 0.5
    fn, uniform = VonMisesFisher(unit(*batch, 4), kappa), UniformSphere(4, like=kappa)
    assert kl_divergence(fn, uniform).shape == batch
    assert fn.mean.shape == (*batch, 4)
    for one in (fn, uniform.expand(batch)):
        assert (one.batch_shape, one.event_shape) == (batch, (4,))
        x = one.rsample((7,))
        assert x.shape == (7, *batch, 4)
        assert x.dtype == torch.float64
        assert one.support.check(x).all()
        assert one.log_prob(x).shape == (7, *batch)
        wide = one.expand((2, *batch))
        assert wide.sample().shape == (2, *batch, 4)
        torch.testing.assert_close(wide.log_prob(x[:2]), one.log_prob(x[:2]))
        assert type(wide) is type(one)  # so that its divergences are still found
    assert kl_divergence(fn.expand((2, *batch)), uniform.expand((2, *batch))).shape == (2, *batch)
    assert UniformSphere(4).log_prob(fn.sample((7,))).shape == (7, *batch)


def test_arguments_broadcast():
    fn = VonMisesFisher(unit(3), torch.rand(5, dtype=torch.float64) + 0.5)
    assert fn.sample().shape == (5, 3)
    assert VonMisesFisher(unit(5, 3), tensor(2.0)).concentration.shape == (5,)


@pytest.mark.parametrize("dim", DIMS)
def test_float32_keeps_the_digits_that_it_has(dim):
    """At the extremes of dimension and concentration: nothing infinite, and values close to those of float64."""
    kappa = torch.logspace(-4, 5, 19, requires_grad=True)
    direction = torch.randn(200, 19, dim, requires_grad=True)
    fn, uniform = VonMisesFisher(normalize(direction, dim=-1), kappa), UniformSphere(dim, like=kappa)
    x = fn.rsample()
    assert x.dtype == torch.float32
    assert fn.support.check(x).all()
    assert uniform.support.check(uniform.sample((1000,))).all()

    log_prob, divergence = fn.log_prob(x), kl_divergence(fn, uniform)
    double = VonMisesFisher(normalize(fn.loc.double(), dim=-1), kappa.double())
    torch.testing.assert_close(log_prob, double.log_prob(normalize(x.double(), dim=-1)).float(), rtol=1e-5, atol=3e-4)
    torch.testing.assert_close(divergence, kl_divergence(double, uniform).float(), rtol=1e-5, atol=1e-9)
    for value in (x[..., 0], log_prob, divergence, fn.mean):
        gradients = torch.autograd.grad(value.sum(), (direction, kappa), retain_graph=True, materialize_grads=True)
        assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("estimator", [Trace_ELBO, TraceMeanField_ELBO])
def test_a_pyro_program(estimator):
    """Prior and posterior in a plate: both estimators have minus the divergence, one of them without noise, seed 0."""
    loc, kappa = unit(400, 3), torch.full((400,), 4.0, dtype=torch.float64)

    def model():
        with pyro.plate("data", 400):
            pyro.sample("z", UniformSphere(3, like=kappa))

    def guide():
        with pyro.plate("data", 400):
            pyro.sample("z", VonMisesFisher(loc, kappa))

    loss = estimator().loss(model, guide)
    expected = kl_divergence(VonMisesFisher(loc, kappa), UniformSphere(3)).sum().item()
    spread = 4 * 4.0 * 400**0.5  # 4 standard errors, from above: log q varies as kappa cos t, of a scale below kappa
    assert loss == pytest.approx(expected, abs=1e-9 if estimator is TraceMeanField_ELBO else spread)


def test_a_diverged_run_ends():
    nan = torch.full((3,), math.nan, dtype=torch.float64)
    assert VonMisesFisher(unit(3, 4), nan, validate_args=False).sample().isnan().all()


def test_second_derivatives_are_refused():
    kappa = tensor(2.0).requires_grad_()
    x = VonMisesFisher(unit(3), kappa).rsample()
    (gradient,) = torch.autograd.grad(x[0], kappa, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.backward()


def test_errors():
    with pytest.raises(ValueError, match="dim > 1, got 1"):
        UniformSphere(1)
    with pytest.raises(ValueError, match=r"d > 1, got \(5, 1\)"):
        VonMisesFisher(torch.ones(5, 1), torch.ones(5))
    with pytest.raises(ValueError, match="loc"):
        VonMisesFisher(torch.ones(3), torch.ones(()))
    with pytest.raises(ValueError, match="concentration"):
        VonMisesFisher(unit(3), tensor(-1.0))
    with pytest.raises(ValueError, match="support"):
        UniformSphere(3).log_prob(torch.ones(3))
    with pytest.raises(ValueError, match="support"):
        VonMisesFisher(unit(3), tensor(1.0)).log_prob(torch.ones(3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"one event shape, got \(3,\) and \(4,\)"):
        kl_divergence(VonMisesFisher(unit(3), tensor(1.0)), UniformSphere(4))
