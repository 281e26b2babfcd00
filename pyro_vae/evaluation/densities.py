"""The local latents of a batch as unconstrained vectors, with the model's densities of them, datum by datum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import biject_to

from pyro_vae.estimators.particles import given, local_sites, log_prob
from pyro_vae.evaluation.draws import posterior_draws, prior_draws
from pyro_vae.programs import Program

__all__ = ["LatentSpace"]


class LatentSpace:
    r"""The latents of each datum of a batch as one vector `u` without constraints, for moves by gradients.

    .. math:: z = t(u), \qquad \log p(u) = \log p(z) + \log |\det \partial z / \partial u|, \qquad
              \log p(x, u) = \log p(u) + \log p(x \mid z)

    All local latent sites stand side by side in `u`, each in the space that :math:`t` takes it from (`biject_to` of its
    support). Global latents are drawn once from the guide and stay fixed: the densities are given these.

    Args:
        program: Any program that keeps its local sites in one plate named "data".
        *batch: What model and guide take.
        shared: Global latents that were drawn before, by site.

    Attributes:
        size: Number `D` of dimensions of `u`.

    Raises:
        ValueError: If a latent is discrete, or its support cannot be reached from an unconstrained space.

    Example:
        >>> import pyro_vae
        >>> space = LatentSpace(pyro_vae.build((8, 8), latent=2), torch.ones(3, 8, 8))
        >>> u = space.prior_draws(5)
        >>> log_prior, log_likelihood = space.log_densities(u)
        >>> u.shape, log_prior.shape
        (torch.Size([5, 3, 2]), torch.Size([5, 3]))
    """

    def __init__(self, program: Program, *batch: Any, shared: Mapping[str, Tensor] | None = None):
        self.program, self.batch = program, batch
        with torch.no_grad():
            drawn = posterior_draws(program, *batch, num_samples=1, shared=shared)
            self.shared = drawn.shared
            model = poutine.trace(given(program.model, drawn.latents | drawn.shared)).get_trace(*batch)
        self._transforms = {site["name"]: _transform(site) for site in local_sites(model, observed=False)}
        self._shapes = {name: _shape(t, drawn.latents[name]) for name, t in self._transforms.items()}
        self.size = sum(shape.numel() for shape in self._shapes.values())

    def unconstrained(self, latents: Mapping[str, Tensor]) -> Tensor:
        """The vectors `u`, of shape `(K, B, D)`, of latents by site, each of shape `(K, B, *event_shape)`."""
        parts = [transform.inv(latents[name]) for name, transform in self._transforms.items()]
        return torch.cat([part.reshape(*part.shape[:2], -1) for part in parts], -1)

    def latents(self, u: Tensor) -> dict[str, Tensor]:
        """The latents by site, each of shape `(K, B, *event_shape)`, of vectors `u` of shape `(K, B, D)`."""
        return {name: self._transforms[name](part) for name, part in self._parts(u).items()}

    def log_densities(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Log p(u) and log p(x given z), each of shape `(K, B)`, of vectors `u` of shape `(K, B, D)`."""
        latents = self.latents(u)
        plate = pyro.plate("particles", len(u), dim=-2)
        model: Any = poutine.trace(given(plate(self.program.model), latents | self.shared)).get_trace(*self.batch)
        log_prior, log_likelihood = (
            torch.as_tensor(sum(log_prob(site) for site in local_sites(model, observed))).expand(u.shape[:2])
            for observed in (False, True)
        )
        return log_prior + self._log_jacobian(u, latents), log_likelihood

    def posterior_draws(self, num_samples: int) -> tuple[Tensor, Tensor]:
        """Vectors `u` from the guide, of shape `(S, B, D)`, and their log q(u given x), of shape `(S, B)`."""
        drawn = posterior_draws(self.program, *self.batch, num_samples=num_samples, shared=self.shared)
        u = self.unconstrained(drawn.latents)
        return u, drawn.log_posterior + self._log_jacobian(u, drawn.latents)

    def prior_draws(self, num_samples: int) -> Tensor:
        """Vectors `u` from the prior, of shape `(S, B, D)`."""
        latents, _ = prior_draws(self.program, *self.batch, num_samples=num_samples, shared=self.shared)
        return self.unconstrained(latents)

    def _parts(self, u: Tensor) -> dict[str, Tensor]:
        parts = u.split([shape.numel() for shape in self._shapes.values()], -1)
        named = zip(self._shapes.items(), parts, strict=True)
        return {name: part.reshape(*u.shape[:2], *shape) for (name, shape), part in named}

    def _log_jacobian(self, u: Tensor, latents: Mapping[str, Tensor]) -> Tensor:
        total = u.new_zeros(u.shape[:2])
        for name, part in self._parts(u).items():
            log_jacobian = self._transforms[name].log_abs_det_jacobian(part, latents[name])
            total = total + log_jacobian.reshape(*u.shape[:2], -1).sum(-1)
        return total


def _transform(site: Any) -> Any:
    support, name = site["fn"].support, site["name"]
    if support.is_discrete:
        raise ValueError(f"expected continuous latents, got {type(site['fn']).__name__} at site {name!r}")
    try:
        return biject_to(support)
    except NotImplementedError:
        raise ValueError(f"expected latents that gradients can move freely, got {support} at site {name!r}") from None


def _shape(transform: Any, value: Tensor) -> torch.Size:
    """The event shape of a site's part of `u`, which may have another size than the latent itself."""
    return transform.inverse_shape(value.shape)[2:]
