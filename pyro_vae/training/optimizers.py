"""The optimizer of a run, its steps, and its learning rate."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer

from pyro_vae.compilation.subnormals import WIDE, negligible
from pyro_vae.programs import Program
from pyro_vae.training.options import Options

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["FusedStep", "lr_scheduler", "optimizer", "optimizer_step", "zero_negligible"]

_AVERAGES = ("exp_avg", "momentum_buffer")  # of gradients, as torch's optimizers call them
_FUSED = (torch.optim.Adam, torch.optim.AdamW)  # which have a step in one kernel


def optimizer(program: Program, options: Options) -> torch.optim.Optimizer:
    """The optimizer of all parameters that want a gradient."""
    parameters = [parameter for parameter in program.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError(f"{type(program).__name__} has no parameters to train")
    # The kernel goes through the memory of a parameter from its first number on, which must hold that parameter alone.
    dense = all(torch.empty_like(parameter).stride() == parameter.stride() for parameter in parameters)
    fused = {"fused": True} if options.optimizer in _FUSED and dense else {}
    return options.optimizer(parameters, lr=options.lr, **fused)


def optimizer_step(optimizer: torch.optim.Optimizer, options: Options, fabric: Fabric) -> Callable[[], Any]:
    """What takes a step: `FusedStep` where the optimizer is ours alone, and Fabric's, which may scale it, otherwise."""
    own = options.optimizer in _FUSED and not callable(options.lr_schedule) and options.strategy != "fsdp"
    if own and optimizer.param_groups[0]["fused"] and options.precision != "16-mixed":
        return FusedStep(optimizer)
    placed: Any = fabric.setup_optimizers(optimizer)
    return placed.step


class FusedStep:
    """The step of torch's fused Adam, the same numbers, of which what does not change is looked up once.

    Torch's own looks up parameters and state at each step, and counts it in each parameter's state. That takes a third
    of it, which is a tenth of a training step of small batches.

    Args:
        optimizer: Torch's Adam or AdamW, fused, of one group of parameters, in whose options only the learning rate
            changes. Where some have no gradient, or hooks want to know of its steps, its own step is taken.

    Example:
        >>> weight = nn.Parameter(torch.tensor([1.0]))
        >>> adam = torch.optim.Adam([weight], fused=True)
        >>> step = FusedStep(adam)
        >>> for _ in range(2):
        ...     weight.grad = torch.tensor([1.0])
        ...     step()
        >>> adam.state[weight]["step"]
        tensor(2.)
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer
        (group,) = optimizer.param_groups
        beta1, beta2 = group["betas"]
        same = {name: group[name] for name in ("weight_decay", "eps", "amsgrad", "maximize")}
        kernel: Any = torch._fused_adamw_ if isinstance(optimizer, torch.optim.AdamW) else torch._fused_adam_
        self._kernel = partial(kernel, beta1=beta1, beta2=beta2, **same)
        self._states: list[dict[str, Tensor]] = []  # of the parameters, as long as all have had gradients
        self._counts: Tensor  # of the steps that each has taken

    @torch.no_grad()
    def __call__(self) -> None:
        """Take a step."""
        (group,) = self.optimizer.param_groups  # another one where a state was loaded
        parameters = group["params"]
        gradients = [parameter.grad for parameter in parameters]
        known = self._states and self._states[0] is self.optimizer.state[parameters[0]]
        if not known or any(gradient is None for gradient in gradients) or _is_watched(self.optimizer):
            self.optimizer.step()
            self._look_up(parameters)
            return
        averages, squares, counts = (
            [state[name] for state in self._states] for name in ("exp_avg", "exp_avg_sq", "step")
        )
        self._counts.add_(1)  # all of them
        self._kernel(parameters, gradients, averages, squares, [], counts, lr=group["lr"])

    def _look_up(self, parameters: list[Tensor]) -> None:
        states = [self.optimizer.state[parameter] for parameter in parameters]
        # A kernel takes tensors of one kind, of which torch's own step makes groups.
        one_kind = len({(parameter.dtype, parameter.device) for parameter in parameters}) == 1
        self._states = states if one_kind and all(states) else []
        if self._states:
            self._counts = torch.stack([state["step"] for state in states])
            for state, count in zip(states, self._counts, strict=True):
                state["step"] = count  # a part of the one tensor


def _is_watched(optimizer: torch.optim.Optimizer) -> bool:
    """Whether hooks are called at its steps: its own, or those of all optimizers."""
    before, after = torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks
    return bool(before or after or optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)


@torch.no_grad()
def zero_negligible(optimizer: torch.optim.Optimizer) -> None:
    """Make zeros of averages of gradients that are next to nothing, which a CPU computes ten times as slowly.

    Averages of gradients that have become zero, as those of pixels that are seldom lit, decay to numbers below the
    smallest normal one, and stay there by rounding. Zeroed every so many steps where they are negligible (1e-30 in
    float32), they never come there. (Averages of squares decay too slowly to matter, and are divided by.)

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
        >>> adam = torch.optim.Adam([weight])
        >>> weight.grad = torch.tensor([1e-37])
        >>> adam.step()
        >>> zero_negligible(adam)
        >>> adam.state[weight]["exp_avg"]
        tensor([0.])
    """
    for kept in optimizer.state.values():
        for name in _AVERAGES if isinstance(kept, dict) else ():
            value = kept.get(name)
            if isinstance(value, Tensor) and value.dtype in WIDE and value.layout == torch.strided:
                kept[name] = nn.functional.hardshrink(value, negligible(value.dtype))


def lr_scheduler(optimizer: torch.optim.Optimizer, options: Options, total_steps: int) -> Any:
    """The learning rate's scheduler, or None."""
    from torch.optim import lr_scheduler

    schedule = options.lr_schedule
    if schedule == "cosine":
        return lr_scheduler.CosineAnnealingLR(optimizer, T_max=total_steps)
    if schedule == "one-cycle":
        total = max(total_steps, 4)
        warm_up = max(0.05, 2 / total)  # torch needs a warm-up of two steps
        return lr_scheduler.OneCycleLR(optimizer, options.lr, total, pct_start=warm_up, cycle_momentum=False)
    return schedule(optimizer) if callable(schedule) else None
