"""What a run can be asked for, and what is made of it."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import os
import re
import sys
import warnings
from collections.abc import Callable
from numbers import Integral
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO

from pyro_vae import schedules
from pyro_vae.compilation import check_compile
from pyro_vae.data.workers import check_num_workers
from pyro_vae.programs import Program
from pyro_vae.training.processes import num_processes

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = [
    "Options",
    "annealing",
    "checked_seed",
    "fabric",
    "import_fabric",
]

LR_SCHEDULES = ("cosine", "one-cycle")
PRECISIONS = ("32-true", "64-true", "bf16-mixed", "16-mixed")
STRATEGIES = ("auto", "ddp", "fsdp")


@dataclasses.dataclass
class Options:
    """The arguments of `fit` that shape the steps, with its defaults.

    Raises:
        ValueError: If one of them does not suit.

    Example:
        >>> Options(epochs=3).batch_size
        128
    """

    estimator: Any = None
    anneal: Callable[[float], float] | None = None
    epochs: int = 100
    batch_size: int = 128
    lr: float = 1e-3
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam
    lr_schedule: str | Callable[..., Any] | None = None
    device: str = "auto"
    precision: str = "32-true"
    devices: int = 1
    num_nodes: int = 1
    strategy: str = "auto"
    seed: int | None = None
    start_at_mean: bool = False
    num_workers: int = 0
    compile: str | bool = "auto"

    def __post_init__(self) -> None:
        self.estimator = self.estimator or Trace_ELBO()
        self.lr = float(self.lr)
        if self.epochs < 1 or not 0 < self.lr < math.inf:
            raise ValueError(f"expected positive epochs and lr, got epochs={self.epochs}, lr={self.lr}")
        check_num_workers(self.num_workers)
        if isinstance(self.lr_schedule, str) and self.lr_schedule not in LR_SCHEDULES:
            raise ValueError(f"lr_schedule: expected one of {', '.join(LR_SCHEDULES)}, got {self.lr_schedule!r}")
        check_compile(self.compile)
        self.seed = None if self.seed is None else checked_seed(self.seed)
        name = type(self.estimator).__name__
        if name.startswith("Jit"):
            raise ValueError(f"{name} would trace beta once and for all; expected {name.removeprefix('Jit')}")
        if self.anneal is not None and not callable(self.anneal):
            example = "expected a function of progress such as schedules.Linear(0.1)"
            raise ValueError(f"anneal: {example}, got {self.anneal!r}")

    def check(self, program: Program) -> None:
        """Raise if they do not suit the program."""
        if isinstance(self.estimator, TraceEnum_ELBO) and any(
            getattr(module, "scale", None) == "optimal" for module in program.modules()
        ):
            raise ValueError("scale='optimal' knows no weights of enumerated latents; expected scale='global'")


def checked_seed(seed: Any) -> int:
    """A seed of torch's, NumPy's and Python's random numbers.

    Example:
        >>> checked_seed(-1)
        Traceback (most recent call last):
        ...
        ValueError: seed: expected a whole number from 0 to 4294967295, got -1
    """
    if not isinstance(seed, Integral) or not 0 <= int(seed) < 2**32:
        raise ValueError(f"seed: expected a whole number from 0 to {2**32 - 1}, got {seed!r}")
    return int(seed)


def fabric(
    device: str, precision: Any = "32-true", devices: int = 1, num_nodes: int = 1, strategy: str = "auto"
) -> Fabric:
    """Lightning's Fabric for a device, or for many processes.

    Args:
        device: "auto", "cpu", "cuda", "cuda:1" or "mps".
        precision: "32-true", "64-true", "bf16-mixed", or "16-mixed" (on CUDA).
        devices: Processes on each machine, each with a device; `torchrun` says how many itself.
        num_nodes: Machines.
        strategy: "auto", "ddp" or "fsdp".

    Raises:
        ValueError: If there is no such device or precision, or the arguments do not suit one another.

    Example:
        >>> fabric("cpu").device
        device(type='cpu')
    """
    lightning = import_fabric()
    _check_names(device, precision)
    accelerator, _, index = device.partition(":")
    devices, num_nodes = num_processes(devices, num_nodes)
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy: expected one of {', '.join(STRATEGIES)}, got {strategy!r}")
    chosen: Any = "auto"
    if devices * num_nodes > 1:
        from pyro_vae.training.strategies import Averaging

        if index:
            raise ValueError(f"device: expected {accelerator} for {devices * num_nodes} processes, got {device}")
        if strategy == "fsdp" and precision == "16-mixed":  # shards would not agree on which steps to leave out
            raise ValueError("precision: expected bf16-mixed for strategy fsdp, got 16-mixed")
        chosen = Averaging()
    _check_there(device, precision)
    asked: Any = [int(index)] if index else devices
    return lightning.Fabric(
        accelerator=accelerator, devices=asked, num_nodes=num_nodes, strategy=chosen, precision=precision
    )


def import_fabric() -> ModuleType:
    """The package lightning_fabric, imported without a change to the environment, and without what it has to say.

    On import it lets PyTorch ask for GPUs in another way, by looking for a library of their driver, which `Adam` then
    does at each step; and its logger shows how processes and precisions are set up.

    Example:
        >>> before = dict(os.environ)
        >>> import_fabric().__name__
        'lightning_fabric'
        >>> os.environ == before
        True
    """
    before, is_new = dict(os.environ), "lightning_fabric" not in sys.modules
    import lightning_fabric

    if is_new:
        logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
        # But it is what tells of a process that has ended before all had found each other.
        logging.getLogger("lightning_fabric.strategies.launchers.subprocess_script").setLevel(logging.INFO)
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)
    return lightning_fabric


def _check_names(device: Any, precision: Any) -> None:
    if not isinstance(device, str) or not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", device):
        raise ValueError(f"device: expected a name such as cpu, cuda or cuda:1, got {device!r}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")


def _check_there(device: str, precision: str) -> None:
    """Raise if the machine has no such device, or the device no such precision."""
    accelerator, _, index = device.partition(":")
    missing = accelerator == "cuda" and int(index or 0) >= torch.cuda.device_count()
    if missing or (accelerator == "mps" and not torch.backends.mps.is_available()):
        raise ValueError(f"device: expected one that this machine has, such as auto or cpu, got {device!r}")
    cuda = accelerator == "cuda" or (accelerator == "auto" and torch.cuda.is_available())
    if precision == "16-mixed" and not cuda:
        raise ValueError(f"precision: expected bf16-mixed on a device other than cuda, got {precision} on {device}")


def annealing(anneal: Any) -> Any:
    """Beta as a function of progress: a schedule as it is, and a copy of a controller, which changes as it goes."""
    if anneal is None:
        return schedules.Constant(1.0)
    if hasattr(anneal, "update"):
        if missing := [name for name in ("state_dict", "load_state_dict") if not hasattr(anneal, name)]:
            raise ValueError(
                f"anneal: expected a controller with update, state_dict and load_state_dict, "
                f"got {type(anneal).__name__} without {' and '.join(missing)}"
            )
        return copy.deepcopy(anneal)
    if anneal(1.0) < 1:
        warnings.warn(
            f"the run ends with beta = {anneal(1.0):g} < 1, so its loss is no bound on the evidence", stacklevel=4
        )
    return anneal
