"""Training step by step."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO, TraceTailAdaptive_ELBO
from torch import Tensor, nn

from pyro_vae import handlers, runs
from pyro_vae.data import Batches, check
from pyro_vae.programs import Program, undisturbed

__all__ = ["NonFiniteError", "Step", "Training", "steps"]

LR_SCHEDULES = ("cosine", "one-cycle")


class NonFiniteError(FloatingPointError):
    """The loss or a weight became NaN or infinite."""


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


class _Objective(nn.Module):
    """Program and estimator as one module, whose output is what there is to differentiate."""

    def __init__(self, program: Program, estimator: ELBO):
        super().__init__()
        self.program = program
        self.estimator: Any = estimator
        # An estimator is used by what its own class defines, and not by what that may have inherited beside it.
        ways = ("differentiable_loss", "loss_and_grads")
        self.differentiable = "differentiable_loss" in next(
            vars(c) for c in type(estimator).__mro__ if set(ways) & vars(c).keys()
        )
        self.recorded = handlers.record()
        # The program's own param store: some estimators keep state there, and none of it may reach Pyro's.
        self.param_store: Any = {"params": {}, "constraints": {}}

    def forward(self, beta: float, *batch: Tensor) -> Any:
        programs = self.recorded.model(self.program.model), self.recorded.guide(self.program.guide)
        with pyro.get_param_store().scope(self.param_store), handlers.beta(beta), self.recorded:
            if self.differentiable:
                return self.estimator.differentiable_loss(*programs, *batch)
            # The others call backward themselves, and only where param sites are collected.
            with poutine.trace(param_only=True):
                loss = self.estimator.loss_and_grads(*programs, *batch)
            return torch.as_tensor(sum(loss) if isinstance(loss, tuple) else loss)


class Training:
    """A run of training: the program, its optimizer and schedules, and where they stand.

    Takes the arguments of `fit` that shape the steps. Iterating takes the remaining steps.
    """

    def __init__(
        self,
        program: Program,
        data: Any,
        *,
        estimator: ELBO | None = None,
        anneal: Callable[[float], float] | None = None,
        epochs: int = 100,
        batch_size: int = 128,
        lr: float = 1e-3,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
        lr_schedule: str | Callable[..., Any] | None = None,
        device: str = "auto",
        precision: str = "32-true",
        seed: int | None = None,
        start_at_mean: bool = False,
    ):
        from lightning.fabric import Fabric, seed_everything

        if epochs < 1 or not 0 < lr < math.inf:
            raise ValueError(f"expected positive epochs and lr, got epochs={epochs}, lr={lr}")
        if isinstance(lr_schedule, str) and lr_schedule not in LR_SCHEDULES:
            raise ValueError(f"lr_schedule: expected one of {', '.join(LR_SCHEDULES)}, got {lr_schedule!r}")
        if type(estimator).__name__.startswith("Jit"):
            name = type(estimator).__name__
            raise ValueError(f"{name} would trace beta once and for all; expected {name.removeprefix('Jit')}")
        if isinstance(estimator, TraceEnum_ELBO) and any(
            getattr(m, "scale", None) == "optimal" for m in program.modules()
        ):
            raise ValueError("scale='optimal' knows no weights of enumerated latents; expected scale='global'")
        if anneal is not None and not callable(anneal):
            raise ValueError(f"anneal: expected a function of progress such as schedules.Linear(0.1), got {anneal!r}")
        anneal = anneal or (lambda progress: 1.0)
        if anneal(1.0) < 1:
            warnings.warn(
                f"the run ends with beta = {anneal(1.0):g} < 1, so its loss is no bound on the evidence", stacklevel=3
            )
        accelerator, _, index = device.partition(":")
        devices = [int(index)] if index else 1
        fabric = Fabric(accelerator=accelerator, devices=devices, precision=precision)  # type: ignore[arg-type]
        if seed is not None:
            seed_everything(seed, verbose=False)

        self.program = program
        self.objective = _Objective(program, estimator or Trace_ELBO())
        self._fabric_objective = fabric.setup_module(self.objective)
        order_seed = seed if seed is not None else int(torch.randint(2**31, ()))
        self.batches = Batches(data, program, batch_size, order_seed)
        check(program, self.batches)
        if start_at_mean:
            _start_at_mean(program, self.batches)
        parameters = [p for p in program.parameters() if p.requires_grad]
        if not parameters:
            raise ValueError(f"{type(program).__name__} has no parameters to train")
        # The fused step is the same computation in one kernel; torch's own optimizers have it.
        fused = {"fused": True} if optimizer in (torch.optim.Adam, torch.optim.AdamW) else {}
        self.optimizer = optimizer(parameters, lr=lr, **fused)
        self._fabric_optimizer: Any = fabric.setup_optimizers(self.optimizer)
        self.total_steps = epochs * len(self.batches)
        self.scheduler = _lr_scheduler(self.optimizer, lr_schedule, lr, self.total_steps)
        self.fabric = fabric
        self.anneal = anneal
        self.annealed = [module for module in program.modules() if hasattr(module, "set_progress")]
        self.epochs = epochs
        self.step = 0

    def __iter__(self) -> Iterator[Step]:
        while self.step < self.total_steps:
            epoch, skip = divmod(self.step, len(self.batches))
            for batch in self.batches.epoch(epoch, skip):
                yield self._take(epoch, batch)

    def _take(self, epoch: int, batch: tuple[Tensor, ...]) -> Step:
        progress = self.step / self.total_steps
        beta = self.anneal(progress)
        for module in self.annealed:
            module.set_progress(progress)
        recorded = self.objective.recorded
        if not self.program.training:
            self.program.train()
        self._fabric_optimizer.zero_grad()
        # Pyro checks the first step; after that its checks, of a program that does not change, are left out.
        with pyro.validation_enabled(False) if self.step else nullcontext():
            loss = self._fabric_objective(beta, *batch)
        num_data = recorded.num_data
        loss = loss / num_data
        rate, distortion = recorded.rate.mean(), recorded.distortion.mean()
        values = torch.stack([loss.detach().to(rate), rate, distortion]).tolist()
        # Tail-adaptive inference has no loss to report and gives infinity (Wang, Liu and Liu, 2018).
        if not math.isfinite(values[0]) and not isinstance(self.objective.estimator, TraceTailAdaptive_ELBO):
            where = recorded.first_nonfinite()
            raise NonFiniteError(f"the loss is {values[0]} at step {self.step + 1}; first site not finite: {where}")
        if loss.requires_grad:
            self.fabric.backward(loss)
        else:  # the estimator has called backward on the sum
            for parameter in self.program.parameters():
                if parameter.grad is not None:
                    parameter.grad.div_(num_data)
        if self.step == 0:
            self._check_parameters()
        self._fabric_optimizer.step()
        self.step += 1
        if self.scheduler is not None:
            self.scheduler.step()
        return Step(epoch + 1, self.step, beta, values[0], -values[1] - values[2], values[1], values[2], len(batch[0]))

    def _check_parameters(self) -> None:
        own = {id(parameter) for parameter in self.program.parameters()}
        for name, parameter in self.objective.param_store["params"].items():
            if id(parameter) not in own and not name.startswith("__"):  # baselines that estimators keep
                raise ValueError(
                    f"param site {name!r} is no (contiguous) parameter of {type(self.program).__name__} and would not "
                    "be trained: make it an attribute, an nn.Parameter or a PyroParam"
                )
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
        optimizer = type(self.optimizer).__name__
        return {"steps in an epoch": len(self.batches), "optimizer": optimizer, "trained parameters": trained}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain data from which the run goes on bit for bit."""
        self.check_finite()
        tensors = {f"model.{name}": tensor for name, tensor in runs.weights(self.program).items()}
        for index, entry in self.optimizer.state_dict()["state"].items():
            for name, value in entry.items():
                if value is not None:
                    tensors[f"optimizer.{index}.{name}"] = torch.as_tensor(value).detach().cpu().clone().contiguous()
        tensors["rng.cpu"] = torch.get_rng_state()
        if self.fabric.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.fabric.device)
        return tensors, {"step": self.step, "order_seed": self.batches.seed, "shape": self._shape()}

    def restore(self, tensors: dict[str, Tensor], meta: dict[str, Any], path: Path) -> None:
        """Go on from where `state` was taken."""
        model = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
        for name, own in self._shape().items():
            if meta["shape"][name] != own:
                raise ValueError(f"{path} is of another run: expected {name} {own}, got {meta['shape'][name]}")
        runs.load_weights(self.program, model, path)
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".", 2)
                state.setdefault(int(index), {})[key] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.step = meta["step"]
        self.batches.seed = meta["order_seed"]
        if self.scheduler is not None:
            with warnings.catch_warnings():  # torch misses the optimizer's steps between these
                warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
                for _ in range(min(self.step, self.total_steps)):
                    self.scheduler.step()
        torch.set_rng_state(tensors["rng.cpu"])
        if "rng.cuda" in tensors and self.fabric.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["rng.cuda"], self.fabric.device)


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


def _lr_scheduler(optimizer: torch.optim.Optimizer, schedule: Any, lr: float, total_steps: int) -> Any:
    from torch.optim import lr_scheduler

    if schedule == "cosine":
        return lr_scheduler.CosineAnnealingLR(optimizer, T_max=total_steps)
    if schedule == "one-cycle":
        total = max(total_steps, 4)
        warm_up = max(0.05, 2 / total)  # torch needs a warm-up of two steps
        return lr_scheduler.OneCycleLR(optimizer, lr, total, pct_start=warm_up, cycle_momentum=False)
    return None if schedule is None else schedule(optimizer)


def steps(program: Program, data: Any, **options: Any) -> Iterator[Step]:
    """Train a program step by step: a generator that yields after each, so that the caller's loop is the callback.

    Args:
        program: The program.
        data: Tensor, array, `(x, y)` pair, `Dataset` or `DataLoader`.
        **options: The arguments of `fit` from `estimator` to `start_at_mean`.

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
