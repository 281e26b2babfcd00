"""How good a fitted program is: log-likelihood, ELBO, rate, distortion, active units, in nats per datum."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_vae.data import Batches, as_source, check, to_float
from pyro_vae.estimators.evidence import PARTICLES_AT_ONCE as _PARTICLES_AT_ONCE
from pyro_vae.estimators.evidence import VALUES_AT_ONCE as _VALUES_AT_ONCE
from pyro_vae.estimators.evidence import estimate_evidence
from pyro_vae.handlers import in_data_plate
from pyro_vae.programs import Program, placement, undisturbed

__all__ = [
    "Summary",
    "active_units",
    "bits_per_dimension",
    "checked_batches",
    "elbo",
    "log_likelihood",
    "posterior_means",
    "rate_distortion",
    "reconstruct",
    "sample",
    "summarize",
    "takes_x_alone",
]


class Summary(NamedTuple):
    """Estimates for each datum, tensors of shape `(N,)` in nats, float64.

    Attributes:
        log_likelihood: Importance-weighted estimate of log p(x).
        elbo: Evidence lower bound, minus rate and distortion.
        rate: KL divergence from the prior to the posterior.
        distortion: Expected negative log-likelihood under the posterior.
    """

    log_likelihood: Tensor
    elbo: Tensor
    rate: Tensor
    distortion: Tensor


def summarize(program: Program, data: Any, num_particles: int = 5000, *, seed: int = 0, advance: Any = None) -> Summary:
    r"""Log-likelihood, ELBO, rate and distortion of each datum, from the same particles.

    .. math:: \log \hat p(x) = \log \tfrac1K \sum_k w_k, \quad R = \tfrac1K \sum_k \log \frac{q(z_k \mid x)}{p(z_k)},
              \quad D = -\tfrac1K \sum_k \log p(x \mid z_k), \quad \text{ELBO} = -(R + D)

    Particles are taken in passes of bounded size, with running sums, so that memory depends neither on their number
    nor on that of the data. Weights, RNG state, and train or eval mode are left as they were.

    Args:
        program: Any program that keeps its local sites in one plate named "data".
        data: Tensor, array, `Dataset` or `DataLoader`.
        num_particles: Number `K` of particles a datum.
        seed: Seed of the particles.
        advance: Called with the share of the work done since the last call, for a progress bar.

    Returns:
        A `Summary`.

    Raises:
        ValueError: If `num_particles` is not positive, or the data do not suit the program.

    Reference:
        Burda, Grosse and Salakhutdinov, 2016. Importance weighted autoencoders. Alemi et al., 2018. Fixing a broken
        ELBO (rate and distortion).

    Example:
        >>> import pyro_vae
        >>> vae = pyro_vae.build((8, 8), latent=2)
        >>> summary = summarize(vae, torch.ones(3, 8, 8), num_particles=10)
        >>> bool((summary.elbo <= summary.log_likelihood).all())
        True
    """
    if num_particles < 1:
        raise ValueError(f"num_particles: expected a positive number, got {num_particles}")
    at_once = min(num_particles, _PARTICLES_AT_ONCE)
    batches = checked_batches(program, data, at_once)
    parts = []
    with undisturbed(program, seed), pyro.validation_enabled(False):
        for batch in batches.epoch(0):
            found = estimate_evidence(
                program.model,
                program.guide,
                *batch,
                num_particles=num_particles,
                at_once=at_once,
                advance=_part_of(advance, len(batch[0]) / batches.num_data),
            )
            elbo = -(found.rate + found.distortion)
            parts.append(Summary(found.log_evidence, elbo, found.rate, found.distortion))
    return Summary(*map(torch.cat, zip(*parts, strict=True)))


def _part_of(advance: Any, share: float) -> Any:
    """What a part of the work calls with its own progress."""
    return None if advance is None else lambda done: advance(share * done)


def log_likelihood(program: Program, data: Any, num_particles: int = 5000, *, seed: int = 0) -> Tensor:
    r"""Importance-weighted estimate of each datum's log evidence, a lower bound in expectation that rises with K.

    .. math:: \log \hat p(x) = \log \tfrac1K \sum_k \frac{p(x, z_k)}{q(z_k \mid x)}, \quad z_k \sim q(z \mid x)

    Args:
        program: Any program that keeps its local sites in one plate named "data".
        data: Tensor, array, `Dataset` or `DataLoader`.
        num_particles: Number `K` of particles a datum; memory does not depend on it.
        seed: Seed of the particles.

    Returns:
        A tensor of shape `(N,)`, in nats, float64.

    Raises:
        ValueError: If `num_particles` is not positive, or the data do not suit the program.

    Reference:
        Burda, Grosse and Salakhutdinov, 2016. Importance weighted autoencoders.

    Example:
        >>> import pyro_vae
        >>> log_likelihood(pyro_vae.build((8, 8), latent=2), torch.ones(3, 8, 8), num_particles=10).shape
        torch.Size([3])
    """
    return summarize(program, data, num_particles, seed=seed).log_likelihood


def bits_per_dimension(log_likelihood: Tensor, event_shape: Sequence[int], bins: int | None = None) -> Tensor:
    r"""Log-likelihoods in nats per datum as code length, in bits per dimension.

    .. math:: b = -\frac{\log p(x)}{D \log 2}, \qquad
              b = -\frac{\log p(y)}{D \log 2} + \log_2 \text{bins}, \quad y = \frac{i + u}{\text{bins}}

    The first is of discrete data and their probabilities. The second is of grey levels `i` that were dequantized by
    noise `u`, uniform on (0, 1), and of their density. It gives to levels the probability of their cell, whose volume
    is :math:`\text{bins}^{-D}`, so that by Jensen's inequality `b` is, in expectation over the noise, an upper bound on
    the bits per dimension of the discrete data:

    .. math:: -\log P(i) = -\log \int_{\text{cell } i} p(y)\, dy = D \log \text{bins} - \log E_u[p(y)]
              \le D \log \text{bins} - E_u[\log p(y)]

    Args:
        log_likelihood: Log-likelihoods (or lower bounds on them) of any shape, in nats per datum.
        event_shape: Shape of one datum, of `D` values.
        bins: Number of grey levels of data that were dequantized; None for discrete data.

    Returns:
        A tensor of the shape of `log_likelihood`, in bits per dimension.

    Raises:
        ValueError: If a datum has no values, or there are fewer than two bins.

    Reference:
        Theis, van den Oord and Bethge, 2016. A note on the evaluation of generative models.

    Example:
        >>> bits_per_dimension(torch.zeros(2), (1, 28, 28), bins=256)  # the uniform density
        tensor([8., 8.])
    """
    dimensions = math.prod(event_shape)
    if dimensions < 1 or (bins is not None and bins < 2):
        raise ValueError(f"expected dimensions and at least 2 bins, got event shape {tuple(event_shape)}, bins={bins}")
    return -log_likelihood / (dimensions * math.log(2)) + (0.0 if bins is None else math.log2(bins))


def elbo(program: Program, data: Any, num_particles: int = 1, *, seed: int = 0) -> Tensor:
    r"""The evidence lower bound of each datum, with beta = 1.

    .. math:: \text{ELBO} = \tfrac1K \sum_k \log p(x, z_k) - \log q(z_k \mid x), \quad z_k \sim q(z \mid x)

    Args:
        program: Any program that keeps its local sites in one plate named "data".
        data: Tensor, array, `Dataset` or `DataLoader`.
        num_particles: Number `K` of particles a datum.
        seed: Seed of the particles.

    Returns:
        A tensor of shape `(N,)`, in nats, float64.

    Raises:
        ValueError: If `num_particles` is not positive, or the data do not suit the program.

    Reference:
        Kingma and Welling, 2014. Auto-encoding variational Bayes.

    Example:
        >>> import pyro_vae
        >>> elbo(pyro_vae.build((8, 8), latent=2), torch.ones(3, 8, 8)).shape
        torch.Size([3])
    """
    return summarize(program, data, num_particles, seed=seed).elbo


def rate_distortion(program: Program, data: Any, num_particles: int = 1, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    r"""Rate and distortion of each datum; their sum is minus the ELBO.

    .. math:: R = E_q[\log q(z \mid x) - \log p(z)], \qquad D = -E_q[\log p(x \mid z)]

    Args:
        program: Any program that keeps its local sites in one plate named "data".
        data: Tensor, array, `Dataset` or `DataLoader`.
        num_particles: Particles a datum in the Monte Carlo estimate of both.
        seed: Seed of the particles.

    Returns:
        Two tensors of shape `(N,)`, in nats, float64.

    Raises:
        ValueError: If `num_particles` is not positive, or the data do not suit the program.

    Reference:
        Alemi et al., 2018. Fixing a broken ELBO.

    Example:
        >>> import pyro_vae
        >>> rate, distortion = rate_distortion(pyro_vae.build((8, 8), latent=2), torch.ones(3, 8, 8))
        >>> rate.shape
        torch.Size([3])
    """
    summary = summarize(program, data, num_particles, seed=seed)
    return summary.rate, summary.distortion


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
            latents = [_mean(site["fn"]) for site in sites if not site["is_observed"]]
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


def sample(
    program: Program, num_samples: int, event_shape: tuple[int, ...], *, seed: int | None = None
) -> tuple[Tensor, Tensor]:
    """Draw data from the model: the means of p(x given z) at draws of z from the prior, and draws of x.

    Args:
        program: Any program whose observed site is "x", or whose sites "x.<part>" hold its columns in order.
        num_samples: Number `S` of draws.
        event_shape: Shape of one datum.
        seed: Seed of the draws; None goes on from the current state, and leaves it as it was.

    Returns:
        `(means, draws)`, tensors of shape `(S, *event_shape)`.

    Raises:
        ValueError: If `num_samples` is not positive, or the model must be given more than x.

    Example:
        >>> import pyro_vae
        >>> means, draws = sample(pyro_vae.build((8, 8), latent=2), 4, (8, 8))
        >>> draws.unique().tolist()
        [0.0, 1.0]
    """
    if not takes_x_alone(program):
        raise ValueError(
            f"{type(program).__name__}: expected a model of x alone, got model{inspect.signature(program.model)}"
        )
    if num_samples < 1:
        raise ValueError(f"number of samples: expected a positive number, got {num_samples}")
    device, dtype = placement(program)
    x = torch.zeros(num_samples, *event_shape, device=device, dtype=dtype)
    with undisturbed(program, seed):
        model = poutine.condition(poutine.uncondition(program.model), data=_global_latents(program, x[:1]))
        trace: Any = poutine.trace(model).get_trace(x)
        sites = _observed(trace)
        means, draws = [_mean(site["fn"]) for site in sites], [site["value"] for site in sites]
        return _joined(means), _joined(draws)


def _global_latents(program: Program, x: Tensor) -> dict[str, Tensor]:
    """One draw from the guide of the latents that belong to no datum, what training has learned of them."""
    sites = poutine.trace(program.guide).get_trace(x).nodes.values()
    latents = [site for site in sites if site["type"] == "sample" and not site["is_observed"]]
    return {site["name"]: site["value"] for site in latents if not in_data_plate(site) and not site_is_subsample(site)}


def reconstruct(program: Program, data: Any, *, seed: int = 0) -> Tensor:
    """The mean of p(x given z) at one draw of z from each datum's posterior.

    Args:
        program: Any program whose observed site is "x", or whose sites "x.<part>" hold its columns in order.
        data: Tensor, array, `Dataset` or `DataLoader`.
        seed: Seed of the draws.

    Returns:
        A tensor of shape `(N, *event_shape)`.

    Example:
        >>> import pyro_vae
        >>> reconstruct(pyro_vae.build((8, 8), latent=2), torch.ones(3, 8, 8)).shape
        torch.Size([3, 8, 8])
    """
    means = []
    with undisturbed(program, seed), pyro.validation_enabled(False):
        for batch in checked_batches(program, data, 1).epoch(0):
            guide: Any = poutine.trace(program.guide).get_trace(*batch)
            model: Any = poutine.trace(poutine.replay(program.model, trace=guide)).get_trace(*batch)
            means.append(_joined([_mean(site["fn"]) for site in _observed(model)]))
    return torch.cat(means)


def takes_x_alone(program: Program) -> bool:
    """Whether the program's model can run on x alone, so that data can be drawn from it.

    Example:
        >>> import pyro_vae
        >>> takes_x_alone(pyro_vae.build((8, 8), latent=2))
        True
    """
    try:
        inspect.signature(program.model).bind("x")
    except TypeError:
        return False
    return True


def _observed(trace: Any) -> list[Any]:
    """The site "x", or those of its parts, "x.<part>", in order."""
    sites = [site for site in trace.nodes.values() if site["type"] == "sample"]
    sites = [site for site in sites if not site["infer"].get("_deterministic")]
    found = [site for site in sites if site["name"] == "x"] or [s for s in sites if s["name"].startswith("x.")]
    if not found:
        raise ValueError(f'expected a site "x", or sites "x.<part>", got {[site["name"] for site in sites]}')
    return found


def _joined(parts: list[Tensor]) -> Tensor:
    return (parts[0] if len(parts) == 1 else torch.cat(parts, -1)).cpu()


def _mean(fn: Any) -> Tensor:
    try:
        mean = fn.mean
    except NotImplementedError:
        mean = None
    # Some distributions without a mean raise, others give NaN.
    return to_float(fn.sample((100,))).mean(0) if mean is None or mean.isnan().all() else mean


def checked_batches(program: Program, data: Any, particles: int) -> Batches:
    """Batches whose decoder outputs, all particles together, stay within bounds; the data are checked on the way."""
    source = as_source(data)
    batches = Batches(source, program, batch_size=1)
    with undisturbed(program):
        values = max(1, next(batches.epoch(0))[0][0].numel())
    batches.batch_size = max(1, min(_VALUES_AT_ONCE // (values * particles), batches.num_data, 4096))
    check(program, batches)
    return batches
