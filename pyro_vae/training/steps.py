"""Training step by step."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import TraceTailAdaptive_ELBO
from torch import Tensor

from pyro_vae import handlers, runs
from pyro_vae.compilation import annealed
from pyro_vae.data import Batches, check
from pyro_vae.estimators import checks
from pyro_vae.estimators.objective import Objective
from pyro_vae.programs import Program, check_param_sites, kept_buffers, undisturbed
from pyro_vae.training.gradients import Gradients
from pyro_vae.training.optimizers import lr_scheduler, optimizer, optimizer_step, zero_negligible
from pyro_vae.training.options import Options, annealing, fabric
from pyro_vae.training.processes import Processes

__all__ = ["NonFiniteError", "Step", "Training", "steps"]

_ZEROED_EVERY = 100  # steps; a moving average that keeps 0.9 of itself takes 175 to fall by 1e8


class NonFiniteError(FloatingPointError):
    """The loss or a weight became NaN or infinite: in all of several processes, of which the first tells it."""

    told_by = 0


@dataclasses.dataclass(frozen=True)
class Step:
    """What a training step did; loss, ELBO, rate and distortion are means over the batch in nats per datum.

    Attributes:
        epoch: Epoch, from 1.
        step: Steps taken so far, this one included.
        beta: Weight of the rate in this step's loss.
        loss: The estimator's loss, under beta.
        elbo: The evidence lower bound with beta = 1.
        rate: KL divergence from prior to posterior.
        distortion: Negative log-likelihood.
        num_data: Data in the batch.
    """

    epoch: int
    step: int
    beta: float
    loss: float
    elbo: float
    rate: float
    distortion: float
    num_data: int


class Training:
    """A run of training: the program, its optimizer and schedules, and where they stand.

    Takes the arguments of `fit` that shape the steps. Iterating takes the remaining steps.
    """

    def __init__(self, program: Program, data: Any, **options: Any):
        self.options = Options(**options)
        self.options.check(program)
        self.anneal = annealing(self.options.anneal)
        asked = self.options
        self.fabric = fabric(asked.device, asked.precision, asked.devices, asked.num_nodes, asked.strategy)
        self.processes = Processes(self.fabric)
        seed = self.options.seed
        if seed is not None:
            pyro.set_rng_seed(seed)
        self.program = program
        self.objective = Objective(program, self.options.estimator)
        placed = self.fabric.setup_module(self.objective)  # before the batches, which go where it is
        order_seed = seed if seed is not None else self.processes.broadcast(int(torch.randint(2**31, ())))
        self.batches = Batches(data, program, self.options.batch_size, order_seed, asked.num_workers)
        self.gradients = Gradients(self.objective, placed, self.batches, self.fabric, self.options.compile)
        check(program, self.batches)
        if self.options.start_at_mean:
            _start_at_mean(program, self.batches)
        self.batches.rank, self.batches.count = self.processes.rank, self.processes.count
        if self.processes.count > 1:
            self.processes.seed(order_seed, step=0)
        self.optimizer = optimizer(program, self.options)
        self._optimizer_step = optimizer_step(self.optimizer, asked, self.fabric)
        self.total_steps = self.options.epochs * len(self.batches)
        self.scheduler = lr_scheduler(self.optimizer, self.options, self.total_steps)
        self.annealed = annealed(self.objective)
        self.step = 0

    def __iter__(self) -> Generator[Step]:
        try:
            yield from self._steps()
        finally:
            self.batches.close()

    def _steps(self) -> Iterator[Step]:
        self.processes.start_alike(self.program, self.batches)
        if self.options.strategy == "fsdp":
            self.processes.shard(self.optimizer)
        checked = False
        while self.step < self.total_steps:
            epoch, skip = divmod(self.step, len(self.batches))
            for raw in self.batches.raw(epoch, skip):
                if not checked and len(raw[0]):
                    self._check_estimator(raw)
                    checked = True
                yield self._take(epoch, raw)

    def _check_estimator(self, raw: tuple[Tensor, ...]) -> None:
        """Warn or raise where the estimator is wrong for the program, whose mode is the one it is trained in."""
        with undisturbed(self.program), kept_buffers(self.program), handlers.beta(self.anneal(0.0)):
            self.program.train()
            batch = self.batches.prepare(*raw)
            self.processes.check_globals(self.program, batch)
            checks.check(self.options.estimator, self.program.model, self.program.guide, *batch)

    @property
    def epoch(self) -> int:
        """The epoch of the next step, from 1."""
        return min(self.step // len(self.batches) + 1, self.options.epochs)

    def _take(self, epoch: int, raw: tuple[Tensor, ...]) -> Step:
        progress = self.step / self.total_steps
        beta = float(self.anneal(progress))
        for each in self.annealed:
            each.set_progress(progress)
        if not self.program.training:
            self.program.train()
        loss, rate, distortion, num_data = self._averaged(beta, raw)
        if self.step == 0:
            self._check_parameters()
        self.processes.step(self._optimizer_step)
        self.step += 1
        if self.step % _ZEROED_EVERY == 0:
            zero_negligible(self.optimizer)
        if self.scheduler is not None:
            self.scheduler.step()
        if hasattr(self.anneal, "update"):
            self.anneal.update(rate)
        return Step(epoch + 1, self.step, beta, loss, -rate - distortion, rate, distortion, num_data)

    def _averaged(self, beta: float, raw: tuple[Tensor, ...]) -> tuple[float, float, float, int]:
        """Loss, rate and distortion per datum, and the number of data, of all processes; so are the gradients."""
        own = torch.zeros(3, device=self.fabric.device)
        if share := len(raw[0]):
            own = self.gradients(beta, raw, self.total_steps - self.step)
        (loss, rate, distortion), num_data = self.processes.average(self.program, own, share)
        # Tail-adaptive inference has no loss to report and gives infinity (Wang, Liu and Liu, 2018).
        if not math.isfinite(loss) and not isinstance(self.options.estimator, TraceTailAdaptive_ELBO):
            here = None if own[0].isfinite() else self.gradients.first_nonfinite(beta, raw)
            where = self.processes.first(here)
            raise NonFiniteError(f"the loss is {loss} at step {self.step + 1}; first site not finite: {where}")
        return loss, rate, distortion, num_data

    def _check_parameters(self) -> None:
        check_param_sites(self.program, self.objective.param_store["params"])
        if all(parameter.grad is None for parameter in self.program.parameters()):
            raise ValueError(
                f"no parameter of {type(self.program).__name__} has a gradient; does it call declare_parameters?"
            )

    def check_finite(self) -> None:
        """Raise `NonFiniteError` if a weight is NaN or infinite."""
        for name, parameter in self.program.named_parameters():
            if not parameter.isfinite().all():
                raise NonFiniteError(f"parameter {name} is not finite after step {self.step}")

    def _shape(self) -> dict[str, Any]:
        """What a checkpoint and the run that goes on from it must have in common."""
        trained = [name for name, parameter in self.program.named_parameters() if parameter.requires_grad]
        return {
            "steps in an epoch": len(self.batches),
            "optimizer": type(self.optimizer).__name__,
            "trained parameters": trained,
            "controller": type(self.anneal).__name__ if hasattr(self.anneal, "update") else None,
        }

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain data from which the run goes on bit for bit."""
        self.check_finite()
        tensors = {f"model.{name}": tensor for name, tensor in runs.weights(self.program).items()}
        for index, entry in self.optimizer.state_dict()["state"].items():
            for name, value in entry.items():
                if value is not None:
                    tensors[f"optimizer.{index}.{name}"] = (
                        torch.as_tensor(self.processes.whole(value)).detach().cpu().clone().contiguous()
                    )
        tensors["rng.cpu"] = self.processes.gather(torch.get_rng_state())
        if self.fabric.device.type == "cuda":
            tensors["rng.cuda"] = self.processes.gather(torch.cuda.get_rng_state(self.fabric.device))
        meta = {"step": self.step, "order_seed": self.batches.seed, "shape": self._shape()}
        if hasattr(self.anneal, "update"):
            meta["anneal"] = self.anneal.state_dict()
        return tensors, meta

    def restore(self, tensors: dict[str, Tensor], meta: dict[str, Any], path: Path) -> None:
        """Go on from where `state` was taken."""
        for name, own in self._shape().items():
            if meta["shape"].get(name) != own:
                raise ValueError(f"{path} is of another run: expected {name} {own}, got {meta['shape'].get(name)}")
        model = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
        runs.load_weights(self.program, model, path)
        self.step = meta["step"]
        self.batches.seed = meta["order_seed"]
        self._restore_optimizer(tensors)
        if hasattr(self.anneal, "update"):
            self.anneal.load_state_dict(meta["anneal"])
        self._restore_rng(tensors)

    def _restore_rng(self, tensors: dict[str, Tensor]) -> None:
        """The random state of each process; of another number of processes, new ones."""
        states = torch.atleast_2d(tensors["rng.cpu"])
        if len(states) != self.processes.count:
            self.processes.seed(self.batches.seed or 0, self.step)
            return
        torch.set_rng_state(states[self.processes.rank].clone())  # torch refuses a part of a tensor
        if "rng.cuda" in tensors and self.fabric.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["rng.cuda"][self.processes.rank].clone(), self.fabric.device)

    def _restore_optimizer(self, tensors: dict[str, Tensor]) -> None:
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".", 2)
                state.setdefault(int(index), {})[key] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        for parameter, entry in self.optimizer.state.items():
            for key, value in entry.items():  # in the order of the parameter's memory, which a fused step goes by
                if not parameter.is_contiguous() and value is not None and value.shape == parameter.shape:
                    entry[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        if self.scheduler is not None:
            with warnings.catch_warnings():  # torch misses the optimizer's steps between these
                warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
                for _ in range(min(self.step, self.total_steps)):
                    self.scheduler.step()


def _start_at_mean(program: Program, batches: Batches) -> None:
    if not hasattr(getattr(program, "likelihood", None), "start_at"):
        raise ValueError(
            f"start_at_mean: expected a program whose likelihood has start_at(mean), got {type(program).__name__}"
        )
    total: Any = 0
    count: Any = 0
    with undisturbed(program):
        for x, *exposure in batches.epoch(0):
            total = total + x.sum(0, dtype=torch.float64)
            count = count + (exposure[0].sum(dtype=torch.float64) if exposure else len(x))
    for component in program.children():
        if hasattr(component, "start_at"):
            component.start_at((total / count).to(batches.dtype))


def steps(program: Program, data: Any, **options: Any) -> Iterator[Step]:
    """Train a program step by step: a generator that yields after each, so that the caller's loop is the callback.

    Args:
        program: The program.
        data: Tensor, array, `(x, y)` pair, `Dataset` or `DataLoader`.
        **options: The arguments of `fit` from `estimator` to `compile`.

    Yields:
        A `Step`.

    Raises:
        ValueError: If an argument or the data do not suit.
        NonFiniteError: If the loss is NaN or infinite.

    Example:
        >>> import pyro_vae
        >>> vae = pyro_vae.build((8, 8), latent=2)
        >>> for step in steps(vae, torch.ones(10, 8, 8), epochs=50, batch_size=5):
        ...     if step.elbo > -40:
        ...         break
    """
    yield from Training(program, data, **options)
