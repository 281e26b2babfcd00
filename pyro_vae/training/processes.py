"""Training in many processes: what each is, and what they share."""

from __future__ import annotations

import hashlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor, distributed

from pyro_vae.data import Batches, InMemory, OnDisk
from pyro_vae.handlers import data_frame
from pyro_vae.programs import Program

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["LostProcessError", "Processes", "described", "num_processes", "rank", "told_elsewhere"]

LOOKED_AT = 5  # rows of the data that tell whether processes have the same
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
        ValueError: If they are not positive integers, or other processes than those that train together already.

    Example:
        >>> num_processes(2, 1)
        (2, 1)
    """
    if distributed.is_available() and distributed.is_torchelastic_launched():
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        num_nodes = int(os.environ["WORLD_SIZE"]) // devices
    if any(type(given) is not int or given < 1 for given in (devices, num_nodes)):
        raise ValueError(f"expected positive devices and num_nodes, got devices={devices!r}, num_nodes={num_nodes!r}")
    if distributed.is_available() and distributed.is_initialized():
        together = distributed.get_world_size()
        if devices * num_nodes not in (1, together):
            raise ValueError(
                f"devices: expected the {together} processes that have trained together before, or 1 (each alone), "
                f"got {devices * num_nodes}"
            )
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
        ValueError: If there is no script or module to start the others with.

    Attributes:
        count: Number of processes.
        rank: The number of this one, from 0.
    """

    def __init__(self, fabric: Fabric):
        self.fabric = fabric
        _check_script(fabric)
        try:
            fabric.launch()
        except RuntimeError as error:
            here = rank(fabric)
            raise LostProcessError(f"rank {here} does not find the other processes: {error}", here) from error
        self.count, self.rank = fabric.world_size, fabric.global_rank
        if self.count > 1 and distributed.get_backend() == "gloo":
            # Without the launcher's watch, which kills this process before it can tell who is lost; the next message
            # shows it. Of NCCL's messages it may not show, so that the watch is needed there.
            started = getattr(fabric.strategy.launcher, "procs", [])
            for process in started:  # someone must wait for them
                threading.Thread(target=process.wait, daemon=True).start()
            started.clear()
        self._wants_stop = self._stop = False
        self._before: dict[str, Tensor] = {}  # buffers after the last step
        self._moving: set[str] = set()  # names of those that have changed since the start
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

    def start_alike(self, program: Program, batches: Batches) -> None:
        """Give every process the weights and buffers of rank 0.

        Raises:
            ValueError: If the processes have programs whose parameters and buffers differ in name or shape, or data
                that differ in what `described` looks at, which is not all of them.
        """
        if self.count == 1:
            return
        shapes = {name: tuple(tensor.shape) for name, tensor in _tensors(program).items()}
        all_described: list[Any] = [None] * self.count
        with self._together():
            distributed.all_gather_object(all_described, {**described(batches), **shapes})
        for other, description in enumerate(all_described):
            for name in {**all_described[0], **description}:
                expected, got = all_described[0].get(name), description.get(name)
                if expected != got:
                    raise ValueError(
                        f"expected the same program and data in every process, got for {name} "
                        f"{expected} in rank 0 and {got} in rank {other}"
                    )
        with self._together(), torch.no_grad():
            for tensor in _tensors(program).values():
                values = tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor
                values = values.clone(memory_format=torch.contiguous_format)  # the order in which it is sent
                distributed.broadcast(values, src=0)
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
        buffers = {name: buffer for name, buffer in program.named_buffers() if name in self._before}
        moving = [name for name in buffers if name in self._moving]
        still = [name for name in buffers if name not in self._moving]
        sharded = set(self._shards.parameters_of_program) if self._shards else set()
        whole = [parameter for parameter in parameters if parameter not in sharded]
        gradients = [_gradient(parameter) for parameter in whole]
        changes = [_change(buffers[name], self._before[name]) for name in moving]
        has_gradient = torch.tensor([parameter.grad is not None for parameter in parameters])
        has_changed = [(buffers[name] != self._before[name]).any() for name in still]
        flags = torch.stack(has_changed) if still else has_gradient[:0]
        parts = [*gradients, *changes, flags, has_gradient, figures]
        averaged, total = self._averaged(parts, num_data, like=parameters[0])
        for parameter in sharded:
            parameter.grad = _gradient(parameter).mul_(self.count * num_data / total)
        for parameter, gradient in zip(whole, averaged, strict=False):
            # In the order of the parameter's own memory, which a fused optimizer goes by.
            own = parameter.is_contiguous()
            gradient = gradient.view_as(parameter).to(parameter.dtype)
            parameter.grad = gradient if own else torch.empty_like(parameter).copy_(gradient)
        for parameter, has in zip(parameters, averaged[-2].tolist(), strict=True):
            parameter.grad = parameter.grad if has else None
        changes = averaged[len(whole) : -3]
        first = [name for name, changed in zip(still, averaged[-3].tolist(), strict=True) if changed]
        if first:  # those that have never changed before: in another message, once
            more = [_change(buffers[name], self._before[name]) for name in first]
            changes += self._averaged(more, num_data, like=parameters[0])[0]
            self._moving.update(first)
        for name, change in zip(moving + first, changes, strict=True):
            self._change(name, buffers[name], change)
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

    def _change(self, name: str, buffer: Tensor, change: Tensor) -> None:
        """Change a buffer as all processes have, on average."""
        change = change.view_as(buffer)
        buffer.copy_(self._before[name] + (change if buffer.is_floating_point() else change.round()))
        self._before[name] = buffer.clone()

    def stopping(self, wanted: bool) -> bool:
        """Whether all stop after this step, because one of them wanted it, perhaps a step ago."""
        self._wants_stop = wanted
        return wanted if self.count == 1 else self._stop

    def agree(self, wanted: bool) -> bool:
        """Whether one of them wants something: a word after the last step, whose message went before it was wanted."""
        return bool(self.gather(torch.tensor(int(wanted))).any())

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


def _check_script(fabric: Fabric) -> None:
    """Raise where Fabric has nothing to run again; it would kill this process when the others fail."""
    strategy: Any = fabric.strategy
    main: Any = sys.modules["__main__"]
    starts = hasattr(strategy, "cluster_environment") and not strategy.cluster_environment.creates_processes_externally
    # A module has a spec, and is run again by its name.
    if starts and strategy.num_processes > 1 and main.__spec__ is None and not Path(sys.argv[0]).is_file():
        raise ValueError(
            f"devices: expected a script or a module that {strategy.num_processes} processes can run, "
            f"got {sys.argv[0] or 'standard input'!r}; write a file, or start it with torchrun"
        )


def described(batches: Batches) -> dict[str, Any]:
    """What processes that have the same data say alike of them: number, kind, and a digest of a few rows.

    A `Dataset` or `DataLoader` is not read, so that two are taken for the same where their lengths are.

    Example:
        >>> import pyro_vae
        >>> batches = Batches(torch.zeros(10, 8, 8), pyro_vae.build((8, 8), latent=2), batch_size=4)
        >>> described(batches)["shape of a datum"]
        (8, 8)
    """
    source, number = batches.source, batches.num_data
    said = {"number of data": number, "number of batches": len(batches), "kind of data": type(source).__name__}
    if not isinstance(source, InMemory | OnDisk):
        return said
    rows = torch.tensor(sorted({i * (number - 1) // (LOOKED_AT - 1) for i in range(LOOKED_AT)}))
    some = source.read(rows) if isinstance(source, OnDisk) else [x[rows.to(x.device)] for x in source.tensors]
    some = [x.cpu().contiguous() for x in some[: batches.num_inputs]]
    content = b"".join(x.view(torch.uint8).numpy().tobytes() for x in some)
    return {
        **said,
        "dtype of the data": ", ".join(str(x.dtype) for x in some),
        "shape of a datum": tuple(some[0].shape[1:]),
        f"digest of {len(rows)} rows of the data": hashlib.sha256(content).hexdigest()[:16],
    }


def _tensors(program: Program) -> dict[str, Tensor]:
    """Weights and buffers by name."""
    return {**dict(program.named_parameters()), **dict(program.named_buffers())}


def _gradient(parameter: Tensor) -> Tensor:
    """Its gradient, of zeros where it has none."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _change(buffer: Tensor, before: Tensor) -> Tensor:
    """What has been added to a buffer; of infinite entries that stay so, nothing."""
    return torch.where(buffer == before, torch.zeros_like(buffer), buffer - before)
