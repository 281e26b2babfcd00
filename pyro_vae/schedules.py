"""Schedules: functions of training progress in [0, 1], and a controller that looks at the rate instead."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Constant", "ControlVAE", "Cosine", "Cyclical", "Linear", "Schedule", "Sigmoid"]


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


@dataclass
class ControlVAE(Schedule):
    r"""A feedback controller: it steers the rate to a set point, and beta is what that takes.

    .. math:: \beta_t = \min\Big(\max\Big(\frac{K_p}{1 + \exp(e_t)} - K_i \sum_{s \le t} e_s + l,\; l\Big),\; h\Big),
              \quad e_t = R^* - R_t

    A rate above the set point raises beta, and one below lowers it. The sum takes beta to a bound and no further
    (anti-windup), so that beta leaves the bound as soon as the rate crosses the set point. The paper stops the sum
    while beta is out of bounds instead, from where it may never come back.

    `fit` calls `update` with the rate of each batch. It works on a copy, so that one controller serves many runs.

    Args:
        rate: The set point `R^*`, in nats per datum.
        proportional: The gain `K_p`.
        integral: The gain `K_i`, per step and nat. Beta takes about `1 / (K_i |e|)` steps to change by 1: raise it for
            runs of a few hundred steps, and lower it for long ones (the paper's is 1e-4).
        low: The lowest beta `l`, at which it starts; 1 for disentangling.
        high: The highest beta `h`. It takes more than 1 to keep the rate below what the ELBO would choose.

    Raises:
        ValueError: If `rate` or `integral` is not positive, `proportional` is negative, or not 0 <= `low` < `high`.

    Reference:
        Shao et al., 2020. ControlVAE: controllable variational autoencoder.

    Example:
        >>> controller = ControlVAE(rate=20.0, integral=0.01)
        >>> for rate in (35.0, 30.0, 25.0):
        ...     controller.update(rate)
        >>> round(controller(0.5), 6)
        0.309933
    """

    rate: float
    proportional: float = 0.01
    integral: float = 1e-3
    low: float = 0.0
    high: float = 10.0
    _sum: float = field(default=0.0, init=False, repr=False)  # - K_i times the sum of the errors
    _beta: float = field(default=0.0, init=False, repr=False)

    def __post_init__(self) -> None:
        if not (0 < self.rate < math.inf and self.integral > 0 and self.proportional >= 0):
            raise ValueError(
                f"ControlVAE: expected rate > 0, integral > 0 and proportional >= 0, "
                f"got rate={self.rate}, integral={self.integral}, proportional={self.proportional}"
            )
        if not 0 <= self.low < self.high:
            raise ValueError(f"ControlVAE: expected 0 <= low < high, got low={self.low}, high={self.high}")
        self._beta = self.low

    def __call__(self, progress: float) -> float:
        """The beta that the rates so far have led to, whatever the progress."""
        return self._beta

    def update(self, rate: float) -> None:
        """Take the rate of a step into account, in nats per datum.

        Raises:
            ValueError: If the rate is not finite.
        """
        if not math.isfinite(rate):
            raise ValueError(f"ControlVAE: expected a finite rate, got {rate} (enumerated latents have none)")
        error = self.rate - rate
        proportional = self.proportional * (1 - math.tanh(error / 2)) / 2  # the logistic, which cannot overflow
        base = self.low + proportional
        self._beta = min(max(base + self._sum - self.integral * error, self.low), self.high)
        self._sum = self._beta - base

    def state_dict(self) -> dict[str, float]:
        """What it remembers, as plain numbers."""
        return {"sum": self._sum, "beta": self._beta}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from where `state_dict` was taken."""
        self._sum, self._beta = state["sum"], state["beta"]
