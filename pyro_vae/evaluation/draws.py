"""Draws of a program's latents and data, several a datum: what exports and diagnostics are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from numbers import Integral
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.estimators.particles import given, global_latents, local_sites, log_prob, simulating
from pyro_vae.evaluation.generation import observed_sites
from pyro_vae.programs import Program

__all__ = ["Draws", "posterior_draws", "predictive_draws", "prior_draws"]


class Draws(NamedTuple):
    """S draws for each of the B data of a batch, and their log-probabilities in nats, unscaled.

    Attributes:
        latents: Local latents by site, of shape `(S, B, *event_shape)`.
        shared: Global latents by site, of shape `(S, 1, *event_shape)`: each draw is shared by all data. Those in a
            plate of their own, of size P, have shape `(S, P, *event_shape)`.
        log_prior: log p(z), of shape `(S, B)`.
        log_likelihood: log p(x given z) by observed site, of shape `(S, B)`.
        log_posterior: log q(z given x), of shape `(S, B)`.
    """

    latents: dict[str, Tensor]
    shared: dict[str, Tensor]
    log_prior: Tensor
    log_likelihood: dict[str, Tensor]
    log_posterior: Tensor

    @property
    def log_weights(self) -> Tensor:
        """Log p(x, z) - log q(z given x), of shape `(S, B)`."""
        return self.log_prior + sum(self.log_likelihood.values()) - self.log_posterior


def posterior_draws(
    program: Program, *batch: Any, num_samples: int, shared: Mapping[str, Tensor] | None = None
) -> Draws:
    """Draw latents from the guide, and score them by guide and model.

    Args:
        program: Any program that keeps its local sites in one plate named "data".
        *batch: What model and guide take.
        num_samples: Number `S` of draws for each datum.
        shared: Global latents that were drawn before, as of the first of several batches.

    Raises:
        ValueError: If no site is in a plate named "data", or model and guide have different local latents.

    Example:
        >>> import pyro_vae
        >>> draws = posterior_draws(pyro_vae.build((8, 8), latent=2), torch.ones(3, 8, 8), num_samples=5)
        >>> draws.latents["z"].shape, draws.log_weights.shape
        (torch.Size([5, 3, 2]), torch.Size([5, 3]))
    """
    plate = _samples(num_samples)
    guide: Any = poutine.trace(given(plate(program.guide), shared or {})).get_trace(*batch)
    model: Any = poutine.trace(poutine.replay(plate(program.model), trace=guide)).get_trace(*batch)
    sites, priors = local_sites(guide, observed=False), local_sites(model, observed=False)
    names = [sorted(site["name"] for site in each) for each in (priors, sites)]
    if names[0] != names[1]:
        raise ValueError(f"expected a guide with the model's latents {names[0]}, got {names[1]}")
    size = len(batch[0])

    def total(sites: list[Any]) -> Tensor:
        return torch.as_tensor(sum(map(log_prob, sites))).expand(num_samples, size)

    return Draws(
        latents={site["name"]: _expanded(site, num_samples, size) for site in sites},
        shared=global_latents(guide),
        log_prior=total(priors),
        log_likelihood={site["name"]: total([site]) for site in data_sites(model)},
        log_posterior=total(sites),
    )


def prior_draws(
    program: Program, *batch: Any, num_samples: int, shared: Mapping[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """Draw latents from the prior and data from the model, the data of the batch withheld.

    Global latents are drawn from the guide: they are what training has learned.

    Args:
        program: Any program whose observed site is "x", or whose sites "x.<part>" hold its columns in order.
        *batch: What model and guide take; of the first tensor, x, only the shape is used.
        num_samples: Number `S` of draws for each datum.
        shared: Global latents that were drawn before, as of the first of several batches.

    Returns:
        Local latents by site, of shape `(S, B, *event_shape)`, and data of shape `(S, *x.shape)`.

    Raises:
        ValueError: If the program cannot be run on zeros in place of x (see `predictive_draws`).

    Example:
        >>> import pyro_vae
        >>> latents, x = prior_draws(pyro_vae.build((8, 8), latent=2), torch.ones(3, 8, 8), num_samples=5)
        >>> latents["z"].shape, x.shape
        (torch.Size([5, 3, 2]), torch.Size([5, 3, 8, 8]))
    """
    plate = _samples(num_samples)
    if shared is None:
        shared = global_latents(_traced(plate(program.guide), batch))
    model = _simulated(plate(program.model), shared, batch)
    # What the model observes is traced as latents are, where all is simulated.
    sites = [site for site in local_sites(model, observed=False) if "was_observed" not in site["infer"]]
    latents = {site["name"]: _expanded(site, num_samples, len(batch[0])) for site in sites}
    return latents, _data(model, num_samples, batch[0])


def prior_latents(program: Program, *batch: Any, num_samples: int, shared: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Draw local latents from the prior, given the batch: what the model observes need be neither "x" nor simulated.

    Args:
        program: Any program that keeps its local sites in one plate named "data".
        *batch: What model and guide take.
        num_samples: Number `S` of draws for each datum.
        shared: Global latents, by site.

    Returns:
        Local latents by site, of shape `(S, B, *event_shape)`.

    Example:
        >>> import pyro_vae
        >>> vae = pyro_vae.build((8, 8), latent=2)
        >>> prior_latents(vae, torch.ones(3, 8, 8), num_samples=5, shared={})["z"].shape
        torch.Size([5, 3, 2])
    """
    model: Any = poutine.trace(given(_samples(num_samples)(program.model), shared)).get_trace(*batch)
    sites = local_sites(model, observed=False)
    return {site["name"]: _expanded(site, num_samples, len(batch[0])) for site in sites}


def predictive_draws(program: Program, *batch: Any, draws: Draws) -> Tensor:
    """Draw data at draws of the latents, the data of the batch withheld: never are these handed back.

    The model is run on zeros in place of x. One that takes more from x than its shape, such as the total of counts,
    should have that as a tensor of its own beside x.

    Args:
        program: Any program whose observed site is "x", or whose sites "x.<part>" hold its columns in order.
        *batch: What model and guide take; of the first tensor, x, only the shape is used.
        draws: Draws of the latents, as of `posterior_draws`.

    Returns:
        A tensor of shape `(S, *x.shape)`.

    Raises:
        ValueError: If the model cannot be run on zeros in place of x.

    Example:
        >>> import pyro_vae
        >>> vae, x = pyro_vae.build((8, 8), latent=2), torch.ones(3, 8, 8)
        >>> predictive_draws(vae, x, draws=posterior_draws(vae, x, num_samples=5)).shape
        torch.Size([5, 3, 8, 8])
    """
    num_samples = len(draws.log_posterior)
    model = _simulated(_samples(num_samples)(program.model), draws.latents | draws.shared, batch)
    return _data(model, num_samples, batch[0])


def _samples(num_samples: int) -> Any:
    return pyro.plate("samples", num_samples, dim=-2)


def _withheld(batch: tuple[Any, ...]) -> tuple[Any, ...]:
    """A batch whose data are zeros, so that nothing of them can come back by any way."""
    return torch.zeros_like(batch[0]), *batch[1:]


def _simulated(model: Callable, values: Mapping[str, Tensor], batch: tuple[Any, ...]) -> Any:
    return _traced(given(simulating()(model), values), batch)


def _traced(program: Callable, batch: tuple[Any, ...]) -> Any:
    """The trace of a model or guide, the data of the batch withheld."""
    try:
        return poutine.trace(program).get_trace(*_withheld(batch))
    except (RuntimeError, ValueError) as error:
        program(*batch)  # what fails with the data too is none of the withholding's
        raise ValueError(
            "expected a program that takes nothing of x but its shape, as x is withheld where data are drawn, got "
            f"{type(error).__name__} with zeros for x; pass what it reads of x (a total count, say) as a tensor of its "
            "own"
        ) from error


def data_sites(model: Any) -> list[Any]:
    """The sites of a model's trace in the plate "data" at which it observes: not what follows from its latents.

    Example:
        >>> import pyro_vae
        >>> vae = pyro_vae.build((8, 8), latent=2)
        >>> [site["name"] for site in data_sites(poutine.trace(vae.model).get_trace(torch.ones(3, 8, 8)))]
        ['x']
    """
    return [site for site in local_sites(model, observed=True) if not site["infer"].get("_deterministic")]


def check_whole(least: int, **numbers: Any) -> None:
    """Refuse numbers, by name, that are not whole, or are below the least.

    Example:
        >>> check_whole(1, num_samples=0)
        Traceback (most recent call last):
        ...
        ValueError: num_samples: expected a whole number, at least 1, got 0
    """
    for name, number in numbers.items():
        if not isinstance(number, Integral) or number < least:
            raise ValueError(f"{name}: expected a whole number, at least {least}, got {number!r}")


def check_observed(names: Iterable[str]) -> None:
    """Refuse what asks for x as the model would draw it together with all else that it observes.

    Args:
        names: Observed sites in the plate "data", as `Draws.log_likelihood` has them.

    Example:
        >>> check_observed(["x.age", "x.sex"])
    """
    others = [name for name in names if name != "x" and not name.startswith("x.")]
    if others:
        raise ValueError(
            f'expected a model that observes "x", or its parts "x.<part>", alone, got {others} too: simulated data '
            "would not be what the model has of its own"
        )


def _expanded(site: Any, num_samples: int, size: int) -> Tensor:
    """The values of a site for each draw and datum, which may share some."""
    value, event_dim = site["value"], site["fn"].event_dim
    return value.expand(num_samples, size, *value.shape[value.ndim - event_dim :])


def _data(model: Any, num_samples: int, x: Tensor) -> Tensor:
    parts = [_expanded(site, num_samples, len(x)) for site in observed_sites(model)]
    drawn = parts[0] if len(parts) == 1 else torch.cat([part.reshape(num_samples, len(x), -1) for part in parts], -1)
    return drawn.reshape(num_samples, *x.shape).to(x.dtype)  # a guide takes what is drawn as it takes data
