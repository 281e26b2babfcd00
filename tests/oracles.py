"""Exact models, written by hand as Pyro programs: they keep the conventions and use no class of the package."""

import math

import pyro
import pyro.distributions as dist
import torch
from torch import nn

from pyro_vae.programs import data_plate, declare_parameters


class LinearGaussian(nn.Module):
    """z ~ N(0, I), x ~ N(Wz + b, s^2 I): all is normal. The guide is the posterior, its scale off by `scale`."""

    def __init__(self, latent=2, features=3, noise=0.7, scale=1.0):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        weight = torch.randn(features, latent, generator=generator, dtype=torch.float64)
        # Orthogonal columns make the posterior's covariance diagonal.
        self.weight = nn.Parameter(torch.linalg.qr(weight)[0] * torch.tensor([1.5, 0.8], dtype=torch.float64)[:latent])
        self.bias = nn.Parameter(torch.randn(features, generator=generator, dtype=torch.float64))
        self.noise, self.scale, self.latent = noise, scale, latent
        self.size = None

    def model(self, x):
        declare_parameters(self)
        with pyro.plate("data", self.size or len(x), subsample_size=len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.latent), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.weight.T + self.bias, self.noise).to_event(1), obs=x)

    def guide(self, x):
        declare_parameters(self)
        mean, std = self.posterior(x)
        with pyro.plate("data", self.size or len(x), subsample_size=len(x), dim=-1):
            pyro.sample("z", dist.Normal(mean, self.scale * std).to_event(1))

    def posterior(self, x):
        precision = 1 + (self.weight**2).sum(0) / self.noise**2
        return (x - self.bias) @ self.weight / self.noise**2 / precision, precision.rsqrt().expand(len(x), -1)

    def evidence(self, x):
        covariance = self.weight @ self.weight.T + self.noise**2 * torch.eye(len(self.bias), dtype=x.dtype)
        return dist.MultivariateNormal(self.bias, covariance).log_prob(x)

    def rate(self, x):
        mean, std = self.posterior(x)
        std = self.scale * std
        return 0.5 * (mean**2 + std**2 - 1 - 2 * std.log()).sum(-1)

    def distortion(self, x):
        mean, std = self.posterior(x)
        error = ((x - self.bias - mean @ self.weight.T) ** 2).sum(-1)
        spread = ((self.scale * std) ** 2 * (self.weight**2).sum(0)).sum(-1)
        return (error + spread) / (2 * self.noise**2) + 0.5 * x.shape[1] * math.log(2 * math.pi * self.noise**2)


class Mixture(nn.Module):
    """z in {0, 1, 2}, x Bernoulli: the evidence is a sum of three terms. The guide is one q(z) for all x."""

    def __init__(self):
        super().__init__()
        self.prior = nn.Parameter(torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log())
        self.logits = nn.Parameter(torch.tensor([[-1.0, 2.0], [0.5, 0.0], [3.0, -2.0]], dtype=torch.float64))
        self.posterior = nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def model(self, x):
        declare_parameters(self)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Categorical(logits=self.prior))
            pyro.sample("x", dist.Bernoulli(logits=self.logits[z]).to_event(1), obs=x)

    def guide(self, x):
        declare_parameters(self)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Categorical(logits=self.posterior))

    def evidence(self, x):
        terms = dist.Bernoulli(logits=self.logits).to_event(1).log_prob(x[:, None]) + self.prior.log_softmax(0)
        return terms.logsumexp(-1)


class TwoLatents(nn.Module):
    """A chain z2 -> z1 -> x with a two-site guide and networks: nothing of it is the package's."""

    def __init__(self, features=64):
        super().__init__()
        self.features = features
        self.up = nn.Linear(features, 8)
        self.top = nn.Linear(4, 4)
        self.middle = nn.Linear(2, 8)
        self.down = nn.Linear(4, features)

    def model(self, x):
        declare_parameters(self)
        with pyro.plate("data", len(x), dim=-1):
            z2 = pyro.sample("z2", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            loc, raw = self.middle(z2).chunk(2, -1)
            z1 = pyro.sample("z1", dist.Normal(loc, nn.functional.softplus(raw) + 0.1).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.down(z1)).to_event(1), obs=x.flatten(1))

    def guide(self, x):
        declare_parameters(self)
        with pyro.plate("data", len(x), dim=-1):
            loc, raw = self.up(x.flatten(1)).chunk(2, -1)
            z1 = pyro.sample("z1", dist.Normal(loc, nn.functional.softplus(raw) + 0.1).to_event(1))
            loc, raw = self.top(z1).chunk(2, -1)
            pyro.sample("z2", dist.Normal(loc, nn.functional.softplus(raw) + 0.1).to_event(1))


class ProbabilisticPCA(nn.Module):
    """z ~ N(0, I), x ~ N(Wz + b, s^2 I), with a guide of its own, diagonal and linear in x: N(Ax + c, diag(t^2)).

    At the maximum-likelihood solution (Tipping and Bishop, 1999) columns of W are orthogonal: the guide can be exact.
    """

    def __init__(self, latent=1, features=2, size=None):
        super().__init__()
        generator = torch.Generator().manual_seed(2)

        def parameter(*shape, offset=0.0):
            return nn.Parameter(offset + 0.5 * torch.randn(shape, generator=generator, dtype=torch.float64))

        self.weight, self.bias, self.log_noise = parameter(features, latent), parameter(features), parameter()
        self.slope, self.shift = parameter(latent, features), parameter(latent)
        self.log_scale = parameter(latent, offset=-0.5)
        self.latent, self.size = latent, size

    def plate(self, x):
        return data_plate(x, self.size)

    def model(self, x):
        declare_parameters(self)
        with self.plate(x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.latent), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.weight.T + self.bias, self.log_noise.exp()).to_event(1), obs=x)

    def guide(self, x):
        declare_parameters(self)
        with self.plate(x):
            pyro.sample("z", dist.Normal(x @ self.slope.T + self.shift, self.log_scale.exp()).to_event(1))

    def evidence(self, x):
        covariance = self.weight @ self.weight.T + (2 * self.log_noise).exp() * torch.eye(len(self.bias), dtype=x.dtype)
        return dist.MultivariateNormal(self.bias, covariance).log_prob(x)

    def log_weights(self, x, noise):
        """Log p(x, z) - log q(z given x) at z = Ax + c + t * noise, by hand; noise of shape (K, B, latent)."""
        z = x @ self.slope.T + self.shift + self.log_scale.exp() * noise
        error = (x - z @ self.weight.T - self.bias) / self.log_noise.exp()
        log_likelihood = -0.5 * (error**2 + math.log(2 * math.pi)).sum(-1) - x.shape[-1] * self.log_noise
        log_prior = -0.5 * (z**2 + math.log(2 * math.pi)).sum(-1)
        log_posterior = -0.5 * (noise**2 + math.log(2 * math.pi)).sum(-1) - self.log_scale.sum()
        return log_prior + log_likelihood - log_posterior

    def to_maximum_likelihood(self, x):
        """Set the model to the maximum-likelihood solution for `x`, and the guide to its exact posterior."""
        covariance = torch.cov(x.T, correction=0)
        values, vectors = torch.linalg.eigh(covariance)
        values, vectors = values.flip(0), vectors.flip(1)
        variance = values[self.latent :].mean()
        with torch.no_grad():
            self.bias.copy_(x.mean(0))
            self.weight.copy_(vectors[:, : self.latent] * (values[: self.latent] - variance).sqrt())
            self.log_noise.copy_(0.5 * variance.log())
            precision = 1 + (self.weight**2).sum(0) / variance
            self.slope.copy_((self.weight / variance / precision).T)
            self.shift.copy_(-self.slope @ self.bias)
            self.log_scale.copy_(-0.5 * precision.log())
        return self


class TwoSites(nn.Module):
    """A chain z2 -> z1 -> x of normals, of one dimension each, whose exact posterior is a chain z1 -> z2 given x.

    The guide is q(z1 given x) q(z2 given z1, x): at `exact=True` the posterior.
    """

    def __init__(self, exact=False):
        super().__init__()
        values = {
            "couple": 0.8,
            "weight": [1.1, -0.6],
            "slope": [0.5, 0.2],
            "log_scale": -0.4,
            "back": 0.4,
            "log_back": -0.3,
        }
        for name, value in values.items():
            setattr(self, name, nn.Parameter(torch.tensor(value, dtype=torch.float64)))
        self.exact = exact
        if exact:  # z1 ~ N(0, 1 + couple^2), x | z1 ~ N(weight z1, I); z2 | z1 is independent of x
            variance = 1 + self.couple.detach() ** 2
            precision = 1 / variance + (self.weight.detach() ** 2).sum()
            with torch.no_grad():
                self.slope.copy_(self.weight / precision)
                self.log_scale.copy_(-0.5 * precision.log())
                self.back.copy_(self.couple / variance)
                self.log_back.copy_(-0.5 * variance.log())

    def model(self, x):
        declare_parameters(self)
        with pyro.plate("data", len(x), dim=-1):
            z2 = pyro.sample("z2", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            z1 = pyro.sample("z1", dist.Normal(self.couple * z2, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z1 * self.weight, 1.0).to_event(1), obs=x)

    def guide(self, x):
        declare_parameters(self)
        with pyro.plate("data", len(x), dim=-1):
            z1 = pyro.sample("z1", dist.Normal((x @ self.slope)[..., None], self.log_scale.exp()).to_event(1))
            pyro.sample("z2", dist.Normal(self.back * z1, self.log_back.exp()).to_event(1))

    def evidence(self, x):
        covariance = (1 + self.couple**2) * torch.outer(self.weight, self.weight) + torch.eye(2, dtype=x.dtype)
        return dist.MultivariateNormal(x.new_zeros(2), covariance).log_prob(x)


class GlobalMean(nn.Module):
    """A global mean m ~ N(0, 1) and, for each datum, z ~ N(m, 1), x ~ N(z, 1). The guide is the exact posterior."""

    def __init__(self, num_data):
        super().__init__()
        # Of the sum of all data: m given x is normal with precision 1 + N/2 and mean sum(x)/2 over that.
        self.slope = nn.Parameter(torch.tensor(0.5 / (1 + num_data / 2), dtype=torch.float64))
        self.log_scale = nn.Parameter(-0.5 * torch.tensor(1 + num_data / 2, dtype=torch.float64).log())
        self.log_local = nn.Parameter(torch.tensor(0.5, dtype=torch.float64).log() / 2)
        self.log_noise = nn.Parameter(torch.tensor(0.0, dtype=torch.float64))

    def model(self, x):
        declare_parameters(self)
        m = pyro.sample("m", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(m, 1.0))
            pyro.sample("x", dist.Normal(z, self.log_noise.exp()), obs=x)

    def guide(self, x):
        declare_parameters(self)
        m = pyro.sample("m", dist.Normal(self.slope * x.sum(), self.log_scale.exp()))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal((m + x) / 2, self.log_local.exp()))

    def evidence(self, x):
        """Of all data together, a scalar."""
        covariance = 2 * torch.eye(len(x), dtype=x.dtype) + 1
        return dist.MultivariateNormal(torch.zeros_like(x), covariance).log_prob(x)
