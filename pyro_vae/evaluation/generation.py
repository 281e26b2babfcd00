"""Data drawn from a program's model."""

from __future__ import annotations

import inspect
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.data import to_float
from pyro_vae.estimators.particles import given, global_latents, simulating
from pyro_vae.evaluation.batches import checked_batches
from pyro_vae.programs import Program, placement, undisturbed

__all__ = ["reconstruct", "sample", "takes_x_alone"]


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
        learned = global_latents(poutine.trace(program.guide).get_trace(x[:1]))
        trace: Any = poutine.trace(given(simulating()(program.model), learned)).get_trace(x)
        sites = observed_sites(trace)
        means, draws = [mean_of(site["fn"]) for site in sites], [site["value"] for site in sites]
        return _joined(means), _joined(draws)


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
            means.append(_joined([mean_of(site["fn"]) for site in observed_sites(model)]))
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


def observed_sites(trace: Any) -> list[Any]:
    """The site "x", or those of its parts, "x.<part>", in order."""
    sites = [site for site in trace.nodes.values() if site["type"] == "sample"]
    sites = [site for site in sites if not site["infer"].get("_deterministic")]
    found = [site for site in sites if site["name"] == "x"] or [s for s in sites if s["name"].startswith("x.")]
    if not found:
        raise ValueError(f'expected a site "x", or sites "x.<part>", got {[site["name"] for site in sites]}')
    return found


def _joined(parts: list[Tensor]) -> Tensor:
    return (parts[0] if len(parts) == 1 else torch.cat(parts, -1)).cpu()


def mean_of(fn: Any) -> Tensor:
    """The mean of a distribution, or of 100 draws from one that does not know it.

    Example:
        >>> import pyro.distributions as dist
        >>> mean_of(dist.Gamma(torch.tensor([2.0, 6.0]), 2.0))
        tensor([1., 3.])
    """
    try:
        mean = fn.mean
    except NotImplementedError:
        mean = None
    # Some distributions without a mean raise, others give NaN.
    return to_float(fn.sample((100,))).mean(0) if mean is None or mean.isnan().all() else mean
