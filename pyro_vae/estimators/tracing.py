"""What a step needs while it is traced into a graph, where values are not known and random numbers are not drawn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental import proxy_tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

__all__ = ["Tape", "is_traced", "same_expression"]


class Tape(TorchDispatchMode):
    """Random numbers in the order in which they are drawn; gone back to, it gives them again.

    In a graph no random state can be gone back to, but what was drawn can be used twice.

    Example:
        >>> with Tape() as tape:
        ...     first = torch.randn(2)
        ...     tape.position = 0
        ...     torch.equal(torch.randn(2), first)
        True
    """

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[Any] = []
        self.position = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **(kwargs or {}))
        in_place = func._schema.is_mutable
        again = self.position < len(self.drawn)
        if not again:
            output = func(*args, **(kwargs or {}))
            self.drawn.append(output.clone() if in_place else output)
        drawn = self.drawn[self.position]
        self.position += 1
        if in_place:
            return args[0].copy_(drawn) if again else args[0]
        return drawn.clone() if isinstance(drawn, Tensor) else drawn

    @staticmethod
    def current() -> Tape | None:
        """The tape that draws are recorded on, or None."""
        return next((mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, Tape)), None)


def is_traced(value: Any) -> bool:
    """Whether this is a tensor that a graph is traced of: its value is not known.

    Example:
        >>> is_traced(torch.zeros(2))
        False
    """
    return isinstance(value, Tensor) and _node(value) is not None


def same_expression(one: Any, other: Any) -> bool:
    """Whether two values, of which one is traced, were computed in the same way from the same things."""
    one, other = (_node(value) or value for value in (one, other))
    if not (isinstance(one, torch.fx.Node) and isinstance(other, torch.fx.Node)) or one is other:
        return one is other or (type(one) is type(other) and not isinstance(one, Tensor) and one == other)
    pairs = zip(one.args, other.args, strict=False)
    alike = one.op == other.op == "call_function" and one.target is other.target and one.kwargs == other.kwargs
    return alike and len(one.args) == len(other.args) and all(same_expression(a, b) for a, b in pairs)


def _node(value: Any) -> torch.fx.Node | None:
    mode = proxy_tensor.get_proxy_mode()
    if mode is None or not isinstance(value, Tensor):
        return None
    proxy = proxy_tensor.get_proxy_slot(value, mode.tracer, None)
    return None if proxy is None else proxy.proxy.node
