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
        self._torch = torch.Generator().manual_seed(seed).get_state()
        self._numpy = np.random.MT19937(seed)  # put in place of the other, as its state takes long to copy
        self._python = random.Random(seed).getstate()

    def _exchange(self) -> None:
        numpy: Any = np.random  # whose stubs leave out these two
        of_torch, of_numpy, of_python = torch.get_rng_state(), numpy.get_bit_generator(), random.getstate()
        torch.set_rng_state(self._torch)
        numpy.set_bit_generator(self._numpy)
        random.setstate(self._python)
        self._torch, self._numpy, self._python = of_torch, of_numpy, of_python

    def __enter__(self) -> None:
        self._exchange()

    def __exit__(self, *_: object) -> None:
        self._exchange()


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
