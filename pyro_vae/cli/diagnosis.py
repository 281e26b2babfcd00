"""One page of what the checks of a run found, on the terminal and on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pyro_vae import plots, runs
from pyro_vae.diagnostics import Diagnosis, Refusal
from pyro_vae.files import replacing

__all__ = ["print_page", "write"]

MARKS = {True: "[green]holds[/]", False: "[red]does not[/]", None: "[yellow]cannot tell[/]"}


def print_page(diagnosis: Diagnosis, num_data: int) -> None:
    """Show what holds, what does not, and what to try."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"{num_data:,} test data", box=box.SIMPLE_HEAD, show_edge=False, title_justify="left")
    table.add_column("check", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("found, and what to try", overflow="fold")
    for name, verdict in diagnosis.verdicts.items():
        advice = f"\n[bold]try:[/] {escape(verdict.advice)}" if verdict.advice else ""
        table.add_row(name, MARKS[verdict.holds], escape(verdict.finding) + advice)
    console = Console()
    console.print(table)
    counts = [sum(v.holds is holds for v in diagnosis.verdicts.values()) for holds in MARKS]
    console.print("{} of {} checks hold, {} do not, {} cannot tell".format(counts[0], sum(counts), *counts[1:]))


def write(run: Path, diagnosis: Diagnosis, num_data: int, seed: int) -> None:
    """Write verdicts and numbers to `diagnostics.json`, beside those of other checks, and a figure of each."""
    path = run / runs.DIAGNOSTICS
    content = json.loads(path.read_text()) if path.is_file() else {}
    for name, result in diagnosis.results.items():
        found = result.verdict._asdict() | {"num_data": num_data, "seed": seed}
        content[name] = found | {"numbers": {} if isinstance(result, Refusal) else _numbers(result)}
        if not isinstance(result, Refusal):
            with replacing(run / runs.FIGURES / f"{name}.png") as temporary:
                getattr(plots, name)(result).savefig(temporary)
    runs.write_json(path, content)


def _numbers(result: Any) -> dict[str, Any]:
    """What of a result is a single number, or a few by name: fields and properties."""
    names = [name for name in dir(result) if not name.startswith("_") and not callable(getattr(result, name))]
    values = {name: getattr(result, name) for name in names}
    values = {name: value.item() if getattr(value, "numel", int)() == 1 else value for name, value in values.items()}
    return {name: value for name, value in values.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict | tuple):
        parts = value.values() if isinstance(value, dict) else value
        return bool(parts) and all(_is_plain(part) for part in parts)
    return isinstance(value, int | float)
