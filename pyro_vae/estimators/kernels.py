"""Kernels, and the distance between two distributions that one makes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

__all__ = ["RBF", "InverseMultiquadric", "Kernel"]


class Kernel(ABC):
    """A similarity of points, at most 1: what tells two distributions apart by their draws."""

    @abstractmethod
    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """The kernel of each of `a`, of shape `(*, n, D)`, with each of `b`, `(*, m, D)`: of shape `(*, n, m)`."""


@dataclass(frozen=True)
class RBF(Kernel):
    r"""The normal density's kernel.

    .. math:: k(a, b) = \exp\left(-\lVert a - b \rVert^2 / (2 h^2)\right)

    Args:
        bandwidth: The bandwidth `h`, in units of the latents; by default the root of their number of dimensions.

    Raises:
        ValueError: If `bandwidth` is not positive.

    Example:
        >>> import torch
        >>> RBF(bandwidth=1.0)(torch.zeros(1, 2), torch.ones(1, 2))
        tensor([[0.3679]])
    """

    bandwidth: float | None = None

    def __post_init__(self) -> None:
        _check_length("RBF", "bandwidth", self.bandwidth)

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """The exponential of the squared distance."""
        variance = a.shape[-1] if self.bandwidth is None else self.bandwidth**2
        return (-0.5 / variance * _squared_distance(a, b)).exp()


@dataclass(frozen=True)
class InverseMultiquadric(Kernel):
    r"""A kernel whose tails are heavy: points far off still have a gradient.

    .. math:: k(a, b) = \frac{c^2}{c^2 + \lVert a - b \rVert^2}

    Args:
        length: The length `c`, in units of the latents; by default the root of twice their number of dimensions, the
            distance between two standard normal draws.

    Raises:
        ValueError: If `length` is not positive.

    Reference:
        Tolstikhin et al., 2018. Wasserstein auto-encoders.

    Example:
        >>> import torch
        >>> InverseMultiquadric(length=1.0)(torch.zeros(1, 2), torch.ones(1, 2))
        tensor([[0.3333]])
    """

    length: float | None = None

    def __post_init__(self) -> None:
        _check_length("InverseMultiquadric", "length", self.length)

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """The reciprocal of the squared distance, finite at zero."""
        square = 2 * a.shape[-1] if self.length is None else self.length**2
        return square / (square + _squared_distance(a, b))


def squared_mmd(
    a: Tensor, b: Tensor, kernel: Callable[[Tensor, Tensor], Tensor], counted: Tensor | None = None
) -> Tensor:
    """The unbiased estimate of the squared maximum mean discrepancy of two samples.

    Args:
        a: Draws of one distribution, `(*, n, D)`.
        b: Draws of the other, `(*, m, D)`.
        kernel: The kernel.
        counted: Which of `a` count: ones and zeros, of shape `(n,)`.

    Example:
        >>> import torch
        >>> a, b = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [1.0]])
        >>> squared_mmd(a, b, RBF(bandwidth=1.0))
        tensor(-0.3935)
    """
    all_of_b = b.new_ones(b.shape[-2])
    counted = a.new_ones(a.shape[-2]) if counted is None else counted
    within_a = _mean(kernel(a, a), counted.outer(counted).fill_diagonal_(0))  # no draw with itself
    within_b = _mean(kernel(b, b), all_of_b.outer(all_of_b).fill_diagonal_(0))
    return within_a + within_b - 2 * _mean(kernel(a, b), counted.outer(all_of_b))


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    return (weights * values).sum((-2, -1)) / weights.sum().clamp(min=1)


def _squared_distance(a: Tensor, b: Tensor) -> Tensor:
    return (a.unsqueeze(-2) - b.unsqueeze(-3)).square().sum(-1)


def _check_length(kernel: str, name: str, length: float | None) -> None:
    if length is not None and not length > 0:
        raise ValueError(f"{kernel}: expected {name} > 0, got {length}")
