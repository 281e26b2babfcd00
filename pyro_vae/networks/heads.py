"""From a network's output to the parameters of a distribution: the split, and the bounded maps of every component."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["at_least_float32", "flat_output_bias", "positive", "scale", "split_parameters"]


def split_parameters(
    output: Tensor, leading: Sequence[int], num_params: int, shape: Sequence[int]
) -> tuple[Tensor, ...]:
    """Split a network's output into the `num_params` parameters of a distribution, each `(*leading, *shape)`.

    Args:
        output: The network's output, `(*leading, ...)` with `num_params * prod(shape)` values behind `leading`.
        leading: Leading shape of the network's input.
        num_params: How many parameters the distribution has.
        shape: Event shape of the distribution.

    Raises:
        ValueError: If the output is of another size.

    Example:
        >>> loc, log_variance = split_parameters(torch.zeros(5, 40), (5,), 2, (20,))
        >>> loc.shape
        torch.Size([5, 20])
    """
    leading, shape = tuple(leading), tuple(shape)
    wanted = num_params * math.prod(shape)
    if output.shape[: len(leading)] != leading or output.numel() != math.prod(leading) * wanted:
        raise ValueError(
            f"network output: expected {wanted} values ({num_params} x {shape}) behind the leading shape {leading}, "
            f"got shape {tuple(output.shape)}"
        )
    return at_least_float32(output).reshape(*leading, num_params, *shape).unbind(len(leading))


def at_least_float32(outputs: Tensor) -> Tensor:
    """A network's outputs in float32 or better: under mixed precision densities would have three digits otherwise.

    Example:
        >>> at_least_float32(torch.zeros(1, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return outputs.float() if outputs.dtype in (torch.float16, torch.bfloat16) else outputs


def flat_output_bias(net: nn.Module, num_outputs: int) -> Tensor:
    """The network's output bias as a flat view, to be set in place.

    Args:
        net: A network.
        num_outputs: How many outputs it has.

    Raises:
        ValueError: If it has no `output_bias` of that size.

    Example:
        >>> from pyro_vae.networks import MLP
        >>> flat_output_bias(MLP(2, 3), 3).tolist()
        [0.0, 0.0, 0.0]
    """
    bias = getattr(net, "output_bias", None)
    if bias is None or bias.numel() != num_outputs:
        raise ValueError(f"{type(net).__name__}: expected an output_bias of {num_outputs} values to start at the mean")
    return bias.detach().view(-1)


def positive(log_value: Tensor, bound: float = 10.0) -> Tensor:
    r"""The map from an unbounded head to a positive parameter, the one that all components share.

    .. math:: \operatorname{positive}(v) = \exp(\min(\max(v, -b), b))

    An exponential, since scales, rates and concentrations act by ratios: a step of the head is a step of the same
    ratio wherever it starts, and where the head is sane the gradient is that of the textbook's log-parameter. And
    bounded, since the exponential alone overflows float32 at 88.7 and is zero below -103: with the bound no output of
    a network makes a density infinite, or divides by zero.

    Args:
        log_value: Any tensor `v`.
        bound: The bound `b`: 10 for scales and concentrations (4.5e-5 to 2.2e4), 20 for rates of counts (2.1e-9 to
            4.9e8).

    Example:
        >>> positive(torch.tensor([0.0, -1e6, 1e6])).tolist()
        [1.0, 4.539993096841499e-05, 22026.46484375]
    """
    return torch.exp(log_value.clamp(-bound, bound))


def scale(log_variance: Tensor) -> Tensor:
    r"""The scale of a log-variance head, `positive(v / 2)`.

    .. math:: \sigma = \exp(\tfrac12 \min(\max(v, -20), 20))

    Args:
        log_variance: Any tensor `v`.

    Example:
        >>> scale(torch.tensor([0.0, 1e6])).tolist()
        [1.0, 22026.46484375]
    """
    return positive(0.5 * log_variance)
