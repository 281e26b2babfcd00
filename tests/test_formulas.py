"""The parameters of components are what their documentation says: densities against those of scipy."""

import numpy as np
import pytest
import torch
from contract import LIKELIHOODS
from scipy import special, stats
from torch import nn

from pyro_vae import likelihoods, posteriors

exp, expit = np.exp, special.expit
FORMULAS = {  # name: log-probability of values x under the documented parameters, the outputs of the network
    "Bernoulli": lambda x, a: stats.bernoulli.logpmf(x, expit(a)),
    "Beta": lambda x, a, b: stats.beta.logpdf(x, expit(a) * exp(b), expit(-a) * exp(b)),
    "Binomial": lambda x, a: stats.binom.logpmf(x, 4, expit(a)),
    "Categorical": lambda x, *a: np.choose(x.astype(int), special.log_softmax(a, 0)),
    "ContinuousBernoulli": lambda x, a: a * x + np.log(a / np.expm1(a)),
    "DiscretizedLogistic": lambda x, a, b: np.log(bin_of_a_logistic(x, a, b)),
    "DiscretizedLogisticMixture": lambda x, a, b, c, d, e, f: np.log(
        expit(e - f) * bin_of_a_logistic(x, a, c) + expit(f - e) * bin_of_a_logistic(x, b, d)
    ),
    "Gamma": lambda x, a, b: stats.gamma.logpdf(x, exp(b), scale=exp(a - b)),
    "Gaussian": lambda x, a, b: stats.norm.logpdf(x, a, exp(b / 2)),
    "Gaussian of a given scale": lambda x, a: stats.norm.logpdf(x, a, 0.5),
    "Laplace": lambda x, a, b: stats.laplace.logpdf(x, a, exp(b / 2)),
    "LogNormal": lambda x, a, b: stats.lognorm.logpdf(x, exp(b / 2), scale=exp(a)),
    "NegativeBinomial": lambda x, a, b: stats.nbinom.logpmf(x, exp(b), 1 / (1 + exp(a - b))),
    "NegativeBinomial with exposure": lambda x, a, b: stats.nbinom.logpmf(x, exp(b), 1 / (1 + 3 * exp(a - b))),
    "Poisson": lambda x, a: stats.poisson.logpmf(x, exp(a)),
    "Poisson with exposure": lambda x, a: stats.poisson.logpmf(x, 3 * exp(a)),
    "StudentT": lambda x, a, b, c: stats.t.logpdf(x, 2 + exp(c), a, exp(b / 2)),
    "ZeroInflatedNegativeBinomial": lambda x, a, b, c: gated(x, c, stats.nbinom.pmf(x, exp(b), 1 / (1 + exp(a - b)))),
    "ZeroInflatedPoisson": lambda x, a, c: gated(x, c, stats.poisson.pmf(x, exp(a))),
}


def gated(x, logit, probability):
    return np.log(expit(logit) * (x == 0) + expit(-logit) * probability)


def bin_of_a_logistic(x, loc, log_scale):
    edges = stats.logistic(0.5 + loc, 0.1 * exp(log_scale)).cdf
    return np.where(x == 1, 1, edges(x + 1 / 16)) - np.where(x == 0, 0, edges(x - 1 / 16))


@pytest.mark.parametrize("name", FORMULAS)
def test_likelihoods_are_their_formulas(name):
    """Against scipy, to 1e-6, at draws of 100 data of two values."""
    torch.manual_seed(0)
    module = LIKELIHOODS[name].make().double()
    outputs = torch.randn(100, module.num_params, 2, dtype=torch.float64)
    exposure = (torch.full((100,), 3.0, dtype=torch.float64),) if getattr(module, "exposure", False) else ()
    fn = module.from_outputs(outputs.flatten(1), (100,), *exposure)
    value = fn.sample()
    exact = FORMULAS[name](value.double().numpy()[..., 0], *outputs.numpy().swapaxes(0, 1))
    np.testing.assert_allclose(fn.log_prob(value).numpy(), exact.sum(-1), rtol=1e-6, atol=1e-6)


def test_covariances_of_normal_posteriors():
    torch.manual_seed(0)
    full, low = (cls(nn.Identity(), 3) for cls in (posteriors.FullNormal, posteriors.LowRankNormal))
    mean, log_variance, entries, more = torch.randn(4, 3, dtype=torch.float64)
    lower = torch.eye(3, dtype=torch.float64)
    lower[1, 0], lower[2, 0], lower[2, 1] = entries / 10
    sigma = torch.diag((log_variance / 2).exp())
    fn = full.distribution(torch.cat((mean, log_variance, entries)))
    torch.testing.assert_close(fn.covariance_matrix, sigma @ lower @ lower.T @ sigma)
    columns = torch.stack((entries, more), -1) / 10
    fn = low.distribution(torch.cat((mean, log_variance, entries, more)))
    torch.testing.assert_close(fn.covariance_matrix, sigma @ (torch.eye(3) + columns @ columns.T) @ sigma)
    torch.testing.assert_close(fn.mean, mean)


def test_a_low_rank_at_its_bound_is_known_in_float32():
    """A draw's density to 0.1 nats, with columns of the low rank that are alike and such that are not."""
    posterior = posteriors.LowRankNormal(nn.Identity(), 20, rank=3)
    for signs in (torch.ones(60), torch.randn(60).sign()):
        outputs = torch.cat((torch.zeros(20), torch.randn(20), 1e6 * signs))
        fn, exact = posterior.distribution(outputs), posterior.distribution(outputs.double())
        value = fn.sample()
        assert fn.log_prob(value).item() == pytest.approx(exact.log_prob(value.double()).item(), abs=0.1)


@pytest.mark.parametrize("name", ["Poisson", "Binomial", "NegativeBinomial"])
def test_large_counts_keep_their_digits_in_float32(name):
    """A million's log-probability is a difference of numbers of ten million, of which float32 leaves nats."""
    options = {"total_count": 10_000_000} if name == "Binomial" else {}
    likelihood = getattr(likelihoods, name)(nn.Identity(), (1,), **options)
    x = torch.tensor([1e6])
    outputs = likelihood.first_parameter(x).reshape(1) if name == "Binomial" else x.log()
    fn = likelihood.from_outputs(torch.cat([outputs, torch.zeros(likelihood.num_outputs - 1)]), ())
    mean = fn.mean.double().numpy()
    expected = {
        "Poisson": lambda: stats.poisson.logpmf(1e6, mean),
        "Binomial": lambda: stats.binom.logpmf(1e6, 1e7, mean / 1e7),
        "NegativeBinomial": lambda: stats.nbinom.logpmf(1e6, 1, 1 / (1 + mean)),
    }[name]()
    assert fn.log_prob(x).dtype == torch.float32
    np.testing.assert_allclose(fn.log_prob(x).numpy(), expected[0], rtol=2e-3)
