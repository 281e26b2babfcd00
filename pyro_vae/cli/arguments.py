"""Arguments that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["NUM_PARTICLES", "Debug", "Device", "NumParticles", "Run", "Trust", "option"]


def option(text: str, *names: str) -> Any:
    """An option with a help text, and names other than that of its parameter."""
    return typer.Option(*names, help=text)


Run = Annotated[Path, typer.Argument(help="Run directory.")]
Device = Annotated[str, option("auto, cpu, cuda, cuda:1 or mps.")]
Trust = Annotated[bool, option("Import classes outside pyro_vae that a file names; that runs their code.", "--trust")]
Debug = Annotated[bool, option("Show the traceback of an error.", "--debug")]
NUM_PARTICLES = 5000  # where none are given
NumParticles = Annotated[int, option("Particles a datum of the log-likelihood.")]
