"""What is run many times as one graph each: a training step, and a pass of particles."""

from pyro_vae.compilation.graphs import Decision, NotCompilableError, check_compile
from pyro_vae.compilation.particles import CompiledLogProbabilities
from pyro_vae.compilation.steps import CompiledStep, annealed, compile_step

__all__ = [
    "CompiledLogProbabilities",
    "CompiledStep",
    "Decision",
    "NotCompilableError",
    "annealed",
    "check_compile",
    "compile_step",
]
