"""Data sets read by the processes of a `DataLoader`."""

from __future__ import annotations

import dataclasses
import signal
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate, get_worker_info

from pyro_vae.data.randomness import Apart, seed_all

__all__ = ["Failure", "Plan", "check_num_workers", "end", "loader", "no_interrupts"]


def check_num_workers(num_workers: Any) -> None:
    """Raise `ValueError` unless it is a number of processes or threads.

    Example:
        >>> check_num_workers(2)
    """
    if not isinstance(num_workers, Integral) or isinstance(num_workers, bool) or num_workers < 0:
        raise ValueError(f"num_workers: expected a whole number, 0 or more, got {num_workers!r}")


class Plan:
    """The batches of the running epoch, as a `DataLoader` asks for them: so that its workers can outlive an epoch.

    Attributes:
        batches: Each batch's seed, or None for the random numbers that there are, and its rows.
        seed: Seed of the epoch, in memory that is shared with the workers, for a stream, which is asked for no rows.
    """

    def __init__(self) -> None:
        self.batches: Iterable[tuple[int | None, Tensor]] = ()
        self.seed = torch.zeros((), dtype=torch.int64)

    def __iter__(self) -> Iterator[tuple[int | None, list[int]]]:
        return ((seed, rows.tolist()) for seed, rows in self.batches)


@dataclasses.dataclass(frozen=True)
class Failure:
    """An error of a worker, given in place of a batch, as torch's own way makes many lines of its message."""

    kind: type[Exception]
    text: str
    where: str

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """What is left of an error for another process: a class of one's own may not be known there."""
        kind = next(base for base in type(error).__mro__ if base.__module__ == "builtins")
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return cls(kind, text, "".join(traceback.format_exception(error)))

    def error(self) -> Exception:
        """The error, of its own type if it is one of Python's, else of the nearest."""
        text = f"data: worker: {self.text}"
        try:
            error = self.kind(text)
        except TypeError:  # it wants more than a text
            error = RuntimeError(text)
        error.add_note(self.where)
        return error


class _Rows(Dataset):
    """Data of which whole batches are asked for; what is drawn in one depends on its seed alone."""

    def __init__(self, data: Dataset):
        self.data = data

    def __getitems__(self, batch: tuple[int | None, list[int]]) -> list[Any]:
        seed, rows = batch
        try:
            with nullcontext() if seed is None else Apart(seed):
                whole = getattr(self.data, "__getitems__", None)
                return whole(rows) if whole else [self.data[row] for row in rows]
        except Exception as error:
            return [_given(error)]


class _Stream(IterableDataset):
    """A stream, whose draws depend on the epoch's seed alone where a worker reads it."""

    def __init__(self, data: IterableDataset, seed: Tensor):
        self.data, self.seed = data, seed

    def __iter__(self) -> Iterator[Any]:
        if get_worker_info() is not None:
            seed_all(int(self.seed))
        try:
            yield from self.data
        except Exception as error:
            yield _given(error)


def _given(error: Exception) -> Failure:
    """The error as a worker gives it; here it is raised."""
    if get_worker_info() is None:
        raise error
    return Failure.of(error)


def _collated(items: list[Any]) -> Any:
    if isinstance(items[-1], Failure):
        return items[-1]
    try:
        return default_collate(items)
    except Exception as error:
        return _given(error)


def loader(data: Any, plan: Plan, device: torch.device, *, seed: int, num_workers: int, batch_size: int) -> DataLoader:
    """A `DataLoader` whose workers stay from epoch to epoch, and which draws nothing from the global random state.

    A stream has one worker at most, as each would read all of it.
    """
    if isinstance(data, IterableDataset):
        num_workers = min(num_workers, 1)
        if num_workers:
            plan.seed.share_memory_()
        how: dict[str, Any] = {"dataset": _Stream(data, plan.seed), "batch_size": batch_size}
    else:
        how = {"dataset": _Rows(data), "batch_sampler": plan}
    return DataLoader(
        **how,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        collate_fn=_collated,
        worker_init_fn=_ignore_interrupts,
        pin_memory=device.type == "cuda",
        generator=torch.Generator().manual_seed(seed),
    )


def end(loader: DataLoader | None) -> None:
    """End the workers of a loader, whoever still holds it: the traceback of an error does."""
    shut_down = getattr(getattr(loader, "_iterator", None), "_shutdown_workers", None)
    if shut_down is not None:
        shut_down()


@contextmanager
def no_interrupts() -> Iterator[None]:
    """Start processes that Ctrl-C does not reach; one that comes meanwhile reaches this one afterwards.

    Ctrl-C goes to all processes of a terminal, and the step that is to be finished first still needs its batch.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _ignore_interrupts(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as well, where there is no mask to start with
