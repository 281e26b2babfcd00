"""What programs give probabilities or densities of, without which being the same they do not compare."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.diagnostics.predictive import kind_of_values
from pyro_vae.evaluation import checked_batches
from pyro_vae.evaluation.draws import data_sites
from pyro_vae.programs import Program, undisturbed

__all__ = ["Measure", "check_measures", "measure"]


class Measure(NamedTuple):
    """What a program gives probabilities or densities of.

    Attributes:
        discrete: Of each value of a datum, whether it has a probability, and not a density.
        seen: Of each datum and value, whether it counts, of shape `(N, V)`; None where nothing is masked.
    """

    discrete: list[bool]
    seen: Tensor | None


def measure(name: str, program: Program, data: Any) -> Measure:
    """The measure of a program, for which all data pass through it once, at one draw of the latents."""
    seen = []
    with undisturbed(program), pyro.validation_enabled(False):
        for batch in checked_batches(program, data, 1).epoch(0):
            guide: Any = poutine.trace(program.guide).get_trace(*batch)
            model: Any = poutine.trace(poutine.replay(program.model, trace=guide)).get_trace(*batch)
            sites = data_sites(model)
            kinds = [kind_of_values(site["fn"]) for site in sites]
            for site, kind in zip(sites, kinds, strict=True):
                if kind == "binary" and not ((site["value"] == 0) | (site["value"] == 1)).all():
                    raise ValueError(
                        f"models: expected 0 and 1 at {site['name']!r} of {name!r}, got grey values, of which its "
                        "likelihood gives no probability; binarize the data, or take a ContinuousBernoulli likelihood"
                    )
            seen.append(torch.cat([_seen(site, len(batch[0])) for site in sites], -1))
    numbers = [site["fn"].event_shape.numel() for site in sites]
    discrete = [kind != "continuous" for kind, number in zip(kinds, numbers, strict=True) for _ in range(number)]
    return Measure(discrete, None if all(part.all() for part in seen) else torch.cat(seen))


def _seen(site: Any, size: int) -> Tensor:
    """Which values of a site no mask hides, of shape `(B, number of values)`."""
    fn = site["fn"]
    shape = torch.Size([size]) + fn.event_shape
    masks, base = [(site["mask"], len(fn.event_shape))], fn
    while base is not None:
        masks.append((getattr(base, "_mask", None), len(base.event_shape)))
        base = getattr(base, "base_dist", None)
    seen = torch.ones(shape, dtype=torch.bool)
    for mask, event_dim in masks:
        if mask is not None:
            known = torch.as_tensor(mask).cpu().bool()
            seen &= known[(..., *[None] * event_dim)]
    return seen.flatten(1) if fn.event_shape else seen[:, None]


def check_measures(measures: Mapping[str, Measure]) -> None:
    """Raise where programs, by name, do not give probabilities, or densities, of the same values."""
    (first, expected), *others = measures.items()
    for name, got in others:
        if len(got.discrete) != len(expected.discrete):
            raise ValueError(
                f"models: expected programs that observe the same values of a datum, got {len(expected.discrete)} with "
                f"{first!r} and {len(got.discrete)} with {name!r}"
            )
        if got.discrete != expected.discrete:
            raise ValueError(
                f"models: expected likelihoods of one measure, got {_described(expected.discrete)} with {first!r} and "
                f"{_described(got.discrete)} with {name!r}, which do not compare; take likelihoods that are both "
                "discrete, or both continuous"
            )
        masked = [seen for seen in (expected.seen, got.seen) if seen is not None]
        if masked and (len(masked) == 1 or not torch.equal(*masked)):
            raise ValueError(
                f"models: expected programs that mask the same values of the data, got other masks with {first!r} than "
                f"with {name!r}"
            )


def _described(measure: list[bool]) -> str:
    if all(measure):
        return "probabilities"
    return f"probabilities of {sum(measure)} of {len(measure)} values" if any(measure) else "densities"
