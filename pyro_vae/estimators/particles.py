"""Particles of any model and guide, drawn and scored datum by datum: what every estimator is made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from functools import cached_property
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_vae.estimators.tracing import Tape, is_traced, same_expression
from pyro_vae.handlers import data_frame, in_data_plate

__all__ = ["LogProbabilities", "Particles", "log_probabilities", "log_weights"]


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
    plate named "data" belong to no datum: they are left out, and each particle has its own draw of them.

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
    plate = pyro.plate("particles", num_particles, dim=-2)
    guide_trace = poutine.trace(plate(guide)).get_trace(*batch)
    model_trace = poutine.trace(poutine.replay(plate(model), trace=guide_trace)).get_trace(*batch)
    return LogProbabilities(
        prior=_sum(local_sites(model_trace, observed=False)).expand(num_particles, -1),
        likelihood=_sum(local_sites(model_trace, observed=True)).expand(num_particles, -1),
        posterior=_sum(local_sites(guide_trace, observed=False)).expand(num_particles, -1),
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


def local_sites(trace: Any, observed: bool) -> list[Any]:
    """The sample sites of a trace in the plate "data", observed or latent; there must be some."""
    found = [site for site in _sites(trace, observed) if in_data_plate(site)]
    if not found:
        kind = "observed" if observed else "latent"
        raise ValueError(
            f'expected {kind} sites in a plate named "data" at dim=-1, got sites {list(trace.nodes)[1:-1]}'
        )
    return found


def _sites(trace: Any, observed: bool) -> Iterator[Any]:
    for site in trace.nodes.values():
        if site["type"] == "sample" and site["is_observed"] == observed and not site_is_subsample(site):
            yield site


def log_prob(site: Any, weight: Any = 1.0) -> Tensor:
    """The log-probability of a site, masked as it is, times a weight."""
    unscaled = site.get("unscaled_log_prob")  # `handlers.record` has computed that of the data
    unscaled = site["fn"].log_prob(site["value"]) if unscaled is None else unscaled
    return scale_and_mask(unscaled, scale=weight, mask=site["mask"])


def _sum(sites: list[Any]) -> Tensor:
    return torch.as_tensor(sum(map(log_prob, sites)))


def shared_draws(guide: Callable, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """One draw from the guide of what all particles share, by name: all but the local latents."""
    trace = poutine.trace(guide).get_trace(*args, **kwargs)
    local = {site["name"] for site in local_sites(trace, observed=False)}
    return {name: value for name, value in _values(trace).items() if name not in local}


def global_latents(trace: Any) -> dict[str, Tensor]:
    """The latents of a trace that belong to no datum, by site.

    Example:
        >>> import pyro_vae
        >>> vae = pyro_vae.build((8, 8), latent=2)
        >>> global_latents(poutine.trace(vae.guide).get_trace(torch.ones(3, 8, 8)))
        {}
    """
    return {site["name"]: site["value"] for site in _sites(trace, observed=False) if not in_data_plate(site)}


class _LocalPlate(pyro.plate):
    """A plate for local sites alone: a global latent is drawn once, and all particles share it.

    With a draw for each particle, the mean over particles would average the global latent out of the evidence of each
    datum by itself, and the sum over data would no longer bound the evidence of all.
    """

    def _process_message(self, msg: Any) -> None:
        if in_data_plate(msg):  # inner handlers come first, so that the message knows its plates
            super()._process_message(msg)


class _changed(Messenger):
    """Local latents are sampled as they are, random numbers and all, and then have another value."""

    def __init__(self, change: Callable[[str, Tensor], Tensor]):
        super().__init__()
        self.change = change

    def _pyro_post_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and not site_is_subsample(msg) and in_data_plate(msg):
            msg["value"] = self.change(msg["name"], msg["value"])


def _detached(name: str, value: Tensor) -> Tensor:
    return value.detach()


class random_state:
    """The state of the random numbers on the devices of some tensors, to be gone back to.

    Args:
        tensors: The tensors; what else is among them is passed over.

    Example:
        >>> x = torch.zeros(2)
        >>> state = random_state([x])
        >>> first = torch.randn(())
        >>> state.restore()
        >>> bool(torch.randn(()) == first)
        True
    """

    def __init__(self, tensors: Iterable[Any]):
        self.tape = Tape.current()
        if self.tape is not None:
            self.position = self.tape.position
            return
        devices = {t.device for t in tensors if isinstance(t, Tensor) and t.device.type == "cuda"}
        self.cpu = torch.get_rng_state()
        self.cuda = {device: torch.cuda.get_rng_state(device) for device in devices}

    def restore(self) -> None:
        """Go back to the state."""
        if self.tape is not None:
            self.tape.position = self.position
            return
        torch.set_rng_state(self.cpu)
        for device, state in self.cuda.items():
            torch.cuda.set_rng_state(state, device)


class Particles:
    """K particles of a guide's latents, scored by the guide and by the model.

    Global latents, outside the plate "data", are drawn once, and all particles share them.

    Args:
        model: A Pyro model that keeps its local sites in one plate named "data", `dim=-1`.
        guide: Its guide.
        args: Positional arguments of both.
        kwargs: Other arguments of both.
        num_particles: Number `K` of particles.
        reparameterized: Whether gradients flow along the paths of the local latents, or stop at their values.
        shared: Values of the global latents (and of a plate's subsample), by name, where they were drawn before.

    Attributes:
        guide: The guide's trace.
        model: The model's trace.
        latents: The guide's local latent sites.
        scale: What stands outside the logarithm of a mean of weights: N/B of a subsampled plate, and any scale that is
            set around model and guide. A number, or one a datum.

    Raises:
        ValueError: If latents of model and guide differ, none is in a plate named "data", or one that must be
            reparameterized is not.

    Example:
        >>> import pyro_vae
        >>> vae = pyro_vae.build((8, 8), latent=2)
        >>> Particles(vae.model, vae.guide, (torch.zeros(5, 8, 8),), {}, 3).log_weights.shape
        torch.Size([3, 5])
    """

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        args: tuple,
        kwargs: Mapping[str, Any],
        num_particles: int,
        *,
        reparameterized: bool = True,
        shared: Mapping[str, Tensor] | None = None,
    ):
        plate = _LocalPlate("particles", num_particles, dim=-2)
        self._random_state = random_state(args)
        self._run_guide = lambda: poutine.trace(given(plate(guide), shared or {})).get_trace(*args, **kwargs)
        self.num_particles, self.reparameterized = num_particles, reparameterized
        with nullcontext() if reparameterized else _changed(_detached):
            self.guide = self._run_guide()
        self.latents = local_sites(self.guide, observed=False)
        self._check_reparameterized()
        # What is scored is told apart from what later latents depend on, and from what a flow remembers of its draw.
        self._scored = {site["name"]: site["value"].view_as(site["value"]) for site in self.latents}
        values = _values(self.guide) | self._scored
        self.model = poutine.trace(given(plate(model), values)).get_trace(*args, **kwargs)
        self._check_latents()
        self.scale = self._outer_scale()

    @cached_property
    def log_joint(self) -> Tensor:
        """Log p(x, z) of shape `(K, B)`, under `beta` with its weights."""
        sites = [*local_sites(self.model, observed=False), *local_sites(self.model, observed=True)]
        return self._sum(sites)

    @cached_property
    def log_posterior(self) -> Tensor:
        """Log q(z given x) of shape `(K, B)`, under `beta` with its weights."""
        return self._sum(self.latents)

    @property
    def log_weights(self) -> Tensor:
        """Log p(x, z) - log q(z given x) of shape `(K, B)`."""
        return self.log_joint - self.log_posterior

    @cached_property
    def fixed(self) -> list[Any]:
        """The guide's local latents at fixed values: their densities have the gradient of its parameters alone."""
        if not self.reparameterized:
            return self.latents
        if len(self.latents) == 1:
            return [site | {"value": site["value"].detach()} for site in self.latents]
        return self._again(_detached)  # as one latent may depend on another

    def log_posterior_at_fixed(self, weighted: bool) -> Tensor:
        """Log q(z given x) at fixed z, with or without the weights of `beta`."""
        return self._sum(self.fixed, weighted)

    def log_posterior_along_path(self) -> Tensor:
        """Log q(z given x), depending on the very values that the model sees (and not on those behind them)."""
        if len(self.latents) == 1:
            return self._sum(site | {"value": self._scored[site["name"]]} for site in self.latents)
        return self._sum(self._again(lambda name, _: self._scored[name]))

    def scale_path(self, factor: Tensor) -> None:
        """Multiply the gradient along each particle's path by `factor`, of shape `(K, B)`."""
        for value in self._scored.values():
            if value.requires_grad:
                value.register_hook(lambda grad: grad * factor.reshape(factor.shape + (1,) * (grad.ndim - 2)))

    def log_global(self) -> Tensor | float:
        """Log p - log q of the global latents, with their scales."""
        signed = [(self.model, 1.0), (self.guide, -1.0)]
        return sum(
            sign * log_prob(site, weight=site["scale"]).sum()
            for trace, sign in signed
            for site in _sites(trace, observed=False)
            if not in_data_plate(site)
        )

    @property
    def is_weighted(self) -> bool:
        """Whether latents weigh otherwise than the data do, under `beta` for example."""
        sites = [*self.latents, *local_sites(self.model, observed=False)]
        return not all(same(site["scale"], self.scale) for site in sites)

    def _sum(self, sites: Iterable[Any], weighted: bool = True) -> Tensor:
        total = sum(log_prob(site, site["scale"] / self.scale if weighted else 1.0) for site in sites)
        return torch.as_tensor(total).expand(self.num_particles, -1)

    def _again(self, change: Callable[[str, Tensor], Tensor]) -> list[Any]:
        """The local latents of the guide, run again on the same random numbers, with other values behind each."""
        now = random_state([site["value"] for site in self.latents])
        self._random_state.restore()
        with _changed(change):
            sites = local_sites(self._run_guide(), observed=False)
        now.restore()
        return sites

    def _outer_scale(self) -> Any:
        weighed = [
            (site["scale"], site["infer"].get("_weight", 1.0)) for site in local_sites(self.model, observed=True)
        ]
        scales = [scale / weight for scale, weight in weighed if not same(weight, 0.0)]
        if scales and all(same(scale, scales[0]) for scale in scales) and not same(scales[0], 0.0):
            return scales[0]
        frame = data_frame(self.latents[0])
        return frame.full_size / frame.size

    def _check_reparameterized(self) -> None:
        for site in _sites(self.guide, observed=False):
            if (self.reparameterized or not in_data_plate(site)) and not site["fn"].has_rsample:
                instead = "VIMCO, Reinforce or ReweightedWakeSleep" if in_data_plate(site) else "Trace_ELBO"
                raise ValueError(
                    f"expected a guide whose draws are differentiable, got {type(site['fn']).__name__} at site "
                    f"{site['name']!r}; use {instead}"
                )

    def _check_latents(self) -> None:
        model, guide = ({site["name"] for site in _sites(t, observed=False)} for t in (self.model, self.guide))
        if model != guide:
            raise ValueError(f"expected a guide with the model's latents {sorted(model)}, got {sorted(guide)}")


def _values(trace: Any) -> dict[str, Tensor]:
    """What a trace drew, by name: latents, and which data a plate has drawn."""
    sites = trace.nodes.values()
    return {site["name"]: site["value"] for site in sites if site["type"] == "sample" and not site["is_observed"]}


def given(program: Callable, values: Mapping[str, Tensor]) -> Callable:
    """A model or guide with values for some of what it draws, by site."""
    trace: Any = poutine.Trace()
    for name, value in values.items():
        trace.add_node(name, name=name, type="sample", is_observed=False, value=value, infer={})
    return poutine.replay(program, trace=trace)


class simulating(UnconditionMessenger):
    """All that is observed is drawn, but for what follows from other draws: this has its value from them.

    Example:
        >>> import pyro_vae
        >>> vae, x = pyro_vae.build((8, 8), latent=2), torch.full((3, 8, 8), torch.nan)
        >>> poutine.trace(simulating()(vae.model)).get_trace(x).nodes["x"]["value"].isnan().any().item()
        False
    """

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["infer"].get("_deterministic"):
            super()._pyro_sample(msg)


def same(one: Any, other: Any) -> bool:
    """Whether two scales, or two masks, are one, up to rounding; a tensor may be compared with a number."""
    if one is other or one is None or other is None:
        return one is other
    if is_traced(one) or is_traced(other):
        return same_expression(one, other)
    if not isinstance(one, Tensor) and not isinstance(other, Tensor):
        return math.isclose(one, other)
    a, b = (torch.as_tensor(value, dtype=torch.float64, device="cpu").squeeze() for value in (one, other))
    return not (a.ndim and b.ndim and a.shape != b.shape) and bool(torch.isclose(a, b).all())
