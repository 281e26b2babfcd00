"""Contestants that take turns, and what comes of it."""

import dataclasses
import importlib.metadata
import math
import os
import platform
import statistics
import time
from pathlib import Path

import torch
from rich.table import Table as Printed

FLAGS = ("amx", "avx512", "avx2", "avx_vnni", "fma")  # of a processor that multiplies matrices
LIBRARIES = ("torch", "pyro-ppl", "pyro-vae", "numpy", "lightning-fabric", "numpyro", "jax", "jaxlib", "pythae")
AGREEMENT = 0.1  # of losses, relative: those of two seeds differ by 8 % after 200 steps, by 3 % after 1,000


@dataclasses.dataclass
class Row:
    """One line of a table.

    Attributes:
        name: The contestant.
        values: One a round.
        first: The first turn, which is not counted, in seconds: it compiles, allocates and warms up.
        loss: Loss of the last turn, in nats per datum, NaN where there is none.
        ratio: What is compared with the target.
        target: In words.
        met: Whether it is met; None without one.
    """

    name: str
    values: list[float]
    first: float = math.nan
    loss: float = math.nan
    ratio: float | None = None
    target: str = ""
    met: bool | None = None

    @property
    def median(self):
        """What stands for all rounds."""
        return statistics.median(self.values)

    def compare(self, ratio, target, met):
        """Say how it compares."""
        self.ratio, self.target, self.met = ratio, target, met


@dataclasses.dataclass
class Table:
    """A table of what was measured in one unit, with a line on how."""

    title: str
    unit: str
    rows: list[Row]
    note: str = ""

    def record(self):
        """All of it as plain data."""
        rows = [{**dataclasses.asdict(row), "median": row.median, "least": min(row.values)} for row in self.rows]
        return {**dataclasses.asdict(self), "rows": rows}

    def printed(self):
        """All of it but single rounds, for the terminal."""
        printed = Printed(title=f"{self.title}, {self.unit}", caption=self.note or None)
        printed.add_column("")
        for column in ("median", "least", "first turn (s)", "loss", "ratio", "target", "met"):
            printed.add_column(column, justify="right")
        for row in self.rows:
            met = {True: "yes", False: "no", None: ""}[row.met]
            ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
            figures = (row.median, min(row.values), row.first, row.loss)
            printed.add_row(row.name, *("" if math.isnan(f) else f"{f:.2f}" for f in figures), ratio, row.target, met)
        return printed


def timed(run):
    """A turn of a function that gives a loss: the seconds that it took, and the loss."""

    def turn():
        start = time.perf_counter()
        loss = run()
        return time.perf_counter() - start, loss

    return turn


def alternate(turns, rounds, scale=1.0, warm_up=True):
    """A row for each contestant: in each round all take a turn, each round another one first.

    Args:
        turns: A function for each name, which gives what it measured, and a loss.
        rounds: Number of rounds.
        scale: What values are multiplied by.
        warm_up: Whether a turn that is not counted comes before the rounds.
    """
    first = {name: turn()[0] if warm_up else math.nan for name, turn in turns.items()}
    rows = {name: Row(name, [], first[name]) for name in turns}
    names = list(turns)
    for index in range(rounds):
        begin = index % max(len(names), 1)
        for name in names[begin:] + names[:begin]:
            value, rows[name].loss = turns[name]()
            rows[name].values.append(value * scale)
    return list(rows.values())


def disagreeing(rows, subject):
    """Names of those whose loss is not the subject's, but for what two seeds differ by."""
    expected = next((row.loss for row in rows if row.name == subject), math.nan)
    return [row.name for row in rows if abs(row.loss - expected) > AGREEMENT * abs(expected)]


def machine():
    """What the figures depend on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    entries = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return {
        "processor": entries.get("model name", platform.processor()),
        "flags": [flag for flag in entries.get("flags", "").split() if flag.startswith(FLAGS)],
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in LIBRARIES},
    }


def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
