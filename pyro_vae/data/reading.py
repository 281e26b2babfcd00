"""Reading ahead by threads."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

__all__ = ["read_ahead"]

Part = TypeVar("Part")
Read = TypeVar("Read")


def read_ahead(read: Callable[[Part], Read], parts: Iterable[Part], num_threads: int) -> Iterator[Read]:
    """What `read` makes of each part, in order, each thread one part ahead of what is asked for.

    A reading thread computes alone: with helpers of its own there would be more threads than processors, and those of
    the step, which wait for one another, would be put to sleep each time.

    Example:
        >>> list(read_ahead(str, [1, 2, 3], num_threads=2))
        ['1', '2', '3']
    """
    pool = ThreadPoolExecutor(num_threads, "pyro_vae_read", initializer=_alone, initargs=(torch.get_num_threads(),))
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


def _alone(num_threads: int) -> None:
    """Let this thread compute alone, and those that others start go on with so many."""
    torch.get_num_threads()  # else the first computation sets it
    torch.set_num_threads(1)
    other = threading.Thread(target=torch.set_num_threads, args=(num_threads,))  # each begins with what was set last
    other.start()
    other.join()
