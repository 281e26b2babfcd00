"""Likelihoods of tables whose columns are of different kinds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae.distributions.joint import Joint
from pyro_vae.networks import flat_output_bias, split_parameters

__all__ = ["Heterogeneous"]


class Heterogeneous(nn.Module):
    r"""Tables of mixed columns: a likelihood of its own for each column, or group of columns, from one network.

    .. math:: p(x \mid z) = \prod_i p_i(x_{(i)} \mid \theta_i(z)), \quad (\theta_1, \theta_2, \dots)(z) = f(z)

    A likelihood is given as what makes it, a class or a `functools.partial` of one, and is made with the `event_shape`
    of its group and no network of its own: each takes its share of the outputs of `net`, in the order of `parts`.

    Args:
        net: A network :math:`f` from `(*, latent)` to `num_outputs` outputs in any layout.
        parts: What makes the likelihood, by column name, or by a tuple of names for a group of columns.

    Attributes:
        columns: Names of the columns, in order.
        event_shape: `(number of columns,)`.
        num_outputs: How many outputs the network must have.
        support: Support of each part, by the part's name: the column's, or those of the group joined by `_`.

    Returns:
        From `forward(z)` with `z` of shape `(*, latent)`, a `Joint` of batch shape `(*)`.

    Raises:
        ValueError: If a name is not text or comes twice, or a part is no class or partial, or has an exposure; from
            `forward`, if the network's output is of another size.

    Reference:
        Nazabal, Olmos, Ghahramani and Valera, 2020. Handling incomplete heterogeneous data using VAEs.

    Example:
        >>> from functools import partial
        >>> from pyro_vae import likelihoods, networks
        >>> parts = {("height", "weight"): likelihoods.Gaussian, "sex": partial(likelihoods.Categorical, num_classes=2)}
        >>> table = Heterogeneous(networks.MLP(3, 2 * 2 + 2), parts)
        >>> table.columns
        ('height', 'weight', 'sex')
        >>> table(torch.zeros(5, 3)).sample().shape
        torch.Size([5, 3])
        >>> list(table(torch.zeros(5, 3)).parts)
        ['height_weight', 'sex']
    """

    def __init__(self, net: nn.Module, parts: Mapping[str | tuple[str, ...], Callable[..., nn.Module]]):
        super().__init__()
        _check(parts)
        self.net = net
        self.parts = dict(parts)
        # A list, since names of columns may have dots, which those of modules may not.
        self.likelihoods = nn.ModuleList(
            make(net=nn.Identity(), event_shape=(len(_names(key)),)) for key, make in self.parts.items()
        )
        if any(getattr(likelihood, "exposure", False) for likelihood in self.likelihoods):
            raise ValueError("parts: expected no exposure, which a table has no place for, got exposure=True")

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns, in order."""
        return tuple(name for key in self.parts for name in _names(key))

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one datum."""
        return (len(self.columns),)

    @property
    def num_outputs(self) -> int:
        """How many outputs the network must have."""
        return sum(self._sizes)

    @property
    def support(self) -> dict[str, Any]:
        """Each part, by the part's name."""
        return {name: likelihood.support for name, likelihood in self._named()}

    def forward(self, z: Tensor) -> Joint:
        """The likelihood p(x given z)."""
        leading = z.shape[:-1]
        (outputs,) = split_parameters(self.net(z), leading, 1, (self.num_outputs,))
        shares = outputs.split(self._sizes, -1)
        return Joint({n: part.from_outputs(own, leading) for (n, part), own in zip(self._named(), shares, strict=True)})

    def start_at(self, mean: Tensor) -> None:
        """Set the network's output bias so that each part which can starts from the data's mean, `(columns,)`.

        Parts without a mean, such as those of nominal categories, start from outputs of zero.

        Raises:
            ValueError: If the network has no `output_bias` of the size of its outputs.
        """
        bias = flat_output_bias(self.net, self.num_outputs)
        widths = [len(_names(key)) for key in self.parts]
        starts = zip(self.likelihoods, mean.to(bias).split(widths), self._sizes, strict=True)
        bias.copy_(torch.cat([_start(*start) for start in starts]))

    @property
    def _sizes(self) -> list[int]:
        return [likelihood.num_outputs for likelihood in self.likelihoods]  # type: ignore[misc]

    def _named(self) -> list[tuple[str, Any]]:
        return [("_".join(_names(key)), part) for key, part in zip(self.parts, self.likelihoods, strict=True)]

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return f"columns={self.columns}"


def _names(key: str | tuple[str, ...]) -> tuple[str, ...]:
    return (key,) if isinstance(key, str) else key


def _start(likelihood: Any, mean: Tensor, num_outputs: int) -> Tensor:
    """The outputs from which a part starts: its first parameter at the mean if it has one, and the others zero."""
    outputs = mean.new_zeros(num_outputs)
    if hasattr(likelihood, "first_parameter"):
        first = likelihood.first_parameter(mean).reshape(-1)
        outputs[: first.numel()] = first
    return outputs


def _check(parts: Mapping[Any, Any]) -> None:
    for key, make in parts.items():
        names = _names(key)
        if not isinstance(names, tuple) or not names or not all(isinstance(name, str) for name in names):
            raise ValueError(f"parts: expected the name of a column, or a tuple of names, got {key!r}")
        if not callable(make) or isinstance(make, nn.Module):
            raise ValueError(f"part {key!r}: expected a likelihood's class or functools.partial, got {make!r}")
    columns = [name for key in parts for name in _names(key)]
    for each in (columns, ["_".join(_names(key)) for key in parts]):
        if twice := sorted({name for name in each if each.count(name) > 1}):
            raise ValueError(f"parts: expected each name once, got {', '.join(twice)} twice")
    if not columns:
        raise ValueError("parts: expected at least one column, got none")
