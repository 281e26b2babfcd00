"""Batches of a size that evaluation can afford."""

from __future__ import annotations

from typing import Any

from pyro_vae.data import Batches, as_source, check
from pyro_vae.estimators.evidence import VALUES_AT_ONCE
from pyro_vae.programs import Program, undisturbed

__all__ = ["checked_batches"]


def checked_batches(program: Program, data: Any, particles: int) -> Batches:
    """Batches whose decoder outputs, all particles together, stay within bounds; the data are checked on the way."""
    if not (hasattr(program, "model") and hasattr(program, "guide")):
        raise ValueError(f"program: expected a module with model and guide, got {type(program).__name__}")
    source = as_source(data)
    batches = Batches(source, program, batch_size=1)
    with undisturbed(program):
        values = max(1, next(batches.epoch(0))[0][0].numel())
    batches.batch_size = max(1, min(VALUES_AT_ONCE // (values * particles), batches.num_data, 4096))
    check(program, batches)
    return batches
