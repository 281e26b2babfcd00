"""Exact models, written by hand as Pyro programs: they keep the conventions and use no class of the package."""

import math

import pyro
import pyro.distributions as dist
import torch
from torch import nn

from pyro_vae.programs import declare_parameters


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
