"""Training at a terminal: Ctrl-C and a progress bar."""

from __future__ import annotations

import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

from pyro_vae.training.steps import Step, Training

__all__ = ["interruptible", "progress_bar"]


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Hold the first Ctrl-C back until the running step is done; a second one interrupts at once."""
    pressed: list[bool] = []
    if threading.current_thread() is not threading.main_thread():  # only there can a handler be set
        yield lambda: False
        return
    before = signal.getsignal(signal.SIGINT)

    def handle(signum: int, frame: Any) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(True)

    signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def progress_bar(training: Training, visible: bool) -> Iterator[Callable[[Step], None]]:
    """A bar on stderr, to be called with each step."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
    )
    fields: Any = {"epoch": training.epoch, "epochs": training.options.epochs, "figures": ""}
    with Progress(
        *columns, console=Console(stderr=True), disable=not visible or training.step == training.total_steps
    ) as bar:
        training.gradients.announce = bar.console.print if visible else training.gradients.announce
        task = bar.add_task("", total=training.total_steps, completed=training.step, **fields)
        shown = 0.0
        # Of some steps, which forget what came before them: a bad start, a compilation; and of ELBOs the median.
        elbos, times = deque[float](maxlen=50), deque([time.perf_counter()], maxlen=50)

        def show(step: Step) -> None:
            nonlocal shown
            now = time.perf_counter()
            elbos.append(step.elbo)
            times.append(now)
            if now - shown > 0.1 or step.step == training.total_steps:
                rate = (len(times) - 1) / (now - times[0])
                figures = f"{rate:.0f} steps/s  ELBO {median(elbos):.2f}  beta {step.beta:.2f}"
                bar.update(task, completed=step.step, epoch=step.epoch, figures=figures)
                shown = now

        yield show
