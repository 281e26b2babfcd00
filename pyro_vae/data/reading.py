"""Reading ahead by threads."""

from __future__ import annotations

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
    pool = ThreadPoolExecutor(num_threads, "pyro_vae_read", initializer=torch.set_num_threads, initargs=(1,))
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
        torch.set_num_threads(torch.get_num_threads())  # this thread's number: others begin with what was set last
