"""A comparison at a terminal: a progress bar and a table."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["print_table", "progress_bar"]


def print_table(dataset: xr.Dataset) -> None:
    """Show what `compare` found."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    smallest = dataset.bound_se.min().item()
    digits = next((digits for digits in (2, 3) if smallest >= 10**-digits), 4)  # so that errors do not read as zero
    reference = f"{dataset.reference.item():.{digits}f} ± {dataset.reference_se.item():.{digits}f}"
    title = f"log-evidence {reference} nats per datum; {dataset.attrs['repeats']} repeats"
    # Tight, so that a name such as StickingTheLanding() stays in one line of 80 characters.
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=0, show_edge=False, title_justify="left")
    table.add_column("estimator", overflow="fold")
    for column in ("bound", "gap", "SNR\nmodel", "SNR\nguide", "var\nmodel", "var\nguide", "ms", "MiB"):
        table.add_column(column, justify="right", no_wrap=True)
    for name in dataset.estimator.values:
        row = dataset.sel(estimator=name)
        cells = [f"{row.bound.item():.{digits}f} ± {row.bound_se.item():.{digits}f}", f"{row.gap.item():.{digits}f}"]
        cells += [f"{snr:.2g}" for snr in row.gradient_snr.values]
        cells += [re.sub("e([+-])0", r"e\1", f"{variance:.1e}") for variance in row.gradient_variance.values]
        costs = row.milliseconds.item(), row.memory.item()
        cells += [f"{cost:.0f}" if cost >= 10 else f"{cost:.2g}" for cost in costs]
        table.add_row(str(name), *cells)
    Console().print(table)


@contextmanager
def progress_bar(total: int, visible: bool) -> Iterator[Callable[[str], Callable[[float], None]]]:
    """A bar on stderr past two seconds: called with what comes next, it gives what is called with shares of that."""
    from rich.console import Console
    from rich.progress import Progress

    bar = Progress(console=Console(stderr=True))
    task, start = bar.add_task("", total=total), time.perf_counter()

    def begin(description: str) -> Callable[[float], None]:
        """Say what comes next, and give what takes each share of it that is done."""
        bar.update(task, description=description)

        def advance(share: float) -> None:
            bar.advance(task, share)
            if visible and time.perf_counter() - start > 2:
                bar.start()

        return advance

    try:
        yield begin
    finally:
        if bar.live.is_started:
            bar.stop()
