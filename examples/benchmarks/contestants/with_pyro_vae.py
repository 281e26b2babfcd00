"""This package."""

from itertools import islice
from statistics import fmean

from pyro.infer import Trace_ELBO

from pyro_vae import VAE, likelihoods, posteriors, priors
from pyro_vae.estimators import IWAE
from pyro_vae.training import steps

from .work import networks


def program(work):
    """The program of a work."""
    encoder, decoder = networks(work)
    return VAE(
        prior=priors.StandardNormal(work.latent),
        likelihood=likelihoods.Bernoulli(decoder, work.event_shape),
        posterior=posteriors.DiagonalNormal(encoder, work.latent),
    )


def trainer(work, x, **options):
    """Epochs of `steps`, whose loss is read back at each."""
    estimator = Trace_ELBO() if work.particles == 1 else IWAE(work.particles)
    options = {"estimator": estimator, "batch_size": work.batch_size, "device": "cpu", **options}
    taken = steps(program(work), x, epochs=10**6, **options)
    return lambda: fmean(step.loss for step in islice(taken, len(x) // work.batch_size))
