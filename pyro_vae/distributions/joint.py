"""A joint distribution of independent, named parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

__all__ = ["Joint"]


class Joint(dist.TorchDistribution):
    r"""Independent parts with a name each, side by side on the last axis, such as the columns of a table.

    .. math:: \log p(x) = \sum_i \log p_i(x_{(i)}), \quad x = (x_{(1)}, x_{(2)}, \dots)

    The parts may be of any kinds, discrete and continuous ones together: a sample then holds the discrete values as
    floats. Where a part has no mean, such as one of nominal categories, `mean` is NaN there, or raises
    `NotImplementedError`, as the part's does.

    Args:
        parts: Distributions by name, each of event shape `(width,)`; their batch shapes broadcast.

    Raises:
        ValueError: If there are no parts, or one is of another event shape.

    Example:
        >>> parts = {"age": dist.Normal(torch.zeros(5, 1), 1.0), "sex": dist.Categorical(logits=torch.zeros(5, 1, 2))}
        >>> joint = Joint({name: part.to_event(1) for name, part in parts.items()})
        >>> joint.batch_shape, joint.event_shape
        (torch.Size([5]), torch.Size([2]))
        >>> [(name, tuple(value.shape)) for name, part, value in joint.split(joint.sample())]
        [('age', (5, 1)), ('sex', (5, 1))]
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012, the parts check theirs

    def __init__(self, parts: Mapping[str, dist.TorchDistribution], validate_args: bool | None = None):
        for name, part in parts.items():
            if len(part.event_shape) != 1:
                raise ValueError(f"part {name!r}: expected an event shape (width,), got {tuple(part.event_shape)}")
        if not parts:
            raise ValueError("parts: expected at least one, got none")
        batch_shape = torch.broadcast_shapes(*(part.batch_shape for part in parts.values()))
        self.parts = {
            name: part if part.batch_shape == batch_shape else part.expand(batch_shape) for name, part in parts.items()
        }
        self._widths = [part.event_shape[0] for part in parts.values()]
        super().__init__(batch_shape, torch.Size([sum(self._widths)]), validate_args=validate_args)

    def split(self, value: Tensor) -> Iterator[tuple[str, dist.TorchDistribution, Tensor]]:
        """The parts with their names, and their values in `value`, as a model needs them that has a site for each.

        Args:
            value: Tensor of shape `(*, *event_shape)`.

        Raises:
            ValueError: If it is of another shape.
        """
        if value.shape[-1:] != self.event_shape:
            raise ValueError(f"Joint: expected values of shape (*, {self.event_shape[0]}), got {tuple(value.shape)}")
        yield from zip(self.parts, self.parts.values(), value.split(self._widths, -1), strict=True)

    def log_prob(self, value: Tensor) -> Tensor:
        """The sum of the parts' log-probabilities."""
        return torch.stack([part.log_prob(own) for _, part, own in self.split(value)]).sum(0)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """A sample, of shape `(*sample_shape, *batch_shape, *event_shape)`."""
        with torch.no_grad():
            values = torch.cat([part.sample(torch.Size(sample_shape)) for part in self.parts.values()], -1)
        # Beside floats integers become floats; where all are integers, the dtype of the parameters is that of the mean.
        return values if values.is_floating_point() else values.to(self.mean.dtype)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """A sample with gradients, if all parts have such."""
        return torch.cat([part.rsample(torch.Size(sample_shape)) for part in self.parts.values()], -1)

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """Whether all parts have samples with gradients."""
        return all(part.has_rsample for part in self.parts.values())

    @property
    def mean(self) -> Tensor:
        """The parts' means."""
        return torch.cat([part.mean for part in self.parts.values()], -1)

    @property
    def support(self) -> constraints.Constraint:
        """The parts' supports."""
        return _Parts([part.support for part in self.parts.values()], self._widths)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Joint:
        """The same distribution, expanded to another batch shape."""
        return Joint({name: part.expand(torch.Size(batch_shape)) for name, part in self.parts.items()})


class _Parts(constraints.Constraint):
    """Constraints of consecutive parts of the last axis; those of `constraints.cat` may not be of whole events."""

    event_dim = 1

    def __init__(self, parts: Sequence[Any], widths: Sequence[int]):
        super().__init__()
        self.parts = parts
        self.widths = widths
        self.is_discrete = any(part.is_discrete for part in parts)

    def check(self, value: Tensor) -> Tensor:
        values = value.split(self.widths, -1)
        return torch.stack([part.check(own) for part, own in zip(self.parts, values, strict=True)], -1).all(-1)

    def __repr__(self) -> str:
        return f"Parts({', '.join(map(repr, self.parts))})"
