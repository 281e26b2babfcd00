"""A training step traced once: the handlers vanish, and what is left is one graph of arithmetic, compiled."""

from __future__ import annotations

import itertools
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple
from unittest import mock

import pyro
import torch
from pyro.infer import ELBO
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyro_vae.estimators.objective import Objective
from pyro_vae.estimators.particles import random_state
from pyro_vae.estimators.tracing import Tape
from pyro_vae.programs import Program

__all__ = ["CompiledStep", "NotCompilableError", "annealed", "compile_step"]

_PATCHED = threading.Lock()  # while a step is traced, others wait
_PROBES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)  # training progress at which schedules are looked at
_BETA = 0.37  # of the example: no value that anything could be special for


class NotCompilableError(ValueError):
    """A step cannot be one graph; the message says why, in one line."""


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

    Reference:
        Ansel et al., 2024. PyTorch 2: faster machine learning through dynamic Python bytecode transformation and graph
        compilation (TorchInductor).

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

    Example:
        >>> import pyro_vae
        >>> from pyro.infer import Trace_ELBO
        >>> data = torch.ones(100, 8, 8, dtype=torch.uint8)
        >>> objective = Objective(pyro_vae.build((8, 8), latent=2), Trace_ELBO())
        >>> step = CompiledStep(objective, (torch.arange(5),), lambda rows: [data[rows].float()])
        >>> step(torch.arange(10, 15)).shape
        torch.Size([3])
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
        self._parameters, self._buffers = dict(objective.named_parameters()), dict(objective.named_buffers())
        self._dtype = next((p.dtype for p in self._parameters.values() if p.is_floating_point()), torch.float32)
        self._trained: list[str] = []  # the parameters whose gradients the graph gives, in their order
        with _left_alone(objective, example):
            self._knobs = list(_knobs(objective))
            inputs = self._inputs(_BETA, example)
            self._eager(_BETA, *example)  # an estimator may have things to find out, in its first run
            self.graph = self._traced(inputs)
            self._compiled = _compiled(self.graph, inputs)
            self._compare(example)
        self.seconds = time.perf_counter() - start

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
        with torch.no_grad():
            figures, *gradients = self._compiled(*self._inputs(beta, batch))
        for name, gradient in zip(self._trained, gradients, strict=True):
            self._parameters[name].grad = gradient
        return figures

    def _kind_of(self, batch: Sequence[Tensor]) -> Any:
        training = self.objective.program.training
        return training, [(tensor.shape, tensor.dtype, tensor.device) for tensor in batch]

    def _inputs(self, beta: float, batch: Sequence[Tensor]) -> list[Tensor]:
        values = (beta, *(getattr(*knob) for knob in self._knobs))
        numbers = [torch.tensor(value, dtype=self._dtype) for value in values]
        return [*numbers, *self._parameters.values(), *self._buffers.values(), *batch]

    def _eager(self, beta: float, *batch: Tensor) -> Tensor:
        for parameter in self._parameters.values():
            parameter.grad = None
        with self.precision():
            loss, figures = self.objective(beta, *self.prepare(*batch))
        self.objective.differentiate(loss, self._parameters.values())
        return figures

    def _traced(self, inputs: list[Tensor]) -> torch.fx.GraphModule:
        from torch.fx.experimental.proxy_tensor import make_fx

        try:
            with _traceable(), torch.no_grad():
                return make_fx(self._step, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
        except Exception as error:
            raise NotCompilableError(_reason(error)) from error

    def _step(self, beta: Tensor, *inputs: Tensor) -> list[Tensor]:
        """What is traced: `_eager` as a function of all tensors that change."""
        following = iter(inputs)
        numbers = list(itertools.islice(following, len(self._knobs)))
        leaves = {name: next(following).detach() for name in self._parameters}
        for name, leaf in leaves.items():
            leaf.requires_grad_(self._parameters[name].requires_grad)
        state = leaves | {name: next(following) for name in self._buffers}
        with ExitStack() as stack:
            for knob, number in zip(self._knobs, numbers, strict=True):
                stack.enter_context(mock.patch.object(*knob, number))
            batch = self.prepare(*following)
            stack.enter_context(torch.enable_grad())
            with self.precision():
                loss, figures = torch.func.functional_call(self.objective, state, (beta, *batch))
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


class _Items(TorchFunctionMode):
    """The number that a tensor holds is not known; it stays a tensor, without gradient as a number is."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0].detach() if func is torch.Tensor.item else func(*args, **(kwargs or {}))


@contextmanager
def _traceable() -> Iterator[None]:
    """Let a program and an estimator run without looking at values."""
    with _PATCHED, ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            for checked in ("warn_if_nan", "warn_if_inf"):
                if name.startswith("pyro.infer") and hasattr(module, checked):
                    stack.enter_context(mock.patch.object(module, checked, lambda value, *_, **__: value))
        stack.enter_context(pyro.validation_enabled(False))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # the program has run, and said what it has to say
        stack.enter_context(_Items())
        stack.enter_context(Tape())
        yield


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


def _compiled(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., list[Tensor]]:
    # The random numbers of torch's own kernels are those of a step that is not compiled.
    options: Any = {"fallback_random": True}
    try:
        with torch.no_grad():
            return torch._inductor.compile(graph, inputs, options=options)
    except Exception as error:
        raise NotCompilableError(_reason(error)) from error


def _reason(error: Exception) -> str:
    """What went wrong and where, in one line."""
    message = next(iter(str(error).strip().splitlines()), "")
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/torch/" not in frame.filename]
    where = frames[-1]
    if "data-dependent" in message or "DataDependent" in type(error).__name__:
        message = "what is computed depends on the values of tensors"
    return f"{message or type(error).__name__} ({where.filename}:{where.lineno}: {where.line})"
