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
from pyro_vae.evaluation.draws import posterior_draws, prior_latents
from pyro_vae.programs import Program

__all__ = ["LatentSpace"]

SUPPORT_DRAWS = 10  # from the prior, by which a support that changes with other latents is found
SCALE_DRAWS = 100  # from the prior, of which its scales are told
NORMAL_RANGE = 1.349  # interquartile range of a normal, in standard deviations


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
        observed: Names of the observed local sites.

    Raises:
        ValueError: If a latent is discrete, its support cannot be reached from an unconstrained space, or that support
            depends on other latents.

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
            self.shared, self.observed = drawn.shared, tuple(drawn.log_likelihood)
            model = poutine.trace(given(program.model, drawn.latents | drawn.shared)).get_trace(*batch)
        self._transforms = {site["name"]: _transform(site) for site in local_sites(model, observed=False)}
        self._shapes = {name: _shape(t, drawn.latents[name]) for name, t in self._transforms.items()}
        self.size = sum(shape.numel() for shape in self._shapes.values())
        self._check_supports()

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
        latents = prior_latents(self.program, *self.batch, num_samples=num_samples, shared=self.shared)
        return self.unconstrained(latents)

    def prior_scale(self) -> Tensor:
        """The prior's scale in each dimension, of shape `(B, D)`: its standard deviation, but for heavy tails.

        Where that is twice the one of a normal with the same quartiles, it is of a few far draws, and this is taken.
        """
        draws = self.prior_draws(SCALE_DRAWS)
        ordered, quarter = draws.sort(0).values, SCALE_DRAWS // 4
        between = (ordered[-1 - quarter] - ordered[quarter]) / NORMAL_RANGE
        deviation = draws.std(0)
        return torch.where((between > 0) & ~(deviation <= 2 * between), between, deviation)

    @torch.no_grad()
    def _check_supports(self) -> None:
        """Each support, as the draw from the guide has it, must be that at draws from the prior."""
        plate = pyro.plate("particles", SUPPORT_DRAWS, dim=-2)
        model: Any = poutine.trace(given(plate(self.program.model), self.shared)).get_trace(*self.batch)
        for site in local_sites(model, observed=False):
            name = site["name"]
            # Transforms are told apart by what they make of one point, whatever their bounds are called.
            point = site["value"].new_ones(SUPPORT_DRAWS, len(self.batch[0]), *self._shapes[name])
            here, there = self._transforms[name](point), _transform(site)(point)
            if not torch.allclose(here, there, equal_nan=True):
                raise ValueError(
                    f"expected latents whose support is fixed, got {_support(site)} at site {name!r} with bounds that "
                    "depend on other latents; sample a latent of fixed support and scale it (b = a * share)"
                )

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


def _support(site: Any) -> str:
    return type(getattr(site["fn"].support, "base_constraint", site["fn"].support)).__name__.strip("_")


def _shape(transform: Any, value: Tensor) -> torch.Size:
    """The event shape of a site's part of `u`, which may have another size than the latent itself."""
    return transform.inverse_shape(value.shape)[2:]
