"""Batches of anything that holds data."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from pyro_vae.data.disk import OnDisk, is_on_disk
from pyro_vae.data.loading import Splits
from pyro_vae.data.randomness import Apart, taken_within
from pyro_vae.data.reading import read_ahead
from pyro_vae.data.sets import InMemory, Served, to_float
from pyro_vae.data.workers import Failure, Plan, check_num_workers, end, loader, no_interrupts
from pyro_vae.programs import MANY, Program, num_inputs, placement

__all__ = ["Batches", "as_source"]


def as_source(data: Any) -> Dataset | DataLoader:
    """A tensor, array, table, `(x, y)` pair, `Dataset` or `DataLoader` as something that batches are drawn from.

    A memory map and a Zarr array stay on disk.

    Raises:
        ValueError: If it is something else.

    Example:
        >>> len(as_source(np.zeros((3, 2))))
        3
    """
    if isinstance(data, Dataset | DataLoader):
        return data
    if isinstance(data, Splits | str | dict):
        raise ValueError(f"data: expected a tensor, array, Dataset or DataLoader, got {type(data).__name__}")
    pair = data if isinstance(data, tuple) and len(data) == 2 else (data,)
    if is_on_disk(pair[0]):
        return OnDisk(*pair)
    if len(pair) == 2:
        return InMemory(*pair)
    try:
        return InMemory(data)
    except TypeError:
        raise ValueError(f"data: expected a tensor, array, Dataset or DataLoader, got {type(data).__name__}") from None


class Batches:
    """Batches of data on the program's device, one epoch at a time, in an order that the seed and the epoch fix.

    Data on disk are read by threads while the program computes, a `Dataset` by the processes of a `DataLoader`, where
    there are any. What a `Dataset` draws, from the random numbers of torch, NumPy or Python, is a function of seed,
    epoch and batch, whoever reads it; so is what a worker draws in an `IterableDataset`, but for the batch.

    Args:
        data: Anything that `as_source` takes. A `DataLoader` keeps its own batch size and order (and a run that was
            stopped within an epoch of one that shuffles goes on with another order), an `IterableDataset` its order:
            it must begin anew at each `iter`, as there is one for the first look at the data and one an epoch.
        program: The program, which says how many tensors of a batch it takes, and their device and dtype.
        batch_size: Data in a batch; the last one of an epoch may be smaller.
        seed: Seed of the order; None keeps the order of the data.
        num_workers: Processes that read a `Dataset` (0 reads it between steps; an `IterableDataset` has one at most, as
            each would read all of it), or threads that read data on disk (always one at least). The order is the same.

    Attributes:
        event_shape: Shape of one datum, once `check` has looked at one.
        tests: Called with what is read from disk, as it is kept there, until all of it was read; given by `check`.

    Raises:
        ValueError: If the batch size is not in [1, number of data], the data have no length, or `num_workers` is no
            whole number.

    Example:
        >>> import pyro_vae
        >>> batches = Batches(torch.zeros(10, 8, 8), pyro_vae.build((8, 8), latent=2), batch_size=4)
        >>> [len(x) for (x,) in batches.epoch(0)]
        [4, 4, 2]
    """

    def __init__(self, data: Any, program: Program, batch_size: int, seed: int | None = None, num_workers: int = 0):
        check_num_workers(num_workers)
        self.source: Any = as_source(data)
        self.device, self.dtype = placement(program)
        self.num_inputs = num_inputs(program)
        self.batch_size = batch_size
        self.seed = seed
        self.rank, self.count = 0, 1  # of the processes that share each batch
        self.num_workers = num_workers
        self.event_shape: tuple[int, ...] | None = None
        self.tests: list[Callable[..., None]] = []
        self._plan = Plan()
        self._started_loader: DataLoader | None = None
        sized: Any = self.source.dataset if isinstance(self.source, DataLoader) else self.source
        try:
            self.num_data = len(sized)
        except TypeError:
            wanted = "a length, as steps are counted in advance (an IterableDataset may say with __len__"
            raise ValueError(f"data: expected {wanted} how many data an epoch has), got none") from None
        if self.num_data == 0:
            raise ValueError("data: expected at least one datum, got none")
        if not isinstance(self.source, DataLoader) and not 1 <= batch_size <= self.num_data:
            raise ValueError(f"batch size: expected 1 to {self.num_data} (the number of data), got {batch_size}")
        if len(self) == 0:
            raise ValueError(f"data: expected at least one batch of {self.num_data} data, got none (is drop_last on?)")
        if isinstance(self.source, InMemory):
            self.source = self.source.to(self.device)

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self.source) if isinstance(self.source, DataLoader) else -(-self.num_data // self.batch_size)

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[tuple[Tensor, ...]]:
        """The batches of an epoch, without its first `skip`."""
        for raw in self.raw(epoch, skip):
            yield self.prepare(*raw)

    def raw(self, epoch: int, skip: int = 0) -> Iterator[tuple[Tensor, ...]]:
        """What `prepare` makes the batches of an epoch of, on the device: of data in memory, the rows and all data."""
        if isinstance(self.source, InMemory):
            for rows in self._order(epoch).to(self.device).split(self.batch_size)[skip:]:
                yield (rows[self._share(len(rows))], *self.source.tensors)
        elif isinstance(self.source, OnDisk):
            yield from self._read(epoch, skip)
        else:
            yield from self._streamed(epoch, skip)

    def _read(self, epoch: int, skip: int) -> Iterator[tuple[Tensor, ...]]:
        """Batches of data on disk. Rows are read in their order in the file, many batches' at once."""
        size = self.source.part(self.batch_size, shuffled=self.seed is not None)
        parts = self._order(epoch)[skip * self.batch_size :].split(size)

        def read(part: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
            rising, order = part.sort()
            tensors = self.source.read(rising, self.num_inputs)
            for test in self.tests:
                test(*tensors)
            return order.argsort().to(self.device), tuple(tensor.to(self.device) for tensor in tensors)

        for places, tensors in read_ahead(read, parts, max(1, self.num_workers)):
            for batch in places.split(self.batch_size):
                yield self._tensors([tensor[batch] for tensor in tensors])
        if skip == 0:  # all have been tested, and another epoch reads the same
            self.tests = []

    def _streamed(self, epoch: int, skip: int) -> Iterator[tuple[Tensor, ...]]:
        """Batches of a loader, the user's or our own."""
        left = len(self) - skip
        source = self.source if isinstance(self.source, DataLoader) else self._loader(epoch, skip)
        if source is not self.source and not isinstance(self.source, IterableDataset):
            skip = 0  # the loader reads nothing of it
        # Processes have random states of their own, and must draw the same order.
        drawn = Apart(self._state(epoch)) if self.count > 1 else nullcontext()
        # What is skipped was drawn before the checkpoint, whose random state must not be touched again.
        with torch.random.fork_rng([], enabled=skip > 0):
            with drawn, no_interrupts():
                started = iter(source)
            rest = taken_within(drawn, itertools.islice(started, skip, skip + left))
            first = list(itertools.islice(rest, 1)) if skip > 0 else []
        for batch in itertools.chain(first, rest):
            yield self._tensors(batch)
            left -= 1
        if left > 0:
            raise ValueError(f"data: expected {len(self)} batches in an epoch, as its length says, got {left} fewer")

    def _loader(self, epoch: int, skip: int) -> DataLoader:
        """Our loader of a `Dataset`, the same one in every epoch, set to this one."""
        self._plan.seed.fill_(self._state(epoch))
        if not isinstance(self.source, IterableDataset):
            batches = self._order(epoch).split(self.batch_size)
            self._plan.batches = (
                (None if self.seed is None else self._state(epoch, i + 1), batches[i])
                for i in range(skip, len(batches))
            )
        if self._started_loader is None:
            how = {"seed": self._state(epoch), "num_workers": self.num_workers, "batch_size": self.batch_size}
            self._started_loader = loader(self.source, self._plan, self.device, **how)
        return self._started_loader

    def close(self) -> None:
        """End the processes that read, if there are any; another epoch starts them anew."""
        end(self._started_loader)
        self._started_loader = None

    def prepare(self, *raw: Tensor) -> tuple[Tensor, ...]:
        """A batch of what `raw` gave, by computations on tensors alone, so that they can be compiled."""
        if isinstance(self.source, InMemory):
            rows, x, *y = raw
            raw = x[rows], *(labels[rows] for labels in y)
        if isinstance(self.source, Served):
            raw = self.source.serve(*raw)
        if len(raw) < self.num_inputs < MANY:
            expected = f"expected {self.num_inputs} tensors in a batch, such as (x, exposure)"
            raise ValueError(f"data: {expected}, got {len(raw)}")
        x, *rest = raw[: self.num_inputs]
        # Labels and other companions keep integer dtypes.
        return (to_float(x, self.dtype), *(r.to(self.dtype) if r.is_floating_point() else r for r in rest))

    def is_whole(self, raw: tuple[Tensor, ...]) -> bool:
        """Whether this is (the process's share of) a batch of the full size, and no smaller one at an epoch's end."""
        full = self.source.batch_size if isinstance(self.source, DataLoader) else self.batch_size
        return full is None or len(raw[0]) == len(range(full)[self._share(full)])

    def rows(self, rows: Tensor) -> tuple[Tensor, ...]:
        """The batch of these rows, a tensor of indices on the program's device, of data in memory."""
        return self.prepare(rows, *self.source.tensors)

    def _order(self, epoch: int) -> Tensor:
        if self.seed is None:
            return torch.arange(self.num_data)
        generator = torch.Generator().manual_seed(self._state(epoch))
        if isinstance(self.source, OnDisk):
            return self.source.order(generator, self.batch_size)
        return torch.randperm(self.num_data, generator=generator)

    def _state(self, *of: int) -> int:
        """Seed of an epoch, or of a batch in it, counted from 1."""
        return int(np.random.SeedSequence((self.seed or 0, *of)).generate_state(1)[0])

    def _share(self, size: int) -> slice:
        """The rows of a batch that are this process's; none, where there are fewer rows than processes."""
        return slice(size * self.rank // self.count, size * (self.rank + 1) // self.count)

    def _tensors(self, batch: Any) -> tuple[Tensor, ...]:
        """What a stream gave, checked and on the device."""
        if isinstance(batch, Failure):
            raise batch.error()
        items = batch if isinstance(batch, tuple | list) else (batch,)
        if not items or not all(isinstance(item, Tensor) for item in items):
            names = ", ".join(type(item).__name__ for item in items) or "none"
            raise ValueError(f"data: expected tensors in a batch, got {names}")
        if any(item.ndim == 0 for item in items):
            raise ValueError("data: expected tensors in a batch of one row a datum, got one without dimensions")
        share = self._share(len(items[0]))
        return tuple(item[share].to(self.device, non_blocking=True) for item in items[: self.num_inputs])
