"""Supports that torch's constraints lack."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributions import TransformedDistribution, constraints

__all__ = [
    "Grid",
    "OneHotGroups",
    "boolean_vector",
    "describe",
    "innermost",
    "open_unit_interval",
    "same_support",
    "simplices",
]

boolean_vector = constraints.independent(constraints.boolean, 1)


class _OpenUnitInterval(constraints.Constraint):
    """Values strictly between 0 and 1."""

    def check(self, value: Tensor) -> Tensor:
        return (value > 0) & (value < 1)

    def __repr__(self) -> str:
        return "OpenUnitInterval()"


open_unit_interval = _OpenUnitInterval()


class Grid(constraints.Constraint):
    """The grid `i / (bins - 1)` with `i` from 0 to `bins - 1`, up to rounding.

    Example:
        >>> import torch
        >>> Grid(5).check(torch.tensor([0.25, 0.3]))
        tensor([ True, False])
    """

    def __init__(self, bins: int):
        self.bins = bins

    def check(self, value: Tensor) -> Tensor:
        """Whether values are on the grid."""
        index = value * (self.bins - 1)
        return (value >= 0) & (value <= 1) & ((index - index.round()).abs() < 1e-2)

    def __repr__(self) -> str:
        return f"Grid(bins={self.bins})"


class OneHotGroups(constraints.Constraint):
    """Groups of `classes` values, one of each group 1 and the others 0, side by side in a vector.

    Example:
        >>> import torch
        >>> OneHotGroups(2).check(torch.tensor([[0.0, 1.0, 1.0, 0.0], [0.0, 1.0, 1.0, 1.0]]))
        tensor([ True, False])
    """

    event_dim = 1
    is_discrete = True

    def __init__(self, classes: int | None = None):
        self.classes = classes

    def check(self, value: Tensor) -> Tensor:
        """Whether vectors are groups of one-hot vectors."""
        groups = value.unflatten(-1, (-1, self.classes or value.shape[-1]))
        return constraints.one_hot.check(groups).all(-1)

    def __repr__(self) -> str:
        return "OneHotGroups()"


class _Simplices(constraints.Constraint):
    """Groups of probabilities that add up to one, side by side in a vector, away from zero."""

    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        return ((value > 0) & (value <= 1 + 1e-6)).all(-1)

    def __repr__(self) -> str:
        return "Simplices()"


simplices = _Simplices()


def same_support(a: Any, b: Any) -> bool:
    """Whether two constraints are of the same kind, as far as one can see without values.

    Example:
        >>> same_support(constraints.real_vector, constraints.independent(constraints.real, 1))
        True
    """
    return repr(a) == repr(b)


def describe(support: Any) -> str:
    """A support in words.

    Example:
        >>> describe(constraints.real_vector)
        'real numbers'
    """
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    words = {
        "Real()": "real numbers",
        "Boolean()": "0 and 1",
        "Interval(lower_bound=0.0, upper_bound=1.0)": "0 to 1",
        "OpenUnitInterval()": "0 to 1, ends left out",
        "GreaterThan(lower_bound=0.0)": "positive numbers",
        "IntegerGreaterThan(lower_bound=0)": "whole numbers from 0 up",
        "OneHotGroups()": "one-hot vectors",
        "Simplices()": "simplices",
        "Sphere": "the unit sphere",
    }
    text = repr(support)
    # Bounds may be whole tensors, one for each value.
    return words.get(text, text if len(text) < 60 else type(support).__name__.strip("_"))


def innermost(fn: Any) -> Any:
    """The distribution of single values that one is made of, or the likelihood of single pixels.

    Example:
        >>> import pyro.distributions as dist
        >>> import torch
        >>> innermost(dist.Poisson(torch.ones(3)).mask(True).to_event(1))
        Poisson(rate: torch.Size([3]))
    """
    # A transformed distribution, such as LogNormal, also has a base, but is another kind.
    while hasattr(fn, "base_dist") and not isinstance(fn, TransformedDistribution):
        fn = fn.base_dist
    return getattr(fn, "pixel_likelihood", fn)
