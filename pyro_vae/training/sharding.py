"""Gradients and optimizer in shards, one in each process; a file of its own, since it needs more of torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

__all__ = ["Shards"]


class Shards:
    """Shards of a program's parameters, which `fully_shard` scatters and gathers, and which the optimizer works on.

    A Pyro program uses its parameters wherever it likes, and some estimators call backward themselves, so that no hook
    of one module's `forward` knows when they are needed. The program's own parameters therefore stay what they are:
    whole between steps, in the memory that `fully_shard` gathers the shards to. A step computes gradients by them, as
    of one process; those are then averaged and scattered. What there is once in all, and not in every process, are the
    averaged gradients and the optimizer's state (stage 2 of Rajbhandari et al.).

    Parameters that have no rows, or not in the order of memory, or another dtype than the first, stay whole.

    Args:
        optimizer: The optimizer of the program's parameters, and from here on of their shards.
        device: The device of this process.
        count: Number of processes.

    Attributes:
        parameters_of_program: Those that have shards.

    Reference:
        Rajbhandari et al., 2020. ZeRO: memory optimizations toward training trillion parameter models. Zhao et al.,
        2023. PyTorch FSDP: experiences on scaling fully sharded data parallel.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device, count: int):
        self._mesh = init_device_mesh(device.type, (count,))
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.parameters_of_program = [
            p for p in parameters if p.dim() > 0 and p.is_contiguous() and p.dtype == parameters[0].dtype
        ]
        if not self.parameters_of_program:
            raise ValueError("strategy: expected parameters with rows to share under fsdp, got none; use ddp")
        self._gathered = _Parameters(self.parameters_of_program)
        self._module = fully_shard(self._gathered, mesh=self._mesh)
        self._module.set_reshard_after_backward(False)  # the program keeps its weights if the optimizer's step fails
        self._shards = dict(zip(self.parameters_of_program, self._gathered.all, strict=True))
        # An optimizer computes with tensors of one kind, so that what stays whole is made of that kind too.
        self._copies = {p: nn.Parameter(self._replicated(p.detach())) for p in parameters if p not in self._shards}
        self._take_over(optimizer)
        self._gather()

    def _replicated(self, tensor: Tensor) -> Tensor:
        """The same memory as a tensor that every process has."""
        return DTensor.from_local(tensor, self._mesh, [Replicate()], run_check=False)

    def _take_over(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the optimizer work on the shards, with its state so far."""
        for parameter, shard in (self._shards | self._copies).items():
            for name, value in optimizer.state.pop(parameter, {}).items():
                if isinstance(value, Tensor) and value.shape == parameter.shape and parameter.dim() > 0:
                    sharded = parameter in self._shards
                    value = (
                        distribute_tensor(value, self._mesh, shard.placements) if sharded else self._replicated(value)
                    )
                optimizer.state[shard][name] = value
        for group in optimizer.param_groups:
            group["params"] = [(self._shards | self._copies)[parameter] for parameter in group["params"]]

    def step(self, optimizer_step: Callable[[], Any]) -> None:
        """Average the gradients of the program's parameters over the processes, and take a step with the averages.

        Gradients of parameters without shards are averages already. In all processes the same gradients must be None.

        Args:
            optimizer_step: The optimizer's step, on the shards.
        """
        for parameter, copy in self._copies.items():
            copy.grad = None if parameter.grad is None else self._replicated(parameter.grad)
        zero = self._gathered([parameter.grad for parameter in self.parameters_of_program])
        for parameter in self.parameters_of_program:
            parameter.grad = None  # as backward copies what it is not the only one to hold
        zero.backward()
        optimizer_step()
        for shard in self._shards.values():
            shard.grad = None
        self._module.reshard()
        self._gather()

    def _gather(self) -> None:
        """Make the program's parameters what the shards are."""
        try:
            self._module.unshard()
        except BaseException:  # the memory has been freed, and must not be read
            for parameter in self.parameters_of_program:
                parameter.data = torch.full_like(parameter, torch.nan)
            raise
        for parameter, gathered in zip(self.parameters_of_program, self._gathered.all, strict=True):
            parameter.data = gathered.data


class _Parameters(nn.Module):
    """Parameters, which `fully_shard` replaces by their shards, or by what it has gathered of them."""

    def __init__(self, parameters: list[nn.Parameter]):
        super().__init__()
        self.all = nn.ParameterList(parameters)

    def forward(self, gradients: list[Tensor | None]) -> Tensor:
        """A number that has these gradients by the parameters, which backward averages and scatters."""
        return _WithGradients.apply(gradients, *self.all)


class _WithGradients(torch.autograd.Function):
    """Zero, as a function of tensors, with gradients that are given."""

    @staticmethod
    def forward(context: Any, gradients: list[Tensor | None], *tensors: Tensor) -> Tensor:
        context.gradients = gradients
        return tensors[0].new_zeros(())

    @staticmethod
    def backward(context: Any, _: Tensor) -> Any:
        gradients, context.gradients = (None, *context.gradients), None
        return gradients
