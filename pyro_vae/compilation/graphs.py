"""Functions of tensors traced once: the handlers vanish, and what is left is one graph of arithmetic, compiled."""

from __future__ import annotations

import itertools
import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pyro
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pyro_vae.compilation.subnormals import without_subnormals
from pyro_vae.estimators.tracing import Tape

__all__ = ["Decision", "Graph", "NotCompilableError", "call_with", "check_compile"]

_PATCHED = threading.Lock()  # while one function is traced, others wait


class NotCompilableError(ValueError):
    """What is computed cannot be one graph; the message says why, in one line."""


def check_compile(compile: Any) -> None:
    """Raise unless this says whether to compile.

    Example:
        >>> check_compile("always")
        Traceback (most recent call last):
        ...
        ValueError: compile: expected "auto", True or False, got 'always'
    """
    if compile not in ("auto", True, False):
        raise ValueError(f'compile: expected "auto", True or False, got {compile!r}')


class Decision:
    """Whether to compile what is run again and again: as told, or by the clock. It says yes once at most.

    Args:
        compile: "auto", True or False.
        worth: Seconds that the rest must take, for "auto".
        timed: Turns after the first, which is slower than others, that are timed before "auto" decides.

    Example:
        >>> decision = Decision(True, worth=60.0, timed=10)
        >>> [decision(remaining=100) for _ in range(3)]
        [True, False, False]
    """

    def __init__(self, compile: str | bool, worth: float, timed: int):
        check_compile(compile)
        self.compile, self.worth, self.timed = compile, worth, timed
        self._turns, self._start = 0, 0.0

    def __call__(self, remaining: int, suitable: bool = True) -> bool:
        """Asked before each turn, with the turns that remain, and whether this one would do as an example."""
        self._turns += 1
        if self._turns == 2:
            self._start = time.perf_counter()
        now = suitable and (self._pays(remaining) if self.compile == "auto" else bool(self.compile))
        if now:
            self.compile = False  # whatever comes of it
        return now

    def _pays(self, remaining: int) -> bool:
        if self._turns <= self.timed + 1:
            return False
        return (time.perf_counter() - self._start) / (self._turns - 2) * remaining > self.worth


class Graph:
    """A function of a module's parameters and buffers, and of other tensors, as one compiled graph.

    Buffers that the function changes in place are changed. Random numbers are those that the function would draw.
    Operands of matrix products that are negligible (1e-30 in float32) are taken for zero, see `without_subnormals`.

    Args:
        module: The module.
        function: Called with the module's parameters and buffers by name, and the other tensors; gives tensors.
        example: The other tensors.

    Attributes:
        graph: What was traced, a `torch.fx.GraphModule`.

    Raises:
        NotCompilableError: If the function looks at values of tensors, or there is no compiler.

    Reference:
        Ansel et al., 2024. PyTorch 2: faster machine learning through dynamic Python bytecode transformation and graph
        compilation (TorchInductor).
    """

    def __init__(self, module: nn.Module, function: Callable[..., list[Tensor]], example: Sequence[Tensor]):
        self._state = dict(itertools.chain(module.named_parameters(), module.named_buffers()))
        self._function = function
        self._example = [_layout(tensor) for tensor in example]
        self._held = [
            (slots, name, tensor, tensor.requires_grad, tensor.stride())
            for owner in module.modules()
            for slots in (owner._parameters, owner._buffers)
            for name, tensor in slots.items()
            if tensor is not None
        ]
        self._modes = [(owner, owner.training) for owner in module.modules()]
        inputs = [*self._state.values(), *example]
        self.graph = self._traced(inputs)
        self._compiled = _compiled(self.graph, inputs)

    def suits(self, *tensors: Tensor) -> bool:
        """Whether the graph is that of these tensors, and of the module as it is now.

        Another shape, another mode of a layer, a frozen or a replaced parameter want another graph.
        """
        return (
            len(tensors) == len(self._example)
            and all(_layout(tensor) == layout for tensor, layout in zip(tensors, self._example, strict=True))
            and all(owner.training is training for owner, training in self._modes)
            and all(
                slots.get(name) is tensor and tensor.requires_grad is wanted and tensor.stride() == stride
                for slots, name, tensor, wanted, stride in self._held
            )
        )

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        """The function's tensors, without gradient; of what it `suits`."""
        with torch.no_grad():
            return self._compiled(*self._state.values(), *tensors)

    def _traced(self, inputs: list[Tensor]) -> torch.fx.GraphModule:
        from torch.fx.experimental.proxy_tensor import make_fx

        def flat(*tensors: Tensor) -> list[Tensor]:
            following = iter(tensors)
            state = dict(zip(self._state, following, strict=False))
            return self._function(state, *tensors[len(state) :])

        try:
            with _traceable(), torch.no_grad():
                graph = make_fx(flat, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
            without_subnormals(graph)
        except Exception as error:
            raise NotCompilableError(_reason(error)) from error
        return graph


def _layout(tensor: Tensor) -> Any:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def call_with(module: nn.Module, state: Mapping[str, Tensor], *args: Any) -> Any:
    """The module's output, with other tensors for its parameters and buffers.

    It is `torch.func.functional_call` for modules that others share: torch's own way to find what is tied swaps the
    tensors of a module that two others hold twice, and back once.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> call_with(net, {"weight": torch.ones(1, 2), "bias": torch.zeros(1)}, torch.ones(3, 2)).flatten()
        tensor([2., 2., 2.])
    """
    tensors = itertools.chain(module.named_parameters(), module.named_buffers())
    name_of = {id(tensor): name for name, tensor in tensors}
    held = {
        f"{prefix}.{slot}".lstrip("."): state[name_of[id(tensor)]]
        for prefix, owner in module.named_modules()
        for slot, tensor in (*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False))
    }
    return torch.func.functional_call(module, held, args, tie_weights=False)


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
        stack.enter_context(_Items())
        stack.enter_context(Tape())
        yield


def _compiled(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., list[Tensor]]:
    # The random numbers of torch's own kernels are those of what is not compiled.
    options: Any = {"fallback_random": True, "size_asserts": False, "alignment_asserts": False}
    # Where there is no GPU, torch says that it found none, though none was asked for.
    unasked = mock.patch.object(logging.getLogger("torch.utils.cpp_extension"), "disabled", True)
    try:
        with torch.no_grad(), unasked:
            return torch._inductor.compile(graph, inputs, options=options)
    except Exception as error:
        raise NotCompilableError(_reason(error)) from error


def _reason(error: Exception) -> str:
    """What went wrong and where, in one line."""
    message = next(iter(str(error).strip().splitlines()), "")
    frames = traceback.extract_tb(error.__traceback__)
    where = [frame for frame in frames if "/torch/" not in frame.filename and frame.filename != __file__][-1:]
    kind = type(error).__name__
    if "data-dependent" in message or "DataDependent" in kind or "DynamicOutputShape" in kind:
        message = "what is computed depends on the values of tensors"
    return " ".join([message or kind, *(f"({at.filename}:{at.lineno}: {at.line})" for at in where)])
