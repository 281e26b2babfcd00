"""Groups of one-hot vectors, exact and relaxed."""

from __future__ import annotations

import itertools
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Size, Tensor
from torch.distributions import constraints
from torch.distributions.relaxed_categorical import ExpRelaxedCategorical

from pyro_vae.distributions.supports import OneHotGroups, simplices

__all__ = ["OneHotCategoricalGroups", "RelaxedOneHotCategoricalGroups", "check_temperature"]


def check_temperature(temperature: float) -> None:
    """Raise a `ValueError` if a relaxed class's share would underflow float32 at this temperature.

    Example:
        >>> check_temperature(0.5)
    """
    if not temperature >= 1 / 3:
        raise ValueError(f"RelaxedOneHotCategorical: expected temperature >= 1/3, got {temperature}")


class _Groups(TorchDistribution):
    """Independent groups of classes, side by side in one vector."""

    arg_constraints = {"logits": constraints.independent(constraints.real, 2)}  # noqa: RUF012

    def __init__(self, logits: Tensor, validate_args: bool | None = None):
        self.logits = logits
        groups, classes = logits.shape[-2:]
        super().__init__(logits.shape[:-2], Size((groups * classes,)), validate_args=validate_args)

    def _split(self, value: Tensor) -> Tensor:
        return value.unflatten(-1, self.logits.shape[-2:])

    def _expanded(self, new: Any, batch_shape: Any) -> Any:
        new.logits = self.logits.expand(*batch_shape, *self.logits.shape[-2:])
        TorchDistribution.__init__(new, Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new


class OneHotCategoricalGroups(_Groups):
    r"""Independent groups of one-hot vectors, side by side in one vector.

    .. math:: p(z) = \prod_g \prod_c \pi_{gc}^{z_{gc}}, \quad \pi_g = \operatorname{softmax}(l_g)

    Args:
        logits: Tensor `l` of shape `(*batch, groups, classes)`.

    Example:
        >>> OneHotCategoricalGroups(torch.zeros(3, 4)).enumerate_support().shape
        torch.Size([64, 12])
    """

    has_enumerate_support = True

    @property
    def support(self) -> Any:
        """Groups of one-hot vectors."""
        return OneHotGroups(self.logits.shape[-1])

    @property
    def mean(self) -> Tensor:
        """The probabilities."""
        return self.logits.softmax(-1).flatten(-2)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw."""
        return dist.OneHotCategorical(logits=self.logits).sample(Size(sample_shape)).flatten(-2)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability."""
        if self._validate_args:
            self._validate_sample(value)
        return (self._split(value) * self.logits.log_softmax(-1)).sum((-2, -1))

    def expand(self, batch_shape: Any, _instance: Any = None) -> OneHotCategoricalGroups:
        """The same distribution over a larger batch."""
        return self._expanded(self._get_checked_instance(OneHotCategoricalGroups, _instance), batch_shape)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """All values, `classes ** groups` of them."""
        groups, classes = self.logits.shape[-2:]
        indices = torch.tensor(list(itertools.product(range(classes), repeat=groups)), device=self.logits.device)
        values = torch.nn.functional.one_hot(indices, classes).to(self.logits.dtype).flatten(-2)
        values = values.reshape(-1, *[1] * len(self.batch_shape), groups * classes)
        return values.expand(-1, *self.batch_shape, -1) if expand else values


class RelaxedOneHotCategoricalGroups(_Groups):
    r"""Independent groups of relaxed one-hot vectors (Concrete, Gumbel-softmax), side by side in one vector.

    .. math:: z_g = \operatorname{softmax}((l_g + \gamma_g) / T), \quad \gamma_{gc} \sim \text{Gumbel}(0, 1)

    Values are kept above zero, where the density is infinite: at temperatures below a third, or with logits further
    apart than 14, some underflow float32, and densities of what was drawn are then wrong.

    Args:
        logits: Tensor `l` of shape `(*batch, groups, classes)`.
        temperature: The temperature `T`, a scalar.

    Reference:
        Maddison, Mnih and Teh, 2017. The Concrete distribution. Jang, Gu and Poole, 2017. Categorical
        reparameterization with Gumbel-softmax.

    Example:
        >>> RelaxedOneHotCategoricalGroups(torch.zeros(3, 4), torch.tensor(0.5)).rsample((5,)).shape
        torch.Size([5, 12])
    """

    has_rsample = True
    support = simplices

    def __init__(self, logits: Tensor, temperature: Tensor, validate_args: bool | None = None):
        self.temperature = temperature
        super().__init__(logits, validate_args)

    def _log_base(self) -> ExpRelaxedCategorical:
        """The distribution of log z."""
        return ExpRelaxedCategorical(self.temperature, logits=self.logits, validate_args=False)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw, with a gradient to the logits."""
        return (
            self._log_base()
            .rsample(Size(sample_shape))
            .exp()
            .clamp(min=torch.finfo(self.logits.dtype).tiny)
            .flatten(-2)
        )

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density with respect to the groups' simplices."""
        if self._validate_args:
            self._validate_sample(value)
        log_value = self._split(value).log()
        return (self._log_base().log_prob(log_value) - log_value.sum(-1)).sum(-1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> RelaxedOneHotCategoricalGroups:
        """The same distribution over a larger batch."""
        new = self._get_checked_instance(RelaxedOneHotCategoricalGroups, _instance)
        new.temperature = self.temperature
        return self._expanded(new, batch_shape)
