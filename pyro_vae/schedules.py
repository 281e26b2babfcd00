"""Schedules: functions of training progress in [0, 1]."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

__all__ = ["Constant", "Cosine", "Cyclical", "Linear", "Schedule", "Sigmoid"]


class Schedule(ABC):
    """A function of training progress, 0 at the first step and 1 at the end of the run."""

    @abstractmethod
    def __call__(self, progress: float) -> float:
        """The value at `progress` in [0, 1]."""


@dataclass(frozen=True)
class Constant(Schedule):
    r"""The same value all along; `Constant(4.0)` makes a beta-VAE.

    .. math:: \beta(t) = v

    Args:
        value: The value `v`.

    Reference:
        Higgins et al., 2017. beta-VAE: learning basic visual concepts with a constrained variational framework.

    Example:
        >>> Constant(4.0)(0.3)
        4.0
    """

    value: float = 1.0

    def __call__(self, progress: float) -> float:
        """The constant."""
        return self.value


@dataclass(frozen=True)
class _Ramp(Schedule):
    fraction: float = 0.5
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(f"{type(self).__name__}: expected 0 < fraction <= 1, got {self.fraction}")

    def __call__(self, progress: float) -> float:
        height = self._height(min(progress / self.fraction, 1.0))
        return self.start + (self.end - self.start) * height

    @abstractmethod
    def _height(self, u: float) -> float:
        """The ramp's height in [0, 1] at `u` in [0, 1]."""


@dataclass(frozen=True)
class Linear(_Ramp):
    r"""A straight line over the first `fraction` of the run, then flat.

    .. math:: \beta(t) = s + (e - s) \min(t / f, 1)

    Args:
        fraction: Fraction `f` of the run that the ramp takes, in (0, 1].
        start: Value `s` at the first step.
        end: Value `e` from the end of the ramp on.

    Raises:
        ValueError: If `fraction` is outside (0, 1].

    Reference:
        Sønderby et al., 2016. Ladder variational autoencoders.

    Example:
        >>> Linear(0.1)(0.05)
        0.5
    """

    def _height(self, u: float) -> float:
        return u


@dataclass(frozen=True)
class Cosine(_Ramp):
    r"""Half a cosine over the first `fraction` of the run, then flat.

    .. math:: \beta(t) = s + (e - s) \tfrac12 (1 - \cos(\pi \min(t / f, 1)))

    Args:
        fraction: Fraction `f` of the run that the ramp takes, in (0, 1].
        start: Value `s` at the first step.
        end: Value `e` from the end of the ramp on.

    Raises:
        ValueError: If `fraction` is outside (0, 1].

    Example:
        >>> round(Cosine(0.5)(0.25), 6)
        0.5
    """

    def _height(self, u: float) -> float:
        return 0.5 * (1.0 - math.cos(math.pi * u))


@dataclass(frozen=True)
class Sigmoid(_Ramp):
    r"""A logistic curve over the first `fraction` of the run, then flat.

    .. math:: \beta(t) = s + (e - s) \frac{\tanh(k (u - \tfrac12) / 2) + \tanh(k / 4)}{2 \tanh(k / 4)},
              \quad u = \min(t / f, 1)

    It is the logistic function of steepness `k`, stretched to start at `s` and to end at `e`.

    Args:
        fraction: Fraction `f` of the run that the ramp takes, in (0, 1].
        start: Value `s` at the first step.
        end: Value `e` from the end of the ramp on.
        steepness: The `k` above, more than 0.

    Raises:
        ValueError: If `fraction` is outside (0, 1] or `steepness` is not positive.

    Reference:
        Bowman et al., 2016. Generating sentences from a continuous space.

    Example:
        >>> Sigmoid(0.5)(0.25)
        0.5
    """

    steepness: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.steepness > 0:
            raise ValueError(f"Sigmoid: expected steepness > 0, got {self.steepness}")

    def _height(self, u: float) -> float:
        half = math.tanh(self.steepness / 4)
        return (math.tanh(self.steepness * (u - 0.5) / 2) + half) / (2 * half)


@dataclass(frozen=True)
class Cyclical(Schedule):
    r"""Several linear ramps one after another, each followed by a flat stretch.

    .. math:: \beta(t) = s + (e - s) \min(u / f, 1), \quad u = c t - \lfloor c t \rfloor

    Args:
        cycles: Number `c` of cycles in the run.
        fraction: Fraction `f` of a cycle that its ramp takes, in (0, 1].
        start: Value `s` at the start of each cycle.
        end: Value `e` from the end of each ramp on.

    Raises:
        ValueError: If `fraction` is outside (0, 1] or `cycles` is not positive.

    Reference:
        Fu et al., 2019. Cyclical annealing schedule: a simple approach to mitigating KL vanishing.

    Example:
        >>> [Cyclical(cycles=2)(t) for t in (0.0, 0.125, 0.25, 0.5, 1.0)]
        [0.0, 0.5, 1.0, 0.0, 1.0]
    """

    cycles: int = 4
    fraction: float = 0.5
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        if self.cycles < 1:
            raise ValueError(f"Cyclical: expected cycles > 0, got {self.cycles}")
        Linear(self.fraction)  # which checks the fraction

    def __call__(self, progress: float) -> float:
        """The value at `progress` in [0, 1]."""
        position = progress * self.cycles
        cycle = min(math.floor(position), self.cycles - 1)  # the run's end belongs to its last cycle
        return Linear(self.fraction, self.start, self.end)(position - cycle)
