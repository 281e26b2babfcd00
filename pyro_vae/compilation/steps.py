"""A training step as one graph: the loss of a batch, and the gradients of all parameters."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, NamedTuple
from unittest import mock

import torch
from pyro.infer import ELBO
from torch import Tensor

from pyro_vae.compilation.graphs import Graph, NotCompilableError, call_with
from pyro_vae.compilation.state import check_hooks, fingerprint, left_alone, unchanged
from pyro_vae.estimators.objective import Objective
from pyro_vae.estimators.particles import random_state
from pyro_vae.handlers import check_weight
from pyro_vae.programs import Program, check_param_sites

__all__ = ["CompiledStep", "annealed", "compile_step"]

_PROBES = [i / 100 for i in range(101)]  # training progress at which schedules are looked at
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

    A step of the graph draws the very random numbers that a step of the program does. Batches of another layout than
    the example's, and a program of which a layer is in another mode (training or evaluation) or a parameter was frozen
    or replaced, are run as they are, uncompiled. Handlers around this call, such as `handlers.weigh`, become part of
    the graph; those around a step do not. What else is changed in Python afterwards, such as the number of particles
    of the estimator, makes no difference any more.

    Args:
        program: The program, on the device and in the mode (`train()`) that it is to run in.
        estimator: Any `pyro.infer.ELBO`.
        example_batch: A batch, a tensor or several.
        precision: What the forward pass runs in, such as `lambda: torch.autocast("cpu", torch.bfloat16)`; see
            `Objective`.

    Returns:
        A `CompiledStep`, to be called with a batch.

    Raises:
        ValueError: If there is no batch, nothing to train, or a parameter in Pyro's store that is not the program's.
        NotCompilableError: If what the step computes depends on values of tensors, if the program or the estimator
            keeps anything from step to step (other than in buffers that it changes in place), if there are hooks, if
            there is no C++ compiler (on a CPU), or if the graph does not give what the program gives.

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
    if not batch or not all(isinstance(tensor, Tensor) and tensor.numel() for tensor in batch):
        raise ValueError("example_batch: expected a batch of data as tensors, got none, or something else")
    if not isinstance(estimator, ELBO):
        raise ValueError(f"estimator: expected a pyro.infer.ELBO such as Trace_ELBO(), got {type(estimator).__name__}")
    if not (torch.is_grad_enabled() and any(parameter.requires_grad for parameter in program.parameters())):
        raise ValueError(f"expected parameters of {type(program).__name__} to train, and gradients to be enabled")
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
        self._parameters = dict(objective.named_parameters())
        self._dtype = next((p.dtype for p in self._parameters.values() if p.is_floating_point()), torch.float32)
        self._trained: list[str] = []  # the parameters whose gradients the graph gives, in their order
        check_hooks(objective)
        with left_alone(objective, example):
            self._eager(1.0, *example)  # an estimator may have things to find out, in its first run
            check_param_sites(objective.program, objective.param_store["params"])
            if any(name.startswith("__") for name in objective.param_store["params"]):
                raise NotCompilableError(f"{type(objective.estimator).__name__} keeps state from step to step")
            with unchanged(objective):
                self._eager(1.0, *example)
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
        check_weight("beta", beta)
        inputs = [*self._numbers(beta), *batch]
        if not self._graph.suits(*inputs):
            return self._eager(beta, *batch)
        figures, *gradients = self._graph(*inputs)
        for parameter in self._parameters.values():
            parameter.grad = None
        for name, gradient in zip(self._trained, gradients, strict=True):
            self._parameters[name].grad = gradient
        return figures

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
        figures, expected = self._eager(_BETA, *example), self._gradients()
        state.restore()
        compiled, found = self(*example, beta=_BETA), self._gradients()
        if expected.keys() != found.keys():
            raise NotCompilableError(f"the graph reaches other parameters: {sorted(expected.keys() ^ found.keys())}")
        with self.precision():
            mixed = torch.is_autocast_enabled(figures.device.type)
        # Other random numbers would make a difference of a percent at least; rounding makes one far below.
        rtol, atol = (3e-2, 1e-2) if mixed else (1e-6, 1e-12) if figures.dtype == torch.float64 else (1e-3, 1e-5)
        largest = max(gradient.nan_to_num().norm().item() for gradient in expected.values())
        off = [name for name in expected if not _alike(found[name], expected[name], rtol, atol * largest)]
        if off or not torch.allclose(compiled, figures, rtol=rtol, equal_nan=True):
            raise NotCompilableError(
                f"the graph does not give what the program gives: loss {compiled[0]:g} for {figures[0]:g}, other "
                f"gradients of {', '.join(off[:3]) or 'none'}; does the program keep anything from step to step?"
            )

    def _gradients(self) -> dict[str, Tensor]:
        return {name: p.grad for name, p in self._parameters.items() if p.grad is not None}


def _alike(one: Tensor, other: Tensor, rtol: float, atol: float) -> bool:
    """Whether two gradients are the same but for rounding, and not finite in the same places."""
    if not torch.equal(one.isfinite(), other.isfinite()):
        return False
    one, other = (gradient.nan_to_num(posinf=0.0, neginf=0.0) for gradient in (one, other))
    return bool((one - other).norm() <= rtol * other.norm() + atol)


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
        varying: set[str] = set()
        for progress in _PROBES:
            seen = fingerprint(owner)
            owner.set_progress(progress)
            varying |= {name for name, value in fingerprint(owner).items() if seen.get(name, value) != value}
        for name in sorted(varying):
            if not isinstance(before.get(name), int | float):
                raise NotCompilableError(
                    f"{type(owner).__name__}.set_progress changes {name!r}, which is neither a number nor a buffer "
                    "that is filled in place"
                )
            setattr(owner, name, before[name])
            yield _Knob(owner, name)
