"""A pass of particles as one graph: what the log-likelihood of a data set takes thousands of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyro_vae.compilation.graphs import Graph, NotCompilableError, call_with
from pyro_vae.estimators.particles import LogProbabilities, log_probabilities, random_state
from pyro_vae.programs import Program

__all__ = ["CompiledLogProbabilities"]


class CompiledLogProbabilities:
    """`estimators.log_probabilities` of a program as one compiled graph: the same numbers from the same random numbers.

    Batches of another layout, other numbers of particles, and a program of which a layer is in another mode or a
    parameter was replaced, are run as they are, uncompiled.

    Args:
        program: The program, on the device and in the mode (`eval()`) that it is to run in.
        batch: An example of a batch.
        num_particles: Number `K` of particles.

    Raises:
        NotCompilableError: If what is computed depends on values of tensors, if there is no C++ compiler (on a CPU), or
            if the graph does not give what the program gives.

    Example:
        >>> import pyro_vae
        >>> vae, x = pyro_vae.build((8, 8), latent=2).eval(), torch.ones(5, 8, 8)
        >>> compiled = CompiledLogProbabilities(vae, [x], num_particles=3)
        >>> compiled(x, num_particles=3).likelihood.shape
        torch.Size([3, 5])
    """

    def __init__(self, program: Program, batch: Sequence[Tensor], num_particles: int):
        self.program, self.num_particles = program, num_particles
        pass_of = _Pass(program, num_particles)
        state = random_state(batch)
        try:
            self._graph = Graph(pass_of, lambda named, *tensors: list(call_with(pass_of, named, *tensors)), batch)
            self._compare(batch, state)
        finally:
            state.restore()

    def __call__(self, *batch: Tensor, num_particles: int) -> LogProbabilities:
        """Draw particles and give their log-probabilities; see `estimators.log_probabilities`."""
        if num_particles != self.num_particles or not self._graph.suits(*batch):
            return log_probabilities(self.program.model, self.program.guide, *batch, num_particles=num_particles)
        return LogProbabilities(*self._graph(*batch))

    def _compare(self, batch: Sequence[Tensor], state: random_state) -> None:
        state.restore()
        with torch.no_grad():
            expected = _Pass(self.program, self.num_particles)(*batch)
        state.restore()
        for name, ours, theirs in zip(LogProbabilities._fields, self._graph(*batch), expected, strict=True):
            # Rounding may turn a draw of a discrete latent over: that one is then another, and no reason to refuse.
            close = torch.isclose(ours, theirs, rtol=1e-3, atol=1e-3, equal_nan=True)
            if close.double().mean() < 0.99:
                raise NotCompilableError(f"the graph does not give the {name} that the program gives")


class _Pass(nn.Module):
    """A pass of particles as a module, whose parameters can be swapped."""

    def __init__(self, program: Program, num_particles: int):
        super().__init__()
        self.program, self.num_particles = program, num_particles

    def forward(self, *batch: Tensor) -> LogProbabilities:
        return log_probabilities(self.program.model, self.program.guide, *batch, num_particles=self.num_particles)
