"""Programs: modules with two Pyro programs, `model(*batch)` and `guide(*batch)`."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import pyro
import torch
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor, nn

__all__ = ["VAE", "Program", "declare_parameters", "num_inputs", "placement", "undisturbed"]


Program: TypeAlias = Any
"""Any `nn.Module` with Pyro programs `model(*batch)` and `guide(*batch)`; Python's types have no word for it."""


class VAE(nn.Module):
    r"""A variational autoencoder: a prior, a likelihood and an amortized posterior.

    .. math:: p(x, z) = p(z)\, p(x \mid z), \qquad q(z \mid x) \approx p(z \mid x)

    Args:
        prior: A module whose `forward()` returns p(z).
        likelihood: A module whose `forward(z)` returns p(x given z).
        posterior: A module whose `forward(x)` returns q(z given x).

    Reference:
        Kingma and Welling, 2014. Auto-encoding variational Bayes.

    Example:
        >>> import torch
        >>> from pyro.infer import Trace_ELBO
        >>> from pyro_vae import likelihoods, networks, posteriors, priors
        >>> vae = VAE(
        ...     prior=priors.StandardNormal(2),
        ...     likelihood=likelihoods.Bernoulli(networks.MLP(2, 64, hidden=(16,)), (8, 8)),
        ...     posterior=posteriors.DiagonalNormal(networks.MLP(64, 2 * 2, hidden=(16,)), 2),
        ... )
        >>> loss = Trace_ELBO().differentiable_loss(vae.model, vae.guide, torch.ones(3, 8, 8))
    """

    def __init__(self, prior: nn.Module, likelihood: nn.Module, posterior: nn.Module):
        super().__init__()
        self.prior = prior
        self.likelihood = likelihood
        self.posterior = posterior

    def model(self, x: Tensor) -> None:
        """The joint density p(z) p(x given z)."""
        declare_parameters(self)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", self.prior())
            pyro.sample("x", self.likelihood(z), obs=x)

    def guide(self, x: Tensor) -> None:
        """The posterior q(z given x)."""
        declare_parameters(self)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", self.posterior(x))


def declare_parameters(module: nn.Module) -> None:
    """Declare the parameters of `module` to a handler that collects them, as `pyro.infer.SVI` does.

    It is `pyro.module` with two differences. Names carry the parameter's identity, so that two modules never share
    an entry of the param store (which keeps the parameter alive, hence its identity its own). And where nobody
    collects parameters, nothing is left in the store.

    Args:
        module: The module to declare, at the start of a model or guide.

    Example:
        >>> from pyro import poutine
        >>> with poutine.trace(param_only=True) as collected:
        ...     declare_parameters(nn.Linear(2, 1))
        >>> [name.split("@")[0] for name in collected.trace.nodes]
        ['Linear.weight', 'Linear.bias']
    """
    if any(getattr(handler, "param_only", False) for handler in _PYRO_STACK):
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                pyro.param(f"{type(module).__name__}.{name}@{id(parameter):x}", parameter)


def num_inputs(program: Program) -> int:
    """How many tensors of a batch the program takes: the arguments that its `model` must be given.

    Example:
        >>> import pyro_vae
        >>> num_inputs(pyro_vae.build((8, 8), latent=2))
        1
    """
    parameters = inspect.signature(program.model).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return 2**31
    return sum(p.default is p.empty and p.kind is not p.VAR_KEYWORD for p in parameters)


def placement(program: Program) -> tuple[torch.device, torch.dtype]:
    """Device and floating dtype of the program's first parameter (or buffer), which its data must share.

    Example:
        >>> placement(nn.Linear(2, 1).double())
        (device(type='cpu'), torch.float64)
    """
    for tensor in (*program.parameters(), *program.buffers()):
        if tensor.is_floating_point():
            return tensor.device, tensor.dtype
    return torch.device("cpu"), torch.get_default_dtype()


@contextmanager
def undisturbed(program: Program, seed: int | None = None) -> Iterator[None]:
    """Run the program in eval mode without gradients, and leave modes, RNG state and param store as they were.

    Args:
        program: The program.
        seed: Seed of the random numbers inside; None goes on from the current state.

    Example:
        >>> net = nn.Dropout()
        >>> with undisturbed(net, seed=0):
        ...     net.training
        False
        >>> net.training
        True
    """
    device, _ = placement(program)
    modes = [(module, module.training) for module in program.modules()]
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        stack.enter_context(pyro.get_param_store().scope())
        if seed is not None:
            torch.manual_seed(seed)
        program.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
