"""Training from beginning to end, with a run directory."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pyro.infer import ELBO, Trace_ELBO

from pyro_vae import evaluation, expressions, runs
from pyro_vae.data import as_source
from pyro_vae.programs import Program, undisturbed
from pyro_vae.training.history import History
from pyro_vae.training.steps import Training
from pyro_vae.training.terminal import interruptible, progress_bar

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Fitted", "fit"]


@dataclasses.dataclass(frozen=True)
class Fitted:
    """What `fit` returns.

    Attributes:
        program: The trained program, the one that was given.
        history: One row an epoch, with columns epoch, step, beta (at its last step), loss, elbo (with beta = 1), rate,
            distortion (means over the epoch), valid_elbo (at its end), all in nats per datum, and seconds.
        out: The run directory, or None.
    """

    program: Program
    history: pd.DataFrame
    out: Path | None


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
    seed: int | None = None,
    start_at_mean: bool = False,
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
        data: Tensor, array, `(x, y)` pair, `Dataset` or `DataLoader`. What the program does not take of a batch, such
            as labels, is left out.
        valid: Data for a validation ELBO after each epoch.
        estimator: Any `pyro.infer.ELBO` (default `Trace_ELBO()`).
        anneal: Beta as a function of progress in [0, 1], such as `schedules.Linear(0.1)` (default 1).
        epochs: Passes over the data.
        batch_size: Data in a step.
        lr: Learning rate; the highest one of a schedule.
        optimizer: Called with the parameters and `lr=`.
        lr_schedule: None, "cosine", "one-cycle" (with 5 % warm-up), or a function from the optimizer to a torch
            scheduler, which is then stepped after each step.
        device: "auto", "cpu", "cuda", "cuda:1" or "mps".
        precision: Fabric's: "32-true", "bf16-mixed", "64-true", ...
        seed: Seed of all random numbers; None goes on from the current state.
        start_at_mean: Whether to set the likelihood's output bias from the data's mean first. It saves the first
            epochs, in which many latents are otherwise lost for good.
        out: Run directory to write; None writes nothing.
        resume: Go on from the checkpoint in `out`: bit for bit, but within an epoch of a stream that shuffles itself.
        overwrite: Replace a run in `out`.
        progress: Whether to show a progress bar.

    Returns:
        A `Fitted`, with the history. The program is in eval mode.

    Raises:
        ValueError: If an argument or the data do not suit, or `out` exists.
        NonFiniteError: If the loss is NaN or infinite; the last good checkpoint stays.
        KeyboardInterrupt: After Ctrl-C, once the step is done and the checkpoint written.

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
    folder = None if out is None else Path(out)
    if folder is not None:
        runs.check_free(folder, resume, overwrite)
    elif resume:
        raise ValueError("resume: expected a run directory out=, got None")
    source, warn = as_source(data), folder is not None and not resume
    config = {
        **_data_config(source),
        "program": _written(program, "program", warn),
        "estimator": _written(estimator or Trace_ELBO(), "estimator", warn),
        "anneal": _written(anneal, "anneal", warn),
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": float(lr),
        "optimizer": _written(optimizer, "optimizer", warn),
        "lr_schedule": lr_schedule if isinstance(lr_schedule, str) else _written(lr_schedule, "lr_schedule", warn),
        "device": device,
        "precision": precision,
        "seed": seed,
        "start_at_mean": start_at_mean,
    }
    training = Training(
        program,
        source,
        estimator=estimator,
        anneal=anneal,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        optimizer=optimizer,
        lr_schedule=lr_schedule,
        device=device,
        precision=precision,
        seed=seed,
        start_at_mean=start_at_mean,
    )
    history = History()
    if folder is not None:
        if resume:
            tensors, meta = runs.read_checkpoint(folder / runs.CHECKPOINT)
            training.restore(tensors, meta, folder / runs.CHECKPOINT)
            history.restore(meta)
        config["recorded"] = {"event_shape": _event_shape(training), **runs.versions()}
    if valid is not None:
        evaluation.checked_batches(program, valid, 1)
    written = False
    with progress_bar(training, progress) as show, interruptible() as interrupted:
        for step in training:
            history.add(step)
            show(step)
            if folder is not None and not written:  # not before a step has shown that the run works
                if not resume:
                    runs.clear(folder)
                runs.write_config(folder, config)
                _save(folder, training, history)
                written = True
            if training.step % len(training.batches) == 0:
                history.close_epoch(None if valid is None else evaluation.elbo(program, valid).mean().item())
                if folder is not None:
                    _save(folder, training, history)
            if interrupted():
                if folder is not None:
                    _save(folder, training, history)
                raise KeyboardInterrupt
    training.check_finite()
    program.eval()
    if folder is not None:
        runs.write_checkpoint(folder / runs.MODEL, runs.weights(program))
    return Fitted(program, history.frame(), folder)


def _written(value: Any, slot: str, warn: bool) -> str | None:
    """The expression of a value; for one that has none, the reason in parentheses, which is no expression."""
    if value is None:
        return None
    try:
        return expressions.write(value, slot)
    except (ValueError, TypeError) as error:
        if warn:
            warnings.warn(
                f"{runs.CONFIG} cannot name the {slot} ({error}), and cannot repeat the run alone", stacklevel=3
            )
        return f"({error})"


def _data_config(source: Any) -> dict[str, Any]:
    return dict(getattr(source, "source", None) or {"data": None})


def _event_shape(training: Training) -> list[int]:
    with undisturbed(training.program):
        return list(next(training.batches.epoch(0))[0].shape[1:])


def _save(folder: Path, training: Training, history: History) -> None:
    tensors, meta = training.state()
    runs.write_checkpoint(folder / runs.CHECKPOINT, tensors, meta | history.meta())
    with runs.replacing(folder / runs.HISTORY) as temporary:
        history.frame().to_csv(temporary, index=False)
