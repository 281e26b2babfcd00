"""Training from beginning to end, with a run directory."""

from __future__ import annotations

import dataclasses
import functools
import os
import warnings
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pyro.infer import ELBO

from pyro_vae import evaluation, expressions, runs
from pyro_vae.data import as_source
from pyro_vae.files import replacing
from pyro_vae.programs import Program
from pyro_vae.training.history import History
from pyro_vae.training.options import Options
from pyro_vae.training.steps import Step, Training
from pyro_vae.training.terminal import interruptible, progress_bar

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Fitted", "fit"]


@dataclasses.dataclass(frozen=True)
class Fitted:
    """What `fit` returns.

    Attributes:
        program: The trained program, the one that was given.
        out: The run directory, or None.
    """

    program: Program
    out: Path | None
    _history: History = dataclasses.field(repr=False)

    @functools.cached_property
    def history(self) -> pd.DataFrame:
        """One row an epoch, with columns epoch, step, beta (at its last step), loss, elbo (with beta = 1), rate,
        distortion (means over the epoch), valid_elbo (at its end), all in nats per datum, and seconds.
        """
        return self._history.frame()  # when it is asked for: pandas takes a second to import, and 60 MiB


def fit(
    program: Program,
    data: Any,
    *,
    valid: Any = None,
    estimator: ELBO | None = None,
    anneal: Callable[[float], float] | None = None,
    epochs: int = 100,
    batch_size: int = 128,
    lr: float = 1e-3,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
    lr_schedule: str | Callable[..., Any] | None = None,
    device: str = "auto",
    precision: str = "32-true",
    devices: int = 1,
    num_nodes: int = 1,
    strategy: str = "auto",
    seed: int | None = None,
    start_at_mean: bool = False,
    num_workers: int = 0,
    compile: str | bool = "auto",
    out: str | os.PathLike | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> Fitted:
    r"""Train a program, in place.

    .. math:: \min_{\theta, \phi} \tfrac1N \sum_n E_q[-\log p_\theta(x_n \mid z)]
              + \beta(t)\, E_q\Big[\log \frac{q_\phi(z \mid x_n)}{p_\theta(z)}\Big]

    is what it does with `Trace_ELBO`; another estimator brings its own loss. The loss is per datum.

    Args:
        program: A module with Pyro programs `model(*batch)` and `guide(*batch)`.
        data: Tensor, array, `(x, y)` pair, `Dataset` or `DataLoader`; a memory map and a Zarr array stay on disk. What
            the program does not take of a batch, such as labels, is left out.
        valid: Data for a validation ELBO after each epoch.
        estimator: Any `pyro.infer.ELBO` (default `Trace_ELBO()`).
        anneal: Beta as a function of progress in [0, 1], such as `schedules.Linear(0.1)` (default 1); or a controller,
            such as `schedules.ControlVAE(20.0)`, whose `update` is called with the rate after each step, and whose
            `state_dict` and `load_state_dict` a checkpoint needs. A run works on a copy of it.
        epochs: Passes over the data.
        batch_size: Data in a step, of all processes together.
        lr: Learning rate; the highest one of a schedule.
        optimizer: Called with the parameters and `lr=`.
        lr_schedule: None, "cosine", "one-cycle" (with 5 % warm-up), or a function from the optimizer to a torch
            scheduler, which is then stepped after each step.
        device: "auto", "cpu", "cuda", "cuda:1" or "mps".
        precision: Fabric's: "32-true", "64-true", "bf16-mixed", or "16-mixed" (on CUDA).
        devices: Processes on each machine, each with a device of its own. Each takes its share of the rows of every
            batch, and draws its own noise. Lightning's Fabric starts the others by running the script again, so what
            is not to be done by each of them stands under `if torch.distributed.get_rank() == 0`. `torchrun` says
            itself how many there are.
        num_nodes: Machines.
        strategy: "auto" or "ddp", which are the same: weights and optimizer are in every process; or "fsdp": each has
            a shard of the optimizer's state and of the averaged gradients, while the program's own parameters are
            whole between steps. Changes by hand, made to them between steps, are then overwritten.
        seed: Seed of all random numbers; None goes on from the current state.
        start_at_mean: Whether to set the likelihood's output bias from the data's mean first. It saves the first
            epochs, in which many latents are otherwise lost for good.
        num_workers: Processes that read a `Dataset`, or threads that read data on disk; see `data.Batches`.
        compile: Whether to compile the step (see `pyro_vae.compilation.compile_step`): "auto" does so where the rest of
            the run would take more than a minute without. What cannot be compiled is warned of, and runs as it is.
        out: Run directory to write; None writes nothing. Only the first of several processes writes.
        resume: Go on from the checkpoint in `out`: bit for bit, but within an epoch of a stream that shuffles itself,
            and but for rounding where "auto" compiles.
        overwrite: Replace a run in `out`.
        progress: Whether to show a progress bar.

    Returns:
        A `Fitted`, with the history. The program is in eval mode.

    Raises:
        ValueError: If an argument or the data do not suit, or `out` exists.
        NonFiniteError: If the loss is NaN or infinite; the last good checkpoint stays.
        KeyboardInterrupt: After Ctrl-C, once the step is done and the checkpoint written; in all processes.
        LostProcessError: If another process has ended.

    Reference:
        Kingma and Welling, 2014. Auto-encoding variational Bayes. Bowman et al., 2016. Generating sentences from a
        continuous space (annealing).

    Example:
        >>> import pyro_vae
        >>> vae = pyro_vae.build((8, 8), latent=2)
        >>> fitted = fit(vae, torch.ones(10, 8, 8), epochs=2, batch_size=5, progress=False)
        >>> fitted.history.step.tolist()
        [2, 4]
    """
    given = locals()
    folder = None if out is None else Path(out)
    if folder is not None:
        runs.check_free(folder, resume, overwrite)
    elif resume:
        raise ValueError("resume: expected a run directory out=, got None")
    source = as_source(data)
    training = Training(program, source, **{field.name: given[field.name] for field in dataclasses.fields(Options)})
    processes = training.processes
    warn = not resume and processes.rank == 0
    run = _Run(training, folder, {} if folder is None else _config(training, source, warn), resume)
    if valid is not None:
        evaluation.checked_batches(program, valid, 1)
    shown = progress_bar(training, progress and processes.rank == 0)
    with shown as show, interruptible() as interrupted, closing(iter(training)) as taken:
        for step in taken:
            run.take(step)
            show(step)
            if training.step % len(training.batches) == 0:
                run.history.close_epoch(None if valid is None else _valid_elbo(training, valid))
                run.save()
            if training.step < training.total_steps and processes.stopping(interrupted()):
                run.save()
                processes.wait()  # while the first one writes, which the launcher ends when another has ended
                raise KeyboardInterrupt
        run.finish()
        if processes.agree(interrupted()):
            raise KeyboardInterrupt
    return Fitted(program, folder, run.history)


def _valid_elbo(training: Training, valid: Any) -> float:
    """The validation ELBO, which the first process computes for all."""
    processes = training.processes
    own = evaluation.elbo(training.program, valid).mean().item() if processes.rank == 0 else None
    return processes.broadcast(own)


class _Run:
    """A training and its history, and the directory that both are written to, unless there is none."""

    def __init__(self, training: Training, folder: Path | None, config: dict[str, Any], resume: bool):
        self.training, self.folder, self.config, self.resume = training, folder, config, resume
        self.history = History()
        self.started = False
        self.writes = folder is not None and training.processes.rank == 0
        if folder is not None and resume:
            tensors, meta = runs.read_checkpoint(folder / runs.CHECKPOINT)
            training.restore(tensors, meta, folder / runs.CHECKPOINT)
            self.history.restore(meta)

    def take(self, step: Step) -> None:
        """Take a step into account. The first one shows that the run works; not before does it replace another."""
        self.history.add(step)
        if not self.started and self.folder is not None:
            if self.writes and not self.resume:
                runs.clear(self.folder)
            if self.writes:
                runs.write_config(self.folder, self.config)
            self.save()
        self.started = True

    def save(self) -> None:
        """Write the checkpoint and the history."""
        if self.folder is None:
            return
        tensors, meta = self.training.state()  # in every process, since each has a random state
        if not self.writes:
            return
        runs.write_checkpoint(self.folder / runs.CHECKPOINT, tensors, meta | self.history.meta())
        with replacing(self.folder / runs.HISTORY) as temporary:
            self.history.write(temporary)

    def finish(self) -> None:
        """Write the weights, of a program that is ready for use."""
        self.training.check_finite()
        self.training.program.eval()
        if self.folder is not None and self.writes:
            runs.write_checkpoint(self.folder / runs.MODEL, runs.weights(self.training.program))


def _config(training: Training, source: Any, warn: bool) -> dict[str, Any]:
    """What `config.yaml` says of a run."""
    config = dict(getattr(source, "source", None) or {"data": None})
    config["program"] = _written(training.program, "program", warn)
    for name, value in vars(training.options).items():
        named = name in ("estimator", "anneal", "optimizer", "lr_schedule") and not isinstance(value, str)
        config[name] = _written(value, name, warn) if named else value
    return config | {"recorded": {"event_shape": list(training.batches.event_shape or ()), **runs.versions()}}


def _written(value: Any, slot: str, warn: bool) -> str | None:
    """The expression of a value; for one that has none, the reason in parentheses, which is no expression."""
    if value is None:
        return None
    try:
        return expressions.write(value, slot)
    except (ValueError, TypeError) as error:
        if warn:
            warnings.warn(
                f"{runs.CONFIG} cannot name the {slot} ({error}), and cannot repeat the run alone", stacklevel=4
            )
        return f"({error})"
