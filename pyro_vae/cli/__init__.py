"""The command `pyro-vae`: fit a program to a data set, evaluate it, draw from it."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

from pyro_vae.cli.commands import app
from pyro_vae.cli.configuration import expanded
from pyro_vae.training.processes import told_elsewhere

__all__ = ["app", "main"]


def main(arguments: list[str] | None = None) -> None:
    """Run the command; errors that the user can mend are one line on stderr and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    sys.path.append(str(Path.cwd()))  # where the user's own components are
    arguments = arguments or ["--help"]
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            sys.exit(app(expanded(arguments), prog_name="pyro-vae", standalone_mode=False))
        except Exception as error:
            if "--debug" in arguments:
                raise
            if told_elsewhere(error):
                sys.exit(2)
            usage = getattr(error, "format_message", None)  # what typer raises for wrong usage
            lines = (usage() if usage else str(error)).splitlines() or [""]
            expected = usage or isinstance(error, ValueError | OSError | FloatingPointError)
            kind = "" if expected else f"{type(error).__name__} (--debug shows where): "
            print(f"pyro-vae: error: {kind}{' '.join(lines[0].split())}", file=sys.stderr)
            sys.exit(2)


def _show_warning(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    if issubclass(category, UserWarning):
        print(f"pyro-vae: warning: {message}", file=sys.stderr)
