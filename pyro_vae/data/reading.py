"""Reading ahead: by threads, and by the processes of a `DataLoader`."""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader

__all__ = ["Plan", "end", "loader", "no_interrupts", "read_ahead"]

Part = TypeVar("Part")
Read = TypeVar("Read")


def read_ahead(read: Callable[[Part], Read], parts: Iterable[Part], num_threads: int) -> Iterator[Read]:
    """What `read` makes of each part, in order, each thread one part ahead of what is asked for.

    Example:
        >>> list(read_ahead(str, [1, 2, 3], num_threads=2))
        ['1', '2', '3']
    """
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="pyro_vae_read")
    pending: deque[Future[Read]] = deque()
    try:
        for part in parts:
            pending.append(pool.submit(read, part))
            if len(pending) > num_threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:  # whoever leaves in the middle of an epoch leaves no thread
        pool.shutdown(cancel_futures=True)


class Plan:
    """The batches of the running epoch, as a `DataLoader` asks for them: so that its workers can outlive an epoch."""

    batches: tuple[Tensor, ...] = ()

    def __iter__(self) -> Iterator[list[int]]:
        return (rows.tolist() for rows in self.batches)


def loader(data: Any, device: torch.device, seed: int, num_workers: int, **batches: Any) -> DataLoader:
    """A `DataLoader` whose workers stay from epoch to epoch, and which draws nothing from the global random state."""
    return DataLoader(
        data,
        **batches,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
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
