"""One line a component: what the contract of `test_components.py` is checked on. A new component costs one line."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from pyro_vae import likelihoods, networks, posteriors, priors, schedules
from pyro_vae.distributions import import_zuko

LATENT = 2  # small enough for quadrature over the whole space
DATUM = (2, 3)  # shape of the data that posteriors take
VALUES = (2, 1)  # event shape of likelihoods: two values, in the shape of an image's column


class Line(NamedTuple):
    """A component: what makes it, the shape of one input (None if it takes none), and its event shape."""

    make: Callable[[], Any]
    in_shape: tuple[int, ...] | None
    event_shape: tuple[int, ...]


def prior(cls: type, latent: int = LATENT, *arguments: Any, **options: Any) -> Line:
    """A line for a prior."""
    return Line(lambda: cls(latent, *arguments, **options), None, (latent,))


def likelihood(cls: type, event_shape: tuple[int, ...] = VALUES, **options: Any) -> Line:
    """A line for a likelihood, with a network of the size that it asks for."""
    given = options if "parts" in options else {"event_shape": event_shape, **options}
    return Line(lambda: _with_network(cls, LATENT, given), (LATENT,), event_shape)


def posterior(cls: type, latent: int = LATENT, **options: Any) -> Line:
    """A line for a posterior, with a network of the size that it asks for."""
    return Line(lambda: _with_network(cls, DATUM, {"latent": latent, **options}), DATUM, (latent,))


def _with_network(cls: type, in_features: Any, options: dict[str, Any]) -> Any:
    num_outputs = cls(net=nn.Identity(), **options).num_outputs
    return cls(net=networks.MLP(in_features, num_outputs, hidden=(6,), activation="tanh"), **options)


def _vamp_prior(pseudo_inputs: Any) -> Line:
    make = posterior(posteriors.DiagonalNormal).make
    return Line(lambda: priors.VampPrior(make(), pseudo_inputs), None, (LATENT,))


def _semi_amortized() -> Any:
    base = posterior(posteriors.DiagonalNormal).make()
    decoder = likelihood(likelihoods.Bernoulli, DATUM).make()
    return posteriors.SemiAmortized(base, decoder, priors.StandardNormal(LATENT), steps=2)


_flows = import_zuko().flows
_classes = functools.partial(likelihoods.Categorical, num_classes=3)
_small = {"transforms": 2, "hidden_features": (6,)}

PRIORS = {
    "ARD": prior(priors.ARD),
    "Bernoulli": prior(priors.Bernoulli, 3),
    "DiagonalNormal": prior(priors.DiagonalNormal),
    "Flow": prior(priors.Flow),
    "Flow of splines": prior(priors.Flow, flow=functools.partial(_flows.NSF, **_small)),
    "GaussianMixture": prior(priors.GaussianMixture, components=3),
    "Laplace": prior(priors.Laplace),
    "OneHotCategorical": prior(priors.OneHotCategorical, 3),
    "OneHotCategorical in groups": prior(priors.OneHotCategorical, 6, classes=3),
    "RelaxedOneHotCategorical": prior(priors.RelaxedOneHotCategorical),
    "RelaxedOneHotCategorical in groups": prior(priors.RelaxedOneHotCategorical, 4, classes=2, temperature=0.8),
    "StandardNormal": prior(priors.StandardNormal),
    "StudentT": prior(priors.StudentT),
    "UniformSphere": prior(priors.UniformSphere),
    "VampPrior": _vamp_prior((3, DATUM)),
    "VampPrior from data": _vamp_prior(torch.linspace(-2, 2, 18).reshape(3, *DATUM)),
}

LIKELIHOODS = {
    "Autoregressive": likelihood(likelihoods.Autoregressive, (1, 2, 2), channels=4, blocks=1, kernel_size=3),
    "Autoregressive of classes": likelihood(likelihoods.Autoregressive, (1, 2, 2), channels=4, pixel=_classes),
    "Bernoulli": likelihood(likelihoods.Bernoulli),
    "Beta": likelihood(likelihoods.Beta),
    "Binomial": likelihood(likelihoods.Binomial, total_count=4),
    "Categorical": likelihood(likelihoods.Categorical, num_classes=3),
    "ContinuousBernoulli": likelihood(likelihoods.ContinuousBernoulli),
    "DiscretizedLogistic": likelihood(likelihoods.DiscretizedLogistic, bins=9),
    "DiscretizedLogisticMixture": likelihood(likelihoods.DiscretizedLogisticMixture, components=2, bins=9),
    "Gamma": likelihood(likelihoods.Gamma),
    "Gaussian": likelihood(likelihoods.Gaussian),
    "Gaussian of a global scale": likelihood(likelihoods.Gaussian, scale="global"),
    "Gaussian of a given scale": likelihood(likelihoods.Gaussian, scale=0.5),
    "Gaussian of the optimal scale": likelihood(likelihoods.Gaussian, scale="optimal"),
    "Heterogeneous": likelihood(likelihoods.Heterogeneous, (2,), parts={"a": likelihoods.Gamma, "b": _classes}),
    "Heterogeneous in groups": likelihood(likelihoods.Heterogeneous, (2,), parts={("a", "b"): likelihoods.Gaussian}),
    "Laplace": likelihood(likelihoods.Laplace),
    "LogNormal": likelihood(likelihoods.LogNormal),
    "NegativeBinomial": likelihood(likelihoods.NegativeBinomial),
    "NegativeBinomial with exposure": likelihood(likelihoods.NegativeBinomial, exposure=True),
    "Poisson": likelihood(likelihoods.Poisson),
    "Poisson with exposure": likelihood(likelihoods.Poisson, exposure=True),
    "StudentT": likelihood(likelihoods.StudentT),
    "ZeroInflatedNegativeBinomial": likelihood(likelihoods.ZeroInflatedNegativeBinomial),
    "ZeroInflatedNegativeBinomial with exposure": likelihood(likelihoods.ZeroInflatedNegativeBinomial, exposure=True),
    "ZeroInflatedPoisson": likelihood(likelihoods.ZeroInflatedPoisson),
    "ZeroInflatedPoisson with exposure": likelihood(likelihoods.ZeroInflatedPoisson, exposure=True),
}

POSTERIORS = {
    "Bernoulli": posterior(posteriors.Bernoulli, 3),
    "DiagonalNormal": posterior(posteriors.DiagonalNormal),
    "Flow": posterior(posteriors.Flow, context=4),
    "Flow of coupling layers": posterior(posteriors.Flow, context=4, flow=functools.partial(_flows.RealNVP, **_small)),
    "FullNormal": posterior(posteriors.FullNormal),
    "Laplace": posterior(posteriors.Laplace),
    "LowRankNormal": posterior(posteriors.LowRankNormal),
    "LowRankNormal of rank 1": posterior(posteriors.LowRankNormal, rank=1),
    "Mixture": posterior(posteriors.Mixture),
    "OneHotCategorical": posterior(posteriors.OneHotCategorical, 3),
    "OneHotCategorical in groups": posterior(posteriors.OneHotCategorical, 6, classes=3),
    "RelaxedOneHotCategorical": posterior(posteriors.RelaxedOneHotCategorical),
    "RelaxedOneHotCategorical in groups": posterior(
        posteriors.RelaxedOneHotCategorical, 4, classes=2, temperature=schedules.Linear(1.0, start=0.8, end=0.5)
    ),
    "SemiAmortized": Line(_semi_amortized, DATUM, (LATENT,)),
    "VonMisesFisher": posterior(posteriors.VonMisesFisher),
}

_net = networks.MLP(2, 6, hidden=())
_x = torch.zeros(2)


def _refined(**options):
    base = posteriors.DiagonalNormal(_net, 3)
    decoder = likelihoods.Bernoulli(networks.MLP(6, 2, hidden=()), (2,))
    return posteriors.SemiAmortized(
        **{"base": base, "likelihood": decoder, "prior": priors.StandardNormal(3), **options}
    )


# Options that are no good, with the error that says so.
BAD = [
    (lambda: priors.StandardNormal(0), "StandardNormal: expected latent > 0, got 0"),
    (lambda: priors.Bernoulli(-1), "Bernoulli: expected latent > 0, got -1"),
    (lambda: priors.ARD(0), "ARD: expected latent > 0, got 0"),
    (lambda: priors.GaussianMixture(2, components=0), "GaussianMixture: expected components > 0, got 0"),
    (lambda: priors.StudentT(2, df=0.0), "StudentT: expected df > 0, got 0.0"),
    (lambda: priors.StudentT(2, df=math.nan), "StudentT: expected df > 0, got nan"),
    (lambda: priors.Flow(1), "Flow: expected latent > 1, got 1"),
    (lambda: priors.UniformSphere(1), "UniformSphere: expected latent > 1, got 1"),
    (lambda: priors.OneHotCategorical(5, classes=2), "OneHotCategorical: expected latent to be groups"),
    (lambda: priors.OneHotCategorical(1), "OneHotCategorical: expected latent to be groups"),
    (lambda: priors.RelaxedOneHotCategorical(4, temperature=0.0), "expected temperature >= 1/3, got 0"),
    (lambda: priors.VampPrior(nn.Identity()), "VampPrior: expected pseudo_inputs .* got 500 of shape None"),
    (lambda: priors.VampPrior(nn.Identity(), (0, (2,))), "VampPrior: expected pseudo_inputs .* got 0 of shape"),
    (lambda: posteriors.DiagonalNormal(_net, 0), "DiagonalNormal: expected latent > 0, got 0"),
    (lambda: posteriors.LowRankNormal(_net, 2, rank=0), "LowRankNormal: expected rank > 0, got 0"),
    (lambda: posteriors.Mixture(_net, 2, components=0), "Mixture: expected components > 0, got 0"),
    (lambda: posteriors.Flow(_net, 1), "Flow: expected latent > 1 .* got latent=1, context=32"),
    (lambda: posteriors.Flow(_net, 2, context=0), "Flow: expected .* got latent=2, context=0"),
    (lambda: posteriors.VonMisesFisher(_net, 1), "VonMisesFisher: expected latent > 1, got 1"),
    (
        lambda: posteriors.OneHotCategorical(_net, 5, classes=2),
        "OneHotCategorical: expected .* got latent=5, classes=2",
    ),
    (lambda: posteriors.OneHotCategorical(_net, 1), "OneHotCategorical: expected .* got latent=1, classes=None"),
    (lambda: posteriors.RelaxedOneHotCategorical(_net, 4, temperature=-1.0), "expected temperature >= 1/3, got -1.0"),
    (lambda: _refined(base=_net), "SemiAmortized: expected a base such as DiagonalNormal, got MLP"),
    (lambda: _refined(prior=priors.ARD(2)), "SemiAmortized: expected a prior without global latents"),
    (lambda: _refined(steps=0), "SemiAmortized: expected positive steps, lr, max_norm; got steps=0, lr=0.1"),
    (lambda: _refined(lr=-1.0), "SemiAmortized: expected positive steps, lr, max_norm; got steps=5, lr=-1.0"),
    (lambda: _refined(base=posteriors.Bernoulli(_net, 6))(_x), "SemiAmortized: expected a base with reparam.* got"),
    (lambda: posteriors.DiagonalNormal(_net, 2)(_x), r"DiagonalNormal: expected 4 values .* got shape \(6,\)"),
    (lambda: likelihoods.Gaussian(_net, (2,), scale="other"), "Gaussian: expected scale .* got 'other'"),
    (lambda: likelihoods.Gaussian(_net, (2,), scale=0.0), "Gaussian: expected scale .* got 0.0"),
    (lambda: likelihoods.Gaussian(_net, (2,), scale=True), "Gaussian: expected scale .* got True"),
    (lambda: likelihoods.Categorical(_net, (2,), num_classes=1), "Categorical: expected num_classes > 1, got 1"),
    (lambda: likelihoods.Binomial(_net, (2,), total_count=0), "Binomial: expected total_count > 0, got 0"),
    (lambda: likelihoods.DiscretizedLogistic(_net, (2,), bins=1), "DiscretizedLogistic: expected bins > 1, got 1"),
    (
        lambda: likelihoods.DiscretizedLogisticMixture(_net, (2,), bins=1),
        "DiscretizedLogisticMixture: expected bins > 1",
    ),
    (lambda: likelihoods.DiscretizedLogisticMixture(_net, (2,), 0), "expected components > 0, got 0"),
    (lambda: likelihoods.Bernoulli(_net, (5,))(_x), r"network output: expected 5 values .* got shape \(6,\)"),
    (lambda: likelihoods.Poisson(_net, (6,), True)(_x, torch.tensor(0.0)), "exposure: expected values above 0, got 0"),
    (
        lambda: likelihoods.Poisson(_net, (6,), True)(_x, torch.tensor(math.nan)),
        "exposure: expected values above 0, got nan",
    ),
]
