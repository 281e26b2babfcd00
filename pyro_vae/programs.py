"""Programs: modules with two Pyro programs, `model(*batch)` and `guide(*batch)`."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import pyro
import torch
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor, nn

from pyro_vae import posteriors, priors
from pyro_vae.distributions import as_pyro, describe, same_support

__all__ = [
    "VAE",
    "Program",
    "check_param_sites",
    "data_plate",
    "declare_parameters",
    "kept_buffers",
    "num_inputs",
    "observe",
    "placement",
    "undisturbed",
]


MANY = 2**31  # tensors of a batch, of a program that takes any number

Program: TypeAlias = Any
"""Any `nn.Module` with Pyro programs `model(*batch)` and `guide(*batch)`; Python's types have no word for it."""


class VAE(nn.Module):
    r"""A variational autoencoder: a prior, a likelihood and an amortized posterior.

    .. math:: p(x, z) = p(z)\, p(x \mid z), \qquad q(z \mid x) \approx p(z \mid x)

    Args:
        prior: A module whose `forward()` returns p(z). With a global latent of its own, which `forward` samples, it
            also has `guide()`, which samples that from its posterior.
        likelihood: A module whose `forward(z)` returns p(x given z); with an attribute `exposure` that is true, its
            `forward(z, exposure)`.
        posterior: A module whose `forward(x)` returns q(z given x).
        size: Number of data that a batch is a subsample of. A prior with a global latent needs it.

    Raises:
        ValueError: If the prior and the posterior are of different supports or sizes, with what would fit; or if `size`
            is missing.

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

    def __init__(self, prior: nn.Module, likelihood: nn.Module, posterior: nn.Module, size: int | None = None):
        super().__init__()
        _check_fit(prior, posterior)
        if size is None and hasattr(prior, "guide"):
            raise ValueError(
                f"VAE: {type(prior).__name__} has a global latent, and needs the number of data: size=len(train)"
            )
        self.prior: Any = prior
        self.likelihood = likelihood
        self.posterior = posterior
        self.size = size

    @property
    def num_inputs(self) -> int:
        """How many tensors of a batch the program takes: x, and perhaps an exposure."""
        return 2 if getattr(self.likelihood, "exposure", False) else 1

    def model(self, x: Tensor, *exposure: Tensor) -> None:
        """The joint density p(z) p(x given z)."""
        declare_parameters(self)
        prior = as_pyro(self.prior())  # outside the plate, as a global latent of the prior is
        with data_plate(x, self.size):
            z = pyro.sample("z", prior)
            observe(self.likelihood(z, *exposure), x)

    def guide(self, x: Tensor, *exposure: Tensor) -> None:
        """The posterior q(z given x)."""
        declare_parameters(self)
        if hasattr(self.prior, "guide"):
            self.prior.guide()
        with data_plate(x, self.size):
            pyro.sample("z", as_pyro(self.posterior(x)))


def data_plate(x: Tensor, size: int | None = None) -> Any:
    """The plate "data" of a batch: by itself, or as a subsample of `size` data.

    Example:
        >>> import torch
        >>> data_plate(torch.zeros(5, 2), size=1000).size
        1000
    """
    if size is None or size <= len(x):  # more data than it was trained on are no subsample
        return pyro.plate("data", len(x), dim=-1)
    # With the indices given, Pyro draws none.
    return pyro.plate("data", size, subsample=torch.arange(len(x), device=x.device), dim=-1)


def observe(likelihood: Any, x: Tensor) -> None:
    """Observe `x`: as the site "x", or, of a likelihood of named parts, as one site "x.<part>" a part.

    Args:
        likelihood: A distribution over `x`, or one with `split(x)`, which gives names, distributions and values.
        x: The data.

    Example:
        >>> import torch
        >>> import pyro.distributions as dist
        >>> from pyro import poutine
        >>> x = torch.zeros(3)
        >>> list(poutine.trace(observe).get_trace(dist.Normal(x, 1.0).to_event(1), x).observation_nodes)
        ['x']
    """
    parts = likelihood.split(x) if hasattr(likelihood, "split") else [(None, likelihood, x)]
    for name, distribution, value in parts:
        pyro.sample("x" if name is None else f"x.{name}", as_pyro(distribution), obs=value)


def _check_fit(prior: nn.Module, posterior: nn.Module) -> None:
    """Raise unless prior and posterior, as far as they tell, are distributions over the same thing."""
    over, approximated = getattr(prior, "support", None), getattr(posterior, "support", None)
    names = type(prior).__name__, type(posterior).__name__
    if over is not None and approximated is not None and not same_support(over, approximated):
        raise ValueError(
            f"VAE: expected a prior and a posterior of one support, got {names[0]} over {describe(over)} and "
            f"{names[1]} over {describe(approximated)}; with {names[0]} fit the posteriors "
            f"{_of_support(posteriors, over)}, with {names[1]} the priors {_of_support(priors, approximated)}"
        )
    sizes = getattr(prior, "latent", None), getattr(posterior, "latent", None)
    if None not in sizes and sizes[0] != sizes[1]:
        raise ValueError(
            f"VAE: expected a prior and a posterior of one size, "
            f"got {names[0]} of {sizes[0]} and {names[1]} of {sizes[1]} latent dimensions"
        )
    classes = getattr(prior, "classes", None), getattr(posterior, "classes", None)
    if None not in classes and classes[0] != classes[1]:
        raise ValueError(
            f"VAE: expected groups of as many classes, got {classes[0]} in the prior, {classes[1]} in the posterior"
        )


def _of_support(module: Any, support: Any) -> str:
    """Names of the components with this support, and of those that take another component's."""
    found = [
        name
        for name in module.__all__
        for own in [getattr(getattr(module, name), "support", None)]
        if isinstance(own, property) or (own is not None and same_support(own, support))
    ]
    own = [name for name in sorted(found) if not isinstance(getattr(module, name).support, property)]
    return ", ".join(own + [name for name in sorted(found) if name not in own])  # those that take another's come last


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


def check_param_sites(program: Program, params: Mapping[str, Tensor]) -> None:
    """Make sure that what a program has put into the param store are parameters of its own.

    Args:
        program: The program.
        params: What the store holds after a run of it, by name.

    Raises:
        ValueError: If another is there, which neither training nor evaluation would know of.

    Example:
        >>> check_param_sites(nn.Linear(2, 1), {"scale": torch.ones(())})
        Traceback (most recent call last):
        ...
        ValueError: param site 'scale' is no (contiguous) parameter of Linear and would be neither trained nor kept: make it an attribute, an nn.Parameter or a PyroParam
    """  # noqa: E501
    own = {id(parameter) for parameter in program.parameters()}
    for name, parameter in params.items():
        if id(parameter) not in own and not name.startswith("__"):  # baselines that estimators keep
            raise ValueError(
                f"param site {name!r} is no (contiguous) parameter of {type(program).__name__} and would be neither "
                "trained nor kept: make it an attribute, an nn.Parameter or a PyroParam"
            )


def num_inputs(program: Program) -> int:
    """How many tensors of a batch the program takes: what it says, or the arguments that its `model` must be given.

    Example:
        >>> import pyro_vae
        >>> num_inputs(pyro_vae.build((8, 8), latent=2))
        1
    """
    if hasattr(program, "num_inputs"):
        return program.num_inputs
    parameters = inspect.signature(program.model).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return MANY
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


@contextmanager
def kept_buffers(module: nn.Module) -> Iterator[None]:
    """Leave buffers, such as running statistics that a layer in training mode changes, as they were.

    Args:
        module: The module.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> with kept_buffers(norm):
        ...     _ = norm(torch.ones(3, 2))
        >>> norm.running_mean
        tensor([0., 0.])
    """
    slots = [(each._buffers, dict(each._buffers)) for each in module.modules()]
    values = {buffer: buffer.clone() for buffer in module.buffers()}
    try:
        yield
    finally:
        for held, before in slots:
            held.clear()
            held.update(before)
        with torch.no_grad():
            for buffer, value in values.items():
                buffer.copy_(value)
