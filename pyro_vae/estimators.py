"""Log-weights, of which every estimator of the evidence is made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_vae.handlers import in_data_plate

__all__ = ["LogProbabilities", "log_probabilities", "log_weights"]


class LogProbabilities(NamedTuple):
    """Log-probabilities of particles z ~ q(z given x), each of shape `(K, B)`, in nats.

    Attributes:
        prior: log p(z).
        likelihood: log p(x given z).
        posterior: log q(z given x).
    """

    prior: Tensor
    likelihood: Tensor
    posterior: Tensor


def log_probabilities(model: Callable, guide: Callable, *batch: Any, num_particles: int = 1) -> LogProbabilities:
    """Draw particles from the guide and give their log-probabilities, datum by datum.

    They are *unscaled*: neither the scale of a subsampled plate nor `handlers.beta` enters. Masks do. Sites outside the
    plate named "data" belong to no datum and are left out.

    Args:
        model: A Pyro model that keeps its local sites in one plate named "data", `dim=-1`.
        guide: Its guide.
        *batch: Arguments of both.
        num_particles: Number `K` of particles, an outer plate at `dim=-2`.

    Raises:
        ValueError: If no site is in a plate named "data".

    Example:
        >>> import pyro_vae
        >>> vae = pyro_vae.build((8, 8), latent=2)
        >>> log_probabilities(vae.model, vae.guide, torch.zeros(5, 8, 8), num_particles=3).prior.shape
        torch.Size([3, 5])
    """
    particles = pyro.plate("particles", num_particles, dim=-2)
    guide_trace = poutine.trace(particles(guide)).get_trace(*batch)
    model_trace = poutine.trace(poutine.replay(particles(model), trace=guide_trace)).get_trace(*batch)
    return LogProbabilities(
        prior=_sum_per_datum(model_trace, num_particles, observed=False),
        likelihood=_sum_per_datum(model_trace, num_particles, observed=True),
        posterior=_sum_per_datum(guide_trace, num_particles, observed=False),
    )


def log_weights(model: Callable, guide: Callable, *batch: Any, num_particles: int = 1) -> Tensor:
    r"""Importance log-weights of particles, datum by datum.

    .. math:: \log w_{kb} = \log p(x_b, z_{kb}) - \log q(z_{kb} \mid x_b), \quad z_{kb} \sim q(z \mid x_b)

    Args:
        model: A Pyro model that keeps its local sites in one plate named "data", `dim=-1`.
        guide: Its guide.
        *batch: Arguments of both.
        num_particles: Number `K` of particles.

    Returns:
        A tensor of shape `(K, B)`, in nats, unscaled (see `log_probabilities`).

    Reference:
        Burda, Grosse and Salakhutdinov, 2016. Importance weighted autoencoders.

    Example:
        >>> import pyro_vae
        >>> vae = pyro_vae.build((8, 8), latent=2)
        >>> log_weights(vae.model, vae.guide, torch.zeros(5, 8, 8), num_particles=3).shape
        torch.Size([3, 5])
    """
    log_p = log_probabilities(model, guide, *batch, num_particles=num_particles)
    return log_p.prior + log_p.likelihood - log_p.posterior


def _sum_per_datum(trace: Any, num_particles: int, observed: bool) -> Tensor:
    sites = [
        site
        for site in trace.nodes.values()
        if site["type"] == "sample"
        and site["is_observed"] == observed
        and in_data_plate(site)
        and not site_is_subsample(site)
    ]
    if not sites:
        kind = "observed" if observed else "latent"
        raise ValueError(
            f'expected {kind} sites in a plate named "data" at dim=-1, got sites {list(trace.nodes)[1:-1]}'
        )
    total = sum(scale_and_mask(site["fn"].log_prob(site["value"]), mask=site["mask"]) for site in sites)
    return torch.as_tensor(total).expand(num_particles, -1)
