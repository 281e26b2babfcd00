"""Batches of a size that evaluation can afford."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_vae.data import Batches, as_source, check
from pyro_vae.estimators.evidence import VALUES_AT_ONCE
from pyro_vae.programs import Program, undisturbed

__all__ = ["Gathered", "checked_batches"]


def checked_batches(program: Program, data: Any, particles: int) -> Batches:
    """Batches whose decoder outputs, all particles together, stay within bounds; the data are checked on the way."""
    if not (hasattr(program, "model") and hasattr(program, "guide")):
        raise ValueError(f"program: expected a module with model and guide, got {type(program).__name__}")
    source = as_source(data)
    one = Batches(source, program, batch_size=1)
    with undisturbed(program):
        values = max(1, next(one.epoch(0))[0][0].numel())
    size = max(1, min(VALUES_AT_ONCE // (values * particles), one.num_data, 4096))
    batches = Batches(source, program, size)  # and not that one, whose loader of a stream goes on by one datum
    check(program, batches)
    return batches


class Gathered:
    """What batches give for each datum, in tensors with room for more of it.

    Small tensors that stay, made between the large ones of passes that go, keep their memory from being used again: of
    thousands of batches, gigabytes.

    Example:
        >>> gathered = Gathered()
        >>> for batch in torch.tensor([0.0, 1.0, 2.0]).split(1):
        ...     gathered.add(batch, -batch)
        >>> gathered.tensors()
        [tensor([0., 1., 2.]), tensor([-0., -1., -2.])]
    """

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []
        self._end = 0

    def add(self, *parts: Tensor) -> None:
        """The next batch's, each of shape `(B, ...)`."""
        start, self._end = self._end, self._end + len(parts[0])
        self._tensors = self._tensors or [torch.empty_like(part) for part in parts]
        if len(self._tensors[0]) < self._end:
            more = [tensor.new_empty(self._end, *tensor.shape[1:]) for tensor in self._tensors]
            self._tensors = list(map(torch.cat, zip(self._tensors, more, strict=True)))
        for tensor, part in zip(self._tensors, parts, strict=True):
            tensor[start : self._end] = part

    def tensors(self) -> list[Tensor]:
        """Those of all batches, each of shape `(N, ...)`."""
        return [tensor[: self._end].clone() for tensor in self._tensors]
