"""What a gradient and a step are measured by: running moments, and the memory at the peak."""

from __future__ import annotations

import gc
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["Moments", "peak_memory"]


class Moments:
    """Mean and spread of some tensors' gradients over many draws, from running sums in float64.

    Args:
        tensors: The tensors; their gradients are taken from `.grad`, where None is zero.

    Reference:
        Welford, 1962. Note on a method for calculating corrected sums of squares and products.

    Example:
        >>> x = torch.zeros(2, requires_grad=True)
        >>> moments = Moments([x])
        >>> for slope in (1.0, 3.0):
        ...     x.grad = torch.tensor([slope, 0.0])
        ...     moments.add(num_data=1)
        >>> moments.variance([x]), moments.snr([x])
        (1.0, 1.224744871391589)
    """

    def __init__(self, tensors: Iterable[Tensor]):
        # On the CPU, since not every accelerator has float64.
        self._sums = {tensor: [torch.zeros(tensor.shape, dtype=torch.float64) for _ in range(2)] for tensor in tensors}
        self._count = 0

    def add(self, num_data: int) -> None:
        """Take the present gradients, divided by `num_data`, as another draw."""
        self._count += 1
        for tensor, (mean, squares) in self._sums.items():
            if tensor.grad is None:
                gradient = torch.zeros_like(mean)
            else:
                gradient = tensor.grad.detach().to("cpu", torch.float64) / num_data
            deviation = gradient - mean
            mean += deviation / self._count
            squares += deviation * (gradient - mean)

    def variance(self, tensors: Sequence[Tensor]) -> float:
        """The variance of a coordinate of the gradient, mean over coordinates; NaN if there are none."""
        size = sum(tensor.numel() for tensor in tensors)
        return (self._total_variance(tensors) / size).item() if size else math.nan

    def snr(self, tensors: Sequence[Tensor]) -> float:
        """The norm of the mean gradient over the root of its total variance, less the bias that few draws give."""
        if not tensors:
            return math.nan
        variance = self._total_variance(tensors)
        signal = torch.stack([self._sums[tensor][0].square().sum() for tensor in tensors]).sum()
        return ((signal - variance / self._count).clamp(min=0) / variance).sqrt().item()

    def _total_variance(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.stack([self._sums[tensor][1].sum() for tensor in tensors]).sum() / (self._count - 1)


def peak_memory(step: Callable[[], Any], device: torch.device) -> float:
    """The memory in MiB that a step's tensors take at the peak, above what was taken before; NaN if nothing tells.

    Args:
        step: What to run.
        device: Where its tensors are. On CUDA devices the count of the peak starts anew.

    Example:
        >>> round(peak_memory(lambda: torch.ones(2**20) + 1, torch.device("cpu")), 2)
        8.0
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        with _no_collection():
            step()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    if device.type != "cpu":
        return math.nan
    with _quiet_profiler(), _no_collection(), torch.autograd.profiler.profile(profile_memory=True) as profile:
        step()
    results: Any = profile.kineto_results
    events = sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    return max(itertools.accumulate(e.nbytes() for e in events), default=0) / 2**20


@contextmanager
def _no_collection() -> Iterator[None]:
    """What was left to Python's garbage collector before is not let go of now, to count against what is taken."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _quiet_profiler() -> Iterator[None]:
    """Torch's profiler writes lines to stderr, unless it is told not to when it first runs."""
    name = "KINETO_LOG_LEVEL"
    before = os.environ.get(name)
    os.environ[name] = before or "99"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
