"""Pyro's own `SVI` on a Pyro program, as in Pyro's VAE example, but with data in memory and logits."""

from statistics import fmean

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, RenyiELBO, Trace_ELBO
from torch import nn

from .work import batches, networks


class VAE(nn.Module):
    """Standard normal prior, normal posterior, Bernoulli likelihood."""

    def __init__(self, work):
        super().__init__()
        self.encoder, self.decoder = networks(work)
        self.latent = work.latent

    def model(self, x):
        """The joint density p(z) p(x given z)."""
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            zeros = x.new_zeros(len(x), self.latent)
            z = pyro.sample("z", dist.Normal(zeros, 1).to_event(1))
            logits = self.decoder(z)
            pyro.sample("x", dist.Bernoulli(logits=logits, validate_args=False).to_event(x.ndim - 1), obs=x)

    def guide(self, x):
        """The posterior q(z given x)."""
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            mean, log_variance = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(mean, torch.exp(0.5 * log_variance)).to_event(1))


def trainer(work, x):
    """Epochs of `SVI.step`, which reads the loss back."""
    pyro.clear_param_store()
    vae = VAE(work)
    loss = Trace_ELBO() if work.particles == 1 else RenyiELBO(0, work.particles, vectorize_particles=True)
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), loss=loss)
    return lambda: fmean(svi.step(batch) / work.batch_size for batch in batches(x, work.batch_size))
