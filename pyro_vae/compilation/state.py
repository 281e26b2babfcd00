"""What a program holds in Python, which a graph would fix for good: whether it changes, and how it is put back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from pyro_vae.compilation.graphs import NotCompilableError
from pyro_vae.estimators.objective import Objective
from pyro_vae.estimators.particles import random_state
from pyro_vae.programs import kept_buffers

__all__ = ["check_hooks", "fingerprint", "left_alone", "unchanged"]

_SLOTS = ("_parameters", "_buffers", "_modules")


def fingerprint(owner: Any) -> dict[str, Any]:
    """What tells whether an object's attributes have changed, by name; of buffers, whether they are the same tensors.

    Example:
        >>> net = nn.BatchNorm1d(2)
        >>> before = fingerprint(net)
        >>> net.eps = 1.0
        >>> [name for name, value in fingerprint(net).items() if value != before[name]]
        ['eps']
    """
    held = {name: _print_of(value) for name, value in vars(owner).items() if name not in _SLOTS}
    if isinstance(owner, nn.Module):
        held |= {name: id(buffer) for name, buffer in owner._buffers.items()}
    return held


def _print_of(value: Any, depth: int = 3) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        return id(value), value._version
    if isinstance(value, Mapping) and depth:
        return [(_print_of(name), _print_of(held, depth - 1)) for name, held in value.items()]
    if isinstance(value, list | tuple) and depth:
        return [_print_of(held, depth - 1) for held in value]
    if depth and type(value).__module__ not in ("builtins", "functools") and hasattr(value, "__dict__"):
        return id(value), [(name, _print_of(held, depth - 1)) for name, held in vars(value).items()]
    return id(value)


def _owners(objective: Objective) -> list[Any]:
    """What may keep something from step to step."""
    return [*objective.program.modules(), objective.estimator]


@contextmanager
def unchanged(objective: Objective) -> Iterator[None]:
    """Raise if what runs inside leaves anything in the attributes of the program or the estimator."""
    before = [fingerprint(owner) for owner in _owners(objective)]
    yield
    for owner, held in zip(_owners(objective), before, strict=True):
        changed = [name for name, value in fingerprint(owner).items() if held.get(name) != value]
        if changed:
            raise NotCompilableError(
                f"{type(owner).__name__} changes its attribute {changed[0]!r} from step to step, which a graph would "
                "fix (a buffer that is changed in place it would not)"
            )


def check_hooks(objective: Objective) -> None:
    """Raise if there are hooks: those of gradients would not run, and the others only once."""
    for name, parameter in objective.named_parameters():
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise NotCompilableError(f"parameter {name} has hooks, which a graph would not run")
    for name, module in objective.named_modules():
        kinds = [kind for kind in vars(module) if kind.endswith("_hooks") and "state_dict" not in kind]
        if any(getattr(module, kind) for kind in kinds):
            raise NotCompilableError(f"module {name} has hooks, which a graph would not run")


@contextmanager
def left_alone(objective: Objective, batch: Sequence[Tensor]) -> Iterator[None]:
    """Leave random state, gradients, buffers, attributes and what estimators keep as they were."""
    state, kept = random_state(batch), objective.param_store
    gradients = {parameter: parameter.grad for parameter in objective.parameters()}
    attributes = [(vars(owner), dict(vars(owner))) for owner in _owners(objective)]
    objective.param_store = {"params": {}, "constraints": {}}
    try:
        with kept_buffers(objective):
            yield
    finally:
        objective.param_store = kept
        # An estimator of Pyro's finds out once how many plates there are, by a run that draws random numbers.
        found = {name: value for name, value in vars(objective.estimator).items() if name == "max_plate_nesting"}
        for held, before in attributes:
            held.clear()
            held.update(before)
        vars(objective.estimator).update(found)
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        state.restore()
