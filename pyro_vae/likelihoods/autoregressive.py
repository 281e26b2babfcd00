"""An autoregressive likelihood of images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae.distributions.autoregressive import Autoregressive as AutoregressiveDistribution
from pyro_vae.likelihoods.discrete import Bernoulli
from pyro_vae.networks import split_parameters
from pyro_vae.networks.autoregressive import PixelCNN

__all__ = ["Autoregressive"]


class Autoregressive(nn.Module):
    r"""Images whose values depend on the latent and on the values before them, through masked convolutions.

    .. math:: p(x \mid z) = \prod_i p(x_i \mid \theta_i), \quad \theta_i = f_i(x_{<i}, c), \quad c = g(z)

    Values are in raster order of their positions, and in the order of the channels at one position. What the values in
    the receptive field say of a value, the latent need not say: with `blocks` and `kernel_size` grows the field, and
    the less of the image is in the latent.

    Drawing takes a pass of the network for each position, and `mean` of the distribution is an estimate from one draw.

    Args:
        net: A network :math:`g` from `(*, latent)` to the context, `channels * H * W` values, channel by channel.
        event_shape: Shape `(C, H, W)` of one image.
        pixel: Likelihood of a value: a class such as `likelihoods.Bernoulli`, or a `functools.partial` of it, called
            as `pixel(net=..., event_shape=())`, so that parameters of its own are shared by all values.
        channels: Number of features of the autoregressive network, and of channels of the context.
        blocks: Number of its gated residual blocks.
        kernel_size: Width of its kernels, odd, at least 3.

    Returns:
        From `forward(z)` with `z` of shape `(*, latent)`, a distribution of batch shape `(*)` and event shape
        `event_shape`.

    Raises:
        ValueError: For sizes that are not positive, an even kernel or an event shape that is no image's; from
            `forward`, if the network's output is of another size.

    Reference:
        van den Oord et al., 2016. Conditional image generation with PixelCNN decoders. Salimans et al., 2017.
        PixelCNN++: improving the PixelCNN with discretized logistic mixture likelihood and other modifications. Chen
        et al., 2017. Variational lossy autoencoder.

    Example:
        >>> from pyro_vae import networks
        >>> likelihood = Autoregressive(networks.MLP(2, 16 * 64), (1, 8, 8), Bernoulli)
        >>> likelihood(torch.zeros(5, 2)).sample().shape
        torch.Size([5, 1, 8, 8])
    """

    def __init__(
        self,
        net: nn.Module,
        event_shape: Sequence[int],
        pixel: Callable[..., Any] = Bernoulli,
        channels: int = 16,
        blocks: int = 2,
        kernel_size: int = 5,
    ):
        super().__init__()
        self.net = net
        self.event_shape = tuple(event_shape)
        self.pixel = pixel
        self.channels = channels
        self.blocks = blocks
        self.kernel_size = kernel_size
        # An event of one value: then one object serves the whole image and, in sampling, single positions.
        self.pixel_likelihood = pixel(net=nn.Identity(), event_shape=())
        self.pixel_cnn = PixelCNN(event_shape, self.pixel_likelihood.num_params, channels, blocks, kernel_size)

    @property
    def num_outputs(self) -> int:
        """How many outputs the network must have."""
        return self.channels * math.prod(self.event_shape[1:])

    @property
    def support(self) -> Any:
        """The pixel likelihood."""
        return self.pixel_likelihood.support

    @property
    def bins(self) -> int | None:
        """Grid values of the pixel likelihood, if it has a grid."""
        return getattr(self.pixel_likelihood, "bins", None)

    def forward(self, z: Tensor) -> AutoregressiveDistribution:
        """The likelihood p(x given z)."""
        (context,) = split_parameters(self.net(z), z.shape[:-1], 1, (self.channels, *self.event_shape[1:]))
        return AutoregressiveDistribution(self.pixel_cnn, context, self.pixel_likelihood)

    def start_at(self, mean: Tensor) -> None:
        """Set the bias of the last layer so that all values start near the data's mean, of shape `event_shape`."""
        bias = self.pixel_cnn.output_bias
        with torch.no_grad():
            first = self.pixel_likelihood.first_parameter(mean.to(bias)).reshape(-1)
            bias.view(-1)[: first.numel()] = first

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return f"event_shape={self.event_shape}"
