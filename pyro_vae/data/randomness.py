"""Random numbers that reading draws, apart from those of the program."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import numpy as np
import torch

__all__ = ["Apart", "seed_all", "taken_within"]

Item = TypeVar("Item")


def seed_all(seed: int) -> None:
    """Seed what data draw from: torch on the CPU, NumPy and Python. A GPU's noise is the program's own.

    Example:
        >>> seed_all(3)
        >>> random.randrange(100)
        30
    """
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


class Apart(AbstractContextManager):
    """Random states of their own: entered again they go on, and those outside are left as they were.

    Args:
        seed: Where they start, below 2^32.

    Example:
        >>> apart = Apart(seed=3)
        >>> with apart:
        ...     random.randrange(100)
        30
    """

    def __init__(self, seed: int):
        self.seed = seed
        self._own: tuple[Any, ...] | None = None

    def __enter__(self) -> None:
        self._outside = _states()
        if self._own is None:
            seed_all(self.seed)
        else:
            _restore(*self._own)

    def __exit__(self, *_: object) -> None:
        self._own = _states()
        _restore(*self._outside)


def taken_within(context: AbstractContextManager, items: Iterator[Item]) -> Iterator[Item]:
    """Items of an iterator that draws within a context; what is done with them is not within it.

    Example:
        >>> list(taken_within(Apart(seed=3), iter([1, 2])))
        [1, 2]
    """
    while True:
        with context:
            taken = list(itertools.islice(items, 1))
        if not taken:
            return
        yield taken[0]


def _states() -> tuple[Any, ...]:
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


def _restore(of_torch: Any, of_numpy: Any, of_python: Any) -> None:
    torch.set_rng_state(of_torch)
    np.random.set_state(of_numpy)
    random.setstate(of_python)
