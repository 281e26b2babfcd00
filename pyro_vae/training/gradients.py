"""The gradients of a step: of the program as it stands, or of its compiled graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pyro
from torch import Tensor

from pyro_vae.compilation import CompiledStep, Decision, NotCompilableError
from pyro_vae.data import Batches
from pyro_vae.estimators.objective import Objective
from pyro_vae.estimators.particles import random_state

__all__ = ["Gradients"]

_TIMED_STEPS = 10
WORTH_COMPILING = 60.0  # seconds that the rest of a run would take; compiling takes 10 to 40, and saves a third or more


class Gradients:
    """What a step computes; it compiles that where it is told to, or where it pays.

    Args:
        objective: Program and estimator.
        placed: The same as Fabric has set it up: on its device, and run in its precision.
        batches: The data.
        fabric: Lightning's Fabric, with a device and a precision.
        compile: "auto", True or False.

    Attributes:
        compiled: The compiled step, or None.
        announce: Called with a line when compiling begins, and one when it is done.
    """

    def __init__(self, objective: Objective, placed: Any, batches: Batches, fabric: Any, compile: str | bool):
        self.objective, self.batches, self.fabric = objective, batches, fabric
        self.compiled: CompiledStep | None = None
        self.announce: Callable[[str], None] = lambda line: None
        self._fabric_objective = placed
        self._is_to_be_compiled = Decision(compile, WORTH_COMPILING, _TIMED_STEPS)
        self._steps = 0
        self._before: random_state

    def __call__(self, beta: float, raw: tuple[Tensor, ...], remaining: int) -> Tensor:
        """Put the gradients of a batch in place of the parameters' own.

        Args:
            beta: The weight of the rate.
            raw: What `Batches.raw` gave.
            remaining: Steps that remain, this one included.

        Returns:
            Loss, rate and distortion per datum, a tensor of shape `(3,)`.
        """
        if self._is_to_be_compiled(remaining, self.batches.is_whole(raw)):
            self._try_to_compile(raw)
        self._steps += 1
        if self.compiled is None:
            return self._eager(beta, raw)
        self._before = random_state(raw)
        return self.compiled(*raw, beta=beta)

    def first_nonfinite(self, beta: float, raw: tuple[Tensor, ...]) -> str:
        """The first site of the last step that was not finite, in words."""
        if self.compiled is not None:  # the graph knows no sites: once more, with the same random numbers
            self._before.restore()
            with pyro.validation_enabled(False), self.fabric.autocast():
                self.objective(beta, *self.batches.prepare(*raw))
        return self.objective.recorded.first_nonfinite()

    def _eager(self, beta: float, raw: tuple[Tensor, ...]) -> Tensor:
        for parameter in self.objective.parameters():
            parameter.grad = None
        # Pyro checks the first step; after that its checks, of a program that does not change, are left out.
        with pyro.validation_enabled(False) if self._steps > 1 else nullcontext():
            loss, figures = self._fabric_objective(beta, *self.batches.prepare(*raw))
        self.objective.differentiate(loss, self.objective.parameters(), self.fabric.backward)
        return figures

    def _try_to_compile(self, raw: tuple[Tensor, ...]) -> None:
        self.announce("compiling the step ...")
        try:
            if self.fabric.strategy.precision.precision == "16-mixed":
                raise NotCompilableError("16-mixed scales gradients from step to step; bf16-mixed does not")
            self.compiled = CompiledStep(self.objective, raw, self.batches.prepare, self.fabric.autocast)
        except NotCompilableError as error:
            whoever_called_fit = 8
            warnings.warn(f"the step is not compiled: {error}; it runs as it is, slower", stacklevel=whoever_called_fit)
        else:
            self.announce(f"compiled the step in {self.compiled.seconds:.0f} s")
