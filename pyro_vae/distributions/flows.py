"""Zuko's distributions as Pyro's."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from pyro.contrib.zuko import ZukoToPyro
from pyro.distributions import Distribution
from torch import Tensor
from torch.distributions import Distribution as TorchDistribution
from torch.distributions import constraints

__all__ = ["FlowDistribution", "as_pyro", "import_zuko"]


@functools.cache
def import_zuko() -> ModuleType:
    """The package zuko, imported without a change to `torch.distributions`.

    On import zuko turns the validation of every distribution off, and gives every distribution empty argument
    constraints. Both are put back, and the constraints given to zuko's own distributions alone.

    Example:
        >>> validated = torch.distributions.Distribution._validate_args
        >>> import_zuko().__name__
        'zuko'
        >>> torch.distributions.Distribution._validate_args == validated
        True
    """
    names = ("_validate_args", "arg_constraints")
    before = {name: vars(TorchDistribution)[name] for name in names}
    import zuko

    for name, value in before.items():
        setattr(TorchDistribution, name, value)
    for own in vars(zuko.distributions).values():
        if isinstance(own, type) and own.__module__ == zuko.distributions.__name__:
            own.arg_constraints, own._validate_args = {}, False  # type: ignore[attr-defined]
    return zuko


class FlowDistribution(ZukoToPyro):
    """A distribution of zuko over real vectors as one of Pyro: what Pyro's own wrapper lacks is added.

    A sample is scored as it is drawn, and its density kept: an inverse autoregressive flow, slow to score, is then as
    fast as any.

    Args:
        dist: A distribution of zuko, or any of `torch.distributions`, over real vectors.

    Reference:
        Rozet et al., 2022. Zuko: normalizing flows in PyTorch.

    Example:
        >>> flow = FlowDistribution(import_zuko().flows.MAF(3)())
        >>> flow.log_prob(flow.sample((5,))).shape
        torch.Size([5])
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 (as torch has it)
    _validate_args = False

    @property
    def support(self) -> Any:
        """The distribution's own, or real vectors where it does not say."""
        try:
            return self.dist.support
        except NotImplementedError:
            return constraints.real_vector

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw, with a gradient to the parameters."""
        return self(torch.Size(sample_shape))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw."""
        with torch.no_grad():
            return self.dist.sample(torch.Size(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density: what was kept of the draw, except where a gradient is wanted and it has none."""
        kept = self.cache.get(value)
        if kept is not None and (kept.requires_grad or not torch.is_grad_enabled()):
            return kept
        return self.dist.log_prob(value)

    def expand(self, batch_shape: Any, _instance: Any = None) -> FlowDistribution:
        """The same distribution over a larger batch."""
        return FlowDistribution(self.dist.expand(torch.Size(batch_shape)))


def as_pyro(distribution: Any) -> Any:
    """A distribution as Pyro wants it: its own pass, those of zuko and torch are wrapped.

    Raises:
        ValueError: If it is no distribution.

    Example:
        >>> type(as_pyro(torch.distributions.Normal(torch.zeros(3), 1.0))).__name__
        'FlowDistribution'
    """
    if isinstance(distribution, Distribution):
        return distribution
    if not isinstance(distribution, TorchDistribution):
        raise ValueError(f"expected a component that returns a distribution, got {type(distribution).__name__}")
    return FlowDistribution(distribution)
