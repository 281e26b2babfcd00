"""A training step as one graph: the loss of a batch, and the gradients of all parameters."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple
from unittest import mock

import torch
from pyro.infer import ELBO
from torch import Tensor

from pyro_vae.compilation.graphs import Graph, NotCompilableError, call_with
from pyro_vae.estimators.objective import Objective
from pyro_vae.estimators.particles import random_state
from pyro_vae.programs import Program

__all__ = ["CompiledStep", "annealed", "compile_step"]

_PROBES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)  # training progress at which schedules are looked at
_BETA = 0.37  # of the example: no value that anything could be special for


def compile_step(
    program: Program,
    estimator: ELBO,
    example_batch: Tensor | Sequence[Tensor],
    *,
    precision: Callable[[], AbstractContextManager] = nullcontext,
) -> CompiledStep:
    """Compile what a training step computes: the loss of a batch and the gradients of all parameters.

    Program, handlers and estimator run once, on tensors without values, forward and backward; what they computed is one
    graph of arithmetic, which TorchInductor turns into few kernels. On the example the graph must then give the loss
    and the gradients that the program gives, from the same random numbers.

    A step of the graph draws the very random numbers that a step of the program does. Batches of other shapes than the
    example's, and a program in the other of its two modes (training or evaluation), are run as they are, uncompiled.
    Handlers around this call, such as `handlers.weigh`, become part of the graph.

    Args:
        program: The program, on the device and in the mode (`train()`) that it is to run in.
        estimator: Any `pyro.infer.ELBO`.
        example_batch: A batch, a tensor or several.
        precision: What the forward pass runs in, such as `lambda: torch.autocast("cpu", torch.bfloat16)`; see
            `Objective`.

    Returns:
        A `CompiledStep`, to be called with a batch.

    Raises:
        NotCompilableError: If what the step computes depends on values of tensors (`Tape` lets it go back to random
            numbers), if the estimator keeps state from step to step, if there is no C++ compiler (on a CPU), or if the
            graph does not give what the program gives.

    Example:
        >>> import pyro_vae
        >>> from pyro.infer import Trace_ELBO
        >>> vae, x = pyro_vae.build((8, 8), latent=2), torch.ones(5, 8, 8)
        >>> step = compile_step(vae, Trace_ELBO(), x)
        >>> optimizer = torch.optim.Adam(vae.parameters(), fused=True)
        >>> for beta in (0.5, 1.0):
        ...     loss, rate, distortion = step(x, beta=beta)
        ...     optimizer.step()
    """
    batch = (example_batch,) if isinstance(example_batch, Tensor) else tuple(example_batch)
    return CompiledStep(Objective(program, estimator), batch, precision=precision)


class CompiledStep:
    """A step as one graph; `compile_step` makes it.

    Args:
        objective: Program and estimator.
        example: An example of what a step is called with.
        prepare: What makes a batch of that, by computations on tensors alone; it becomes part of the graph.
        precision: What the forward pass runs in.

    Attributes:
        seconds: How long tracing and compiling took.
        graph: The graph, a `torch.fx.GraphModule`.

    Raises:
        NotCompilableError: See `compile_step`.
    """

    def __init__(
        self,
        objective: Objective,
        example: Sequence[Tensor],
        prepare: Callable[..., Sequence[Tensor]] = lambda *batch: batch,
        precision: Callable[[], AbstractContextManager] = nullcontext,
    ):
        start = time.perf_counter()
        self.objective, self.prepare, self.precision = objective, prepare, precision
        self._kind = self._kind_of(example)
        self._parameters = dict(objective.named_parameters())
        self._dtype = next((p.dtype for p in self._parameters.values() if p.is_floating_point()), torch.float32)
        self._trained: list[str] = []  # the parameters whose gradients the graph gives, in their order
        with _left_alone(objective, example):
            self._eager(1.0, *example)  # an estimator may have things to find out, in its first run
            self._knobs = list(_knobs(objective))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the first run has said what there is to say
                self._graph = Graph(objective, self._step, [*self._numbers(_BETA), *example])
                self._compare(example)
        self.seconds = time.perf_counter() - start

    @property
    def graph(self) -> torch.fx.GraphModule:
        """What was traced."""
        return self._graph.graph

    def __call__(self, *batch: Tensor, beta: float = 1.0) -> Tensor:
        """Put the gradients of the loss per datum in place of those of the parameters.

        Args:
            *batch: The batch.
            beta: The weight of the rate.

        Returns:
            Loss, rate and distortion, means over the batch in nats per datum, a tensor of shape `(3,)`.
        """
        if self._kind_of(batch) != self._kind:
            return self._eager(beta, *batch)
        figures, *gradients = self._graph(*self._numbers(beta), *batch)
        for name, gradient in zip(self._trained, gradients, strict=True):
            self._parameters[name].grad = gradient
        return figures

    def _kind_of(self, batch: Sequence[Tensor]) -> Any:
        training = self.objective.program.training
        return training, [(tensor.shape, tensor.dtype, tensor.device) for tensor in batch]

    def _numbers(self, beta: float) -> list[Tensor]:
        return [torch.tensor(v, dtype=self._dtype) for v in (beta, *(getattr(*knob) for knob in self._knobs))]

    def _eager(self, beta: float, *batch: Tensor) -> Tensor:
        for parameter in self._parameters.values():
            parameter.grad = None
        with self.precision():
            loss, figures = self.objective(beta, *self.prepare(*batch))
        self.objective.differentiate(loss, self._parameters.values())
        return figures

    def _step(self, state: dict[str, Tensor], beta: Tensor, *inputs: Tensor) -> list[Tensor]:
        """What is traced: `_eager` as a function of all tensors that change."""
        numbers, batch = inputs[: len(self._knobs)], inputs[len(self._knobs) :]
        leaves = {name: state[name].detach() for name in self._parameters}
        for name, leaf in leaves.items():
            leaf.requires_grad_(self._parameters[name].requires_grad)
        with ExitStack() as stack:
            for knob, number in zip(self._knobs, numbers, strict=True):
                stack.enter_context(mock.patch.object(*knob, number))
            batch = tuple(self.prepare(*batch))
            stack.enter_context(torch.enable_grad())
            with self.precision():
                loss, figures = call_with(self.objective, state | leaves, beta, *batch)
            self.objective.differentiate(loss, leaves.values())
        gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
        self._trained = list(gradients)
        return [figures, *gradients.values()]

    def _compare(self, example: Sequence[Tensor]) -> None:
        """Raise unless the graph gives what the program gives, from the same random numbers."""
        state = random_state(example)
        figures, gradients = self._eager(_BETA, *example), self._gradients()
        state.restore()
        compiled, theirs = self(*example, beta=_BETA), self._gradients()
        if any(name.startswith("__") for name in self.objective.param_store["params"]):
            raise NotCompilableError(f"{type(self.objective.estimator).__name__} keeps state from step to step")
        if gradients.keys() != theirs.keys():
            raise NotCompilableError(f"the graph reaches other parameters: {sorted(gradients.keys() ^ theirs.keys())}")
        ours = torch.cat([gradients[name].flatten() for name in theirs])
        error = (ours - torch.cat([gradient.flatten() for gradient in theirs.values()])).norm() / ours.norm()
        # Other random numbers would make a difference of a percent at least; rounding makes one far below.
        allowed = 1e-6 if figures.dtype == torch.float64 else 1e-3
        if torch.is_autocast_enabled(figures.device.type):
            allowed = 3e-2
        if error > allowed or not torch.allclose(figures, compiled, rtol=allowed, equal_nan=True):
            raise NotCompilableError(
                f"the graph does not give what the program gives: loss {compiled[0]:g} for {figures[0]:g}, gradients "
                f"off by {error:.1e} of their norm; does the program keep anything in Python from step to step?"
            )

    def _gradients(self) -> dict[str, Tensor]:
        return {name: p.grad for name, p in self._parameters.items() if p.grad is not None}


class _Knob(NamedTuple):
    """A number that a schedule sets before each step, and that the graph takes as an argument."""

    owner: Any
    name: str


def annealed(objective: Objective) -> list[Any]:
    """What follows the progress of training, by a method `set_progress`, in the program and the estimator."""
    return [each for each in (*objective.program.modules(), objective.estimator) if hasattr(each, "set_progress")]


def _knobs(objective: Objective) -> Iterator[_Knob]:
    """The numbers that change with the progress of training. (Of modules they may be buffers, which are inputs.)"""
    for owner in annealed(objective):
        before = dict(vars(owner))
        seen = []
        for progress in _PROBES:
            owner.set_progress(progress)
            seen.append({name: value for name, value in vars(owner).items() if isinstance(value, int | float)})
        for name, value in seen[0].items():
            if any(other.get(name) != value for other in seen):
                setattr(owner, name, before[name])
                yield _Knob(owner, name)


@contextmanager
def _left_alone(objective: Objective, batch: Sequence[Tensor]) -> Iterator[None]:
    """Leave random state, gradients, buffers and what estimators keep as they were."""
    state, kept = random_state(batch), objective.param_store
    gradients = {parameter: parameter.grad for parameter in objective.parameters()}
    buffers = {buffer: buffer.clone() for buffer in objective.buffers()}
    objective.param_store = {"params": {}, "constraints": {}}
    try:
        yield
    finally:
        objective.param_store = kept
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, value in buffers.items():
                buffer.copy_(value)
        state.restore()
