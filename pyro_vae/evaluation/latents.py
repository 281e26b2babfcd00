"""What the posterior makes of each datum: means of the latents, and how many the data move."""

from __future__ import annotations

from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.evaluation.batches import checked_batches
from pyro_vae.evaluation.generation import mean_of
from pyro_vae.handlers import in_data_plate
from pyro_vae.programs import Program, undisturbed

__all__ = ["active_units", "posterior_means"]


def posterior_means(program: Program, data: Any, *, seed: int = 0) -> Tensor:
    """The posterior mean of each datum's latents, all local latent sites side by side.

    A posterior without a mean in closed form is averaged over 100 draws.

    Args:
        program: Any program that keeps its local sites in one plate named "data".
        data: Tensor, array, `Dataset` or `DataLoader`.
        seed: Seed of the draws.

    Returns:
        A tensor of shape `(N, latent)`.

    Example:
        >>> import pyro_vae
        >>> posterior_means(pyro_vae.build((8, 8), latent=2), torch.ones(3, 8, 8)).shape
        torch.Size([3, 2])
    """
    means = []
    with undisturbed(program, seed), pyro.validation_enabled(False):
        for batch in checked_batches(program, data, 1).epoch(0):
            trace: Any = poutine.trace(program.guide).get_trace(*batch)
            sites = [s for s in trace.nodes.values() if s["type"] == "sample" and in_data_plate(s)]
            latents = [mean_of(site["fn"]) for site in sites if not site["is_observed"]]
            means.append(torch.cat([mean.reshape(len(mean), -1).cpu() for mean in latents], 1))
    return torch.cat(means)


def active_units(program: Program, data: Any, threshold: float = 0.01) -> int:
    r"""The number of latent dimensions that the data move.

    .. math:: \#\{d : \operatorname{Var}_x(E_{q(z \mid x)}[z_d]) > \text{threshold}\}

    Args:
        program: Any program that keeps its local sites in one plate named "data".
        data: Tensor, array, `Dataset` or `DataLoader`.
        threshold: Least variance over the data of a posterior mean that counts as active.

    Reference:
        Burda, Grosse and Salakhutdinov, 2016. Importance weighted autoencoders.

    Example:
        >>> import pyro_vae
        >>> active_units(pyro_vae.build((8, 8), latent=2), torch.ones(3, 8, 8))
        0
    """
    return int((posterior_means(program, data).var(0, correction=0) > threshold).sum())
