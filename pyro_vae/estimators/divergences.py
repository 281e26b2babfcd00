"""What a regularized ELBO is made of: divergences from prior to posterior, site by site or dimension by dimension."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.distributions import Independent, kl_divergence

from pyro_vae.estimators.particles import Particles, local_sites, log_prob, same

__all__ = ["by_dimension", "counts", "divergences", "num_data", "over_data", "relative", "side_by_side"]


def divergences(particles: Particles, each_dimension: bool = False) -> Tensor:
    """Divergences from prior to posterior under their weights, of shape `(sites, K, B)`, or `(dimensions, K, B)`."""
    # Given the latents before, there is a closed form unless the prior depends on one that comes later in the guide.
    guide = [site["name"] for site in particles.latents]
    model = {site["name"]: site for site in local_sites(particles.model, observed=False)}
    terms = []
    for i, site in enumerate(particles.latents):
        q, p = relative(site, particles), relative(model[site["name"]], particles)
        if each_dimension:
            q, p = (by_dimension(each, "FreeBits(num_groups=1) takes any") for each in (q, p))
        parents = list(model)[: list(model).index(site["name"])]
        term = _divergence(q, p, closed_form=set(parents) <= set(guide[:i]))
        terms.append(term.reshape(*term.shape[:2], -1).movedim(-1, 0))
    return torch.cat(terms)


def _divergence(q: Any, p: Any, closed_form: bool) -> Tensor:
    """The divergence of one latent: in closed form if there is one, and else as estimated by its draws."""
    if closed_form and same(q["scale"], p["scale"]) and same(q["mask"], p["mask"]):
        with suppress(NotImplementedError):
            return scale_and_mask(kl_divergence(q["fn"], p["fn"]), q["scale"], q["mask"])
    return log_prob(q, q["scale"]) - log_prob(p, p["scale"])


def by_dimension(site: Any, instead: str) -> Any:
    """A site whose distribution has a batch dimension in place of each event dimension, these being independent."""
    fn, event_dim = site["fn"], site["fn"].event_dim
    while isinstance(fn, Independent):
        fn = fn.base_dist
    if fn.event_dim:
        raise ValueError(
            f"expected latents of independent dimensions, got {type(fn).__name__} at site {site['name']!r}; {instead}"
        )
    padded = {
        key: site[key].reshape(site[key].shape + (1,) * event_dim)
        for key in ("scale", "mask")
        if isinstance(site[key], Tensor) and site[key].ndim
    }
    return site | padded | {"fn": fn}


def relative(site: Any, particles: Particles) -> Any:
    """A site whose scale is its weight beside what `over_data` multiplies by."""
    return site | {"scale": site["scale"] / particles.scale}


def over_data(values: Any, particles: Particles) -> Tensor:
    """The mean over particles and the sum over all data that the batch stands for, of values of shape `(*, K, B)`."""
    return (particles.scale * values.mean(-2)).sum(-1)


def num_data(particles: Particles) -> Tensor:
    """How many data the batch stands for."""
    return (particles.scale * counts(particles)).sum()


def counts(particles: Particles) -> Tensor:
    """Which data count, 1 or 0, of shape `(B,)`: those of which a latent is left by its mask."""
    value = particles.latents[0]["value"]
    sites = [*particles.latents, *local_sites(particles.model, observed=False)]
    masks = [torch.as_tensor(site["mask"] is None or site["mask"], device=value.device) for site in sites]
    return torch.stack([mask.expand(value.shape[:2]) for mask in masks]).any(0).any(0).to(value.dtype)


def side_by_side(sites: list[Any]) -> Tensor:
    """The values of latents, of shape `(K, B, D)`."""
    return torch.cat([site["value"].reshape(*site["value"].shape[:2], -1) for site in sites], -1)
