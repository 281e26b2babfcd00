"""Program and estimator as one: the loss of a batch, its gradients, and the figures that a step reports."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import pyro
import torch
from pyro.infer import ELBO
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pyro_vae import handlers
from pyro_vae.estimators.gradients import loss_to_differentiate
from pyro_vae.programs import Program

__all__ = ["Objective"]


class Objective(nn.Module):
    """Program and estimator as one module, whose output is the loss to differentiate and what a step reports.

    Under `torch.autocast` what comes out of matrix products and convolutions is float32 again at once, so that all
    else, log-probabilities and their sums first of all, is computed in float32.

    Args:
        program: The program.
        estimator: Any `pyro.infer.ELBO`.

    Attributes:
        recorded: The sites of the last run.
        param_store: The program's own: some estimators keep state there, and none of it may reach Pyro's.

    Example:
        >>> import pyro_vae
        >>> from pyro.infer import Trace_ELBO
        >>> objective = Objective(pyro_vae.build((8, 8), latent=2), Trace_ELBO())
        >>> loss, figures = objective(0.5, torch.ones(3, 8, 8))
        >>> figures.shape
        torch.Size([3])
    """

    def __init__(self, program: Program, estimator: ELBO):
        super().__init__()
        self.program = program
        self.estimator: Any = estimator
        self.recorded = handlers.record()
        self.param_store: Any = {"params": {}, "constraints": {}}

    def forward(self, beta: float | Tensor, *batch: Tensor) -> tuple[Tensor, Tensor]:
        """The loss per datum, and loss, rate and distortion per datum as a tensor of shape `(3,)`, detached; in nats.

        The loss of an estimator that calls backward itself has no graph; see `loss_to_differentiate`.
        """
        programs = self.recorded.model(self.program.model), self.recorded.guide(self.program.guide)
        precision = _FloatOutputs() if torch.is_autocast_enabled(batch[0].device.type) else nullcontext()
        with pyro.get_param_store().scope(self.param_store), handlers.beta(beta), self.recorded, precision:
            loss = loss_to_differentiate(self.estimator, *programs, *batch) / self.recorded.num_data
            rate, distortion = self.recorded.rate.mean(), self.recorded.distortion.mean()
        return loss, torch.stack([loss.detach().to(rate), rate, distortion])

    def differentiate(
        self, loss: Tensor, parameters: Iterable[Tensor], backward: Callable[[Tensor], None] = Tensor.backward
    ) -> None:
        """Add the gradients of a loss that `forward` gave to those of the parameters that it was computed from."""
        if loss.requires_grad:
            backward(loss)
            return
        for parameter in parameters:  # the estimator has called backward on the sum
            if parameter.grad is not None:
                parameter.grad.div_(self.recorded.num_data)


class _FloatOutputs(TorchFunctionMode):
    """What autocast computes in half precision is float32 again before anything else is computed of it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if isinstance(output, Tensor) and output.dtype in (torch.bfloat16, torch.float16):
            return output.float()
        return output
