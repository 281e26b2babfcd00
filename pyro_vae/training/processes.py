"""Training in many processes: what each is, and what they share."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor, distributed

from pyro_vae.handlers import data_frame
from pyro_vae.programs import Program

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["LostProcessError", "Processes", "num_processes", "rank", "told_elsewhere"]

PATIENCE = 1.0  # seconds that survivors of a lost process have to say that they are there


class LostProcessError(ConnectionError):
    """Another process of the run has ended.

    Attributes:
        told_by: The rank that tells the user.
    """

    def __init__(self, message: str, told_by: int):
        super().__init__(message)
        self.told_by = told_by


def num_processes(devices: int, num_nodes: int) -> tuple[int, int]:
    """Processes on a machine, and machines: those of `torchrun`, where it has started this process, or those given.

    Raises:
        ValueError: If they are not positive.

    Example:
        >>> num_processes(2, 1)
        (2, 1)
    """
    if distributed.is_available() and distributed.is_torchelastic_launched():
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        num_nodes = int(os.environ["WORLD_SIZE"]) // devices
    if devices < 1 or num_nodes < 1:
        raise ValueError(f"expected positive devices and num_nodes, got devices={devices}, num_nodes={num_nodes}")
    return devices, num_nodes


def rank(fabric: Fabric) -> int:
    """The number of this process among those that train together, from 0; also before they are launched."""
    strategy: Any = fabric.strategy
    if not hasattr(strategy, "node_rank"):
        return 0
    return strategy.node_rank * strategy.num_processes + strategy.local_rank


def told_elsewhere(error: BaseException) -> bool:
    """Whether another process than this one tells the user of an error that all have."""
    teller = getattr(error, "told_by", 0 if isinstance(error, KeyboardInterrupt) else None)
    together = distributed.is_available() and distributed.is_initialized()
    return together and teller not in (None, distributed.get_rank())


class Processes:
    r"""The processes that train a program together, of which this is one.

    Each takes its share of the rows of every batch, and the gradients are averaged by share,

    .. math:: g = \sum_r \frac{B_r}{B}\, g_r,

    where g_r is the gradient of rank r's loss per datum. With a plate of N data, that loss is
    :math:`L_\text{global} / N + \tfrac1{B_r} \sum_b L_b`, since the plate scales a share by :math:`N / B_r`; the
    weights sum to one, so that the average is the gradient of :math:`L_\text{global} / N + \tfrac1B \sum_b L_b`, as
    of one process. Where ranks draw a global latent each for itself, it is unbiased all the same, with less noise.

    Args:
        fabric: Lightning's Fabric, which starts the others or meets them.

    Raises:
        LostProcessError: If the others are not there.

    Attributes:
        count: Number of processes.
        rank: The number of this one, from 0.
    """

    def __init__(self, fabric: Fabric):
        self.fabric = fabric
        try:
            fabric.launch()
        except RuntimeError as error:
            here = rank(fabric)
            raise LostProcessError(f"rank {here} does not find the other processes: {error}", here) from error
        self.count, self.rank = fabric.world_size, fabric.global_rank
        self._wants_stop = self._stop = False
        self._before: dict[str, Tensor] = {}  # buffers after the last step
        self._started = False
        self._shards: Any = None

    def seed(self, seed: int, step: int) -> None:
        """Give this process a stream of random numbers of its own."""
        state = np.random.SeedSequence(seed, spawn_key=(step, self.rank)).generate_state(1, np.uint64)
        torch.manual_seed(int(state[0]) >> 1)

    def check_globals(self, program: Program, batch: tuple[Tensor, ...]) -> None:
        """Make sure that latents that belong to no datum count once, and not once in every process.

        Raises:
            ValueError: If they would, since the plate "data" of a share says that there are no other data.
        """
        if self.count == 1:
            return
        guide: Any = poutine.trace(program.guide).get_trace(*batch)
        trace: Any = poutine.trace(poutine.replay(program.model, trace=guide)).get_trace(*batch)
        sites = [site for site in trace.nodes.values() if site["type"] == "sample" and not site_is_subsample(site)]
        alone = [site["name"] for site in sites if data_frame(site) is None and not site["is_observed"]]
        if alone and any(frame and frame.full_size == len(batch[0]) for frame in map(data_frame, sites)):
            raise ValueError(
                f"{self.count} processes would each count the global latent {alone[0]!r} once: "
                f'expected a plate "data" with size=, the number of all data, got one of the batch alone'
            )

    def start_alike(self, program: Program, num_data: int) -> None:
        """Give every process the weights and buffers of rank 0.

        Raises:
            ValueError: If the processes have different data or programs.
        """
        if self.count == 1:
            return
        shapes = {name: tuple(tensor.shape) for name, tensor in _tensors(program).items()}
        described: list[Any] = [None] * self.count
        with self._together():
            distributed.all_gather_object(described, {"number of data": num_data, **shapes})
        for other, description in enumerate(described):
            for name in described[0].keys() | description.keys():
                expected, got = described[0].get(name), description.get(name)
                if expected != got:
                    raise ValueError(
                        f"expected the same program and data in every process, got for {name} "
                        f"{expected} in rank 0 and {got} in rank {other}"
                    )
        with self._together(), torch.no_grad():
            for tensor in _tensors(program).values():
                values = tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor.clone()
                distributed.broadcast(values.contiguous(), src=0)
                tensor.copy_(values)
        self._before = {name: buffer.clone() for name, buffer in program.named_buffers() if buffer.dtype != torch.bool}

    def shard(self, optimizer: torch.optim.Optimizer) -> None:
        """Let each process hold a shard of the averaged gradients and of the optimizer's state; see `Shards`."""
        if self.count > 1 and self._shards is None:
            from pyro_vae.training.sharding import Shards

            with self._together():
                self._shards = Shards(optimizer, self.fabric.device, self.count)

    def step(self, optimizer_step: Callable[[], Any]) -> None:
        """Take the optimizer's step, with the gradients that `average` has left."""
        if self._shards is None:
            optimizer_step()
            return
        with self._together():
            self._shards.step(optimizer_step)

    def whole(self, value: Any) -> Any:
        """What there is of a value in all processes, if it is in shards."""
        if not hasattr(value, "full_tensor"):
            return value
        with self._together():
            return value.full_tensor()

    @torch.no_grad()
    def average(self, program: Program, figures: Tensor, num_data: int) -> tuple[list[float], int]:
        """Average gradients, changes of buffers, and figures over the processes, by their shares of the batch.

        All go in one message, since many small ones cost more. What is left in `.grad` is the batch's gradient; of a
        parameter in shards, a term of it whose mean over the processes `step` takes.

        Args:
            program: The program, with the gradients of this process's share.
            figures: Means over the share; anything finite where it is empty.
            num_data: Data in the share.

        Returns:
            The means over the whole batch, and the number of its data.

        Raises:
            LostProcessError: If another process has ended.
        """
        if self.count == 1:
            return figures.tolist(), num_data
        parameters = [parameter for parameter in program.parameters() if parameter.requires_grad]
        buffers = [(name, buffer) for name, buffer in program.named_buffers() if name in self._before]
        sharded = set(self._shards.parameters_of_program) if self._shards else set()
        whole = [parameter for parameter in parameters if parameter not in sharded]
        gradients = [_gradient(parameter) for parameter in whole]
        changes = [_change(buffer, self._before[name]) for name, buffer in buffers]
        has_gradient = torch.tensor([parameter.grad is not None for parameter in parameters])
        averaged, total = self._averaged([*gradients, *changes, has_gradient, figures], num_data, like=parameters[0])
        for parameter in sharded:
            parameter.grad = _gradient(parameter).mul_(self.count * num_data / total)
        for parameter, gradient in zip(whole, averaged, strict=False):
            parameter.grad = gradient.view_as(parameter).to(parameter.dtype)
        for parameter, has in zip(parameters, averaged[-2].tolist(), strict=True):
            parameter.grad = parameter.grad if has else None
        self._change(buffers, averaged[len(whole) : -2])
        return averaged[-1].tolist(), total

    def _averaged(self, parts: list[Tensor], num_data: int, like: Tensor) -> tuple[list[Tensor], int]:
        """Means of tensors over the processes, weighted by their number of data, flat, and the sum of these."""
        like = like.new_empty((), dtype=torch.promote_types(like.dtype, torch.float32))
        last = like.new_tensor([num_data, self._wants_stop])
        shared = torch.cat([*(part.detach().reshape(-1).to(like) for part in parts), last])
        shared[:-2].mul_(num_data)
        with self._together():
            distributed.all_reduce(shared)
        total, stop = shared[-2:].tolist()
        self._stop = stop > 0
        return list(shared[:-2].div_(total).split([part.numel() for part in parts])), int(total)

    def _change(self, buffers: list[tuple[str, Tensor]], changes: list[Tensor]) -> None:
        """Change each buffer as all processes have, on average; from then on only those that did change."""
        before, self._before = self._before, {}
        for (name, buffer), change in zip(buffers, changes, strict=True):
            change = change.view_as(buffer)
            buffer.copy_(before[name] + (change if buffer.is_floating_point() else change.round()))
            if self._started or change.any():
                self._before[name] = buffer.clone()
        self._started = True

    def stopping(self, wanted: bool) -> bool:
        """Whether all stop after this step, because one of them wanted it, perhaps a step ago."""
        self._wants_stop = wanted
        return wanted if self.count == 1 else self._stop

    def first(self, text: str | None) -> str:
        """What the first process that has something to say, says."""
        if self.count == 1:
            return str(text)
        said: list[Any] = [None] * self.count
        with self._together():
            distributed.all_gather_object(said, text)
        return next((f"{text}, in rank {rank}" for rank, text in enumerate(said) if text is not None), "none")

    def gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all processes, stacked, on the CPU."""
        if self.count == 1:
            return tensor[None]
        tensor = tensor.to(self.fabric.device)
        stacked = tensor.new_empty(self.count, *tensor.shape)
        with self._together():
            distributed.all_gather(list(stacked), tensor)
        return stacked.cpu()

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value."""
        with self._together():
            return self.fabric.broadcast(value)

    def wait(self) -> None:
        """Wait until all have come here."""
        with self._together():
            self.fabric.barrier()

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Say who is missing where what all must do together fails."""
        try:
            yield
        except RuntimeError as error:
            lost = self._lost()
            ranks = f"rank{'s' * (len(lost) > 1)} {', '.join(map(str, lost))}" if lost else "the connection"
            teller = next(rank for rank in range(self.count) if rank not in lost)
            raise LostProcessError(
                f"{ranks} of {self.count} processes has ended, so all of them end", teller
            ) from error

    def _lost(self) -> list[int]:
        """The ranks that say nothing any more."""
        # Without the launcher's watch, which kills this process before it can tell.
        getattr(self.fabric.strategy.launcher, "procs", []).clear()
        others = [rank for rank in range(self.count) if rank != self.rank]
        try:
            store = distributed.distributed_c10d._get_default_store()
            store.set(f"pyro_vae/alive/{self.rank}", "")
            end = time.monotonic() + (PATIENCE if self.count > 2 else 0)
            while missing := [rank for rank in others if not store.check([f"pyro_vae/alive/{rank}"])]:
                if time.monotonic() > end:
                    break
                time.sleep(0.02)
            return missing
        except RuntimeError:  # rank 0 holds what is stored
            return [0]


def _tensors(program: Program) -> dict[str, Tensor]:
    """Weights and buffers by name."""
    return {**dict(program.named_parameters()), **dict(program.named_buffers())}


def _gradient(parameter: Tensor) -> Tensor:
    """Its gradient, of zeros where it has none."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _change(buffer: Tensor, before: Tensor) -> Tensor:
    """What has been added to a buffer; of infinite entries that stay so, nothing."""
    return torch.where(buffer == before, torch.zeros_like(buffer), buffer - before)
