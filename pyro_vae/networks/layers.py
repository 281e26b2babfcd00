"""The layers that networks are made of, and how they start."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = [
    "Gated",
    "activation_gain",
    "activation_layer",
    "check_sizes",
    "convolution",
    "group_norm",
    "hidden_layer",
    "image_sizes",
    "linear",
    "start_weights",
]

_NOT_ELEMENTWISE = {"GLU", "MultiheadAttention", "Softmax", "Softmax2d", "LogSoftmax", "Softmin", "Threshold"}


class Gated(nn.Module):
    r"""A hidden layer times a gate of its own, `value(x) * sigmoid(gate(x))`.

    .. math:: h = a(W x + b) \odot \operatorname{sigmoid}(V x + c)

    Args:
        value: The layer, with its activation.
        gate: An affine layer with outputs of the same shape.

    Reference:
        Dauphin, Fan, Auli and Grangier, 2017. Language modeling with gated convolutional networks.
        Tomczak and Welling, 2018. VAE with a VampPrior.

    Example:
        >>> Gated(nn.Identity(), nn.Linear(2, 2))(torch.zeros(5, 2)).shape
        torch.Size([5, 2])
    """

    def __init__(self, value: nn.Module, gate: nn.Module):
        super().__init__()
        self.value = value
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        """The gated layer."""
        return self.value(x) * torch.sigmoid(self.gate(x))


def hidden_layer(
    affine: nn.Module,
    activation: str,
    *,
    gate: nn.Module | None = None,
    normalization: nn.Module | None = None,
    dropout: nn.Module | None = None,
) -> list[nn.Module]:
    """The modules of one hidden layer: affine, normalization, activation, gate and dropout, less what is None.

    Example:
        >>> hidden_layer(nn.Linear(2, 3), "tanh", normalization=nn.LayerNorm(3))[1:]
        [LayerNorm((3,), eps=1e-05, elementwise_affine=True, bias=True), Tanh()]
    """
    layers = [layer for layer in (affine, normalization, activation_layer(activation)) if layer is not None]
    if gate is not None:
        layers = [Gated(nn.Sequential(*layers), gate)]
    return layers if dropout is None else [*layers, dropout]


def activation_layer(name: str) -> nn.Module:
    """The elementwise activation of `torch.nn` of this name in lower case.

    Raises:
        ValueError: An unknown name, with what there is.

    Example:
        >>> activation_layer("leakyrelu")
        LeakyReLU(negative_slope=0.01)
    """
    known = {cls.lower(): cls for cls in sorted(set(nn.modules.activation.__all__) - _NOT_ELEMENTWISE)}
    if name not in known:
        raise ValueError(f"activation: expected one of {', '.join(known)}; got {name!r}")
    return getattr(nn, known[name])()


def activation_gain(name: str, gated: bool = False) -> float:
    r"""The gain of weights that make up for what the activation after them loses.

    .. math:: g = 1 / \sqrt{E[a(u)^2]}, \quad u \sim N(0, 1)

    With weights of variance :math:`g^2 / n` for `n` inputs, the mean square of a layer's outputs is that of its inputs,
    so that signals neither vanish nor blow up with depth. It is He's square root of 2 for the ReLU, and 1 for the
    identity.

    Args:
        name: The activation.
        gated: Whether a gate follows, whose own expected square is then made up for, too.

    Reference:
        He, Zhang, Ren and Sun, 2015. Delving deep into rectifiers.

    Example:
        >>> round(activation_gain("relu"), 4), round(activation_gain("tanh"), 4)
        (1.4142, 1.5925)
    """
    grid = torch.linspace(-10, 10, 4001, dtype=torch.float64)
    density = torch.softmax(-0.5 * grid**2, 0)
    with torch.no_grad():
        square = (density * activation_layer(name).to(grid).eval()(grid) ** 2).sum()
        if gated:
            square = square * (density * torch.sigmoid(grid) ** 2).sum()
    return square.rsqrt().item()


def start_weights(weight: Tensor, fan_in: int, gain: float) -> None:
    """Fill `weight` in place with uniform values of variance `gain^2 / fan_in`."""
    bound = gain * math.sqrt(3 / fan_in)
    nn.init.uniform_(weight, -bound, bound)


def linear(fan_in: int, fan_out: int, gain: float = 1.0) -> nn.Linear:
    """An affine layer that starts at Glorot and Bengio's uniform weights times `gain`, and at a bias of zero.

    Example:
        >>> linear(3, 2).bias.tolist()
        [0.0, 0.0]
    """
    layer = nn.Linear(fan_in, fan_out)
    nn.init.xavier_uniform_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def convolution(in_channels: int, channels: int, kernel_size: int, stride: int = 1, gain: float = 1.0) -> nn.Conv2d:
    """A convolution of odd kernel, whose outputs have the size of its inputs over `stride`, rounded up.

    Example:
        >>> convolution(1, 4, 3, stride=2)(torch.zeros(2, 1, 5, 7)).shape
        torch.Size([2, 4, 3, 4])
    """
    layer = nn.Conv2d(in_channels, channels, kernel_size, stride, padding=kernel_size // 2)
    start_weights(layer.weight, in_channels * kernel_size**2, gain)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]  # there is one
    return layer


def group_norm(channels: int) -> nn.GroupNorm:
    """Normalization of an image's channels in groups of about 8, none of them with a single value where it can be.

    Reference:
        Wu and He, 2018. Group normalization.

    Example:
        >>> group_norm(32).num_groups, group_norm(6).num_groups
        (4, 1)
    """
    return nn.GroupNorm(math.gcd(channels, max(channels // 8, 1)), channels)


def image_sizes(size: Sequence[int], halvings: int) -> list[tuple[int, int]]:
    """Height and width before and after each halving, rounded up: never less than one pixel.

    Example:
        >>> image_sizes((28, 5), 3)
        [(28, 5), (14, 3), (7, 2), (4, 1)]
    """
    height, width = size
    return [(-(-height // 2**i), -(-width // 2**i)) for i in range(halvings + 1)]


def check_sizes(owner: nn.Module, **sizes: int | Sequence[int]) -> None:
    """Raise a `ValueError` that names the owner and all sizes if one is not positive.

    Shapes of images must have three dimensions, channels at least one entry, and kernels an odd size, so that an image
    has a centre for each of its pixels.
    """
    given = ", ".join(f"{name}={value!r}" for name, value in sizes.items())
    name = type(owner).__name__
    if any(min((value,) if isinstance(value, int) else tuple(value), default=1) < 1 for value in sizes.values()):
        raise ValueError(f"{name}: expected positive sizes, got {given}")
    for shape in ("in_shape", "out_shape"):
        if len(sizes.get(shape, (1, 1, 1))) != 3:  # type: ignore[arg-type]  # a shape
            raise ValueError(f"{name}: expected {shape} (channels, height, width), got {sizes[shape]}")
    if not sizes.get("channels", (1,)):
        raise ValueError(f"{name}: expected one or more channels, got ()")
    if sizes.get("kernel_size", 1) % 2 == 0:  # type: ignore[operator]  # a number
        raise ValueError(f"{name}: expected an odd kernel_size, got {sizes['kernel_size']}")
