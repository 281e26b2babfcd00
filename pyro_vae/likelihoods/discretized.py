"""Likelihoods of values on a grid, such as the 256 grey levels of an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_vae import distributions
from pyro_vae.likelihoods.factorized import Factorized
from pyro_vae.networks import positive

__all__ = ["DiscretizedLogistic", "DiscretizedLogisticMixture"]


class DiscretizedLogistic(Factorized):
    r"""Values on the grid `i / (bins - 1)`, from a logistic distribution that is discretized.

    .. math:: P(x \mid z) = \prod_d \sigma\!\left(\frac{x_d + h - \mu_d}{s_d}\right)
              - \sigma\!\left(\frac{x_d - h - \mu_d}{s_d}\right), \quad h = \frac{1}{2 (\text{bins} - 1)}

    Args:
        net: A network from `(*, latent)` to locations and log scales, `2 * prod(event_shape)` values. The location is
            half a unit above the output, the scale a tenth of `positive`: so an untrained network starts grey.
        event_shape: Shape of one datum.
        bins: Number of grid values, at least 2.

    Raises:
        ValueError: If there are fewer than two bins; from `forward`, if the network's output is of another size.

    Reference:
        Kingma et al., 2016. Improved variational inference with inverse autoregressive flow.

    Example:
        >>> from pyro_vae import networks
        >>> DiscretizedLogistic(networks.MLP(2, 2 * 64), (1, 8, 8), bins=17)(torch.zeros(5, 2)).event_shape
        torch.Size([1, 8, 8])
    """

    num_params = 2
    support = constraints.unit_interval

    def __init__(self, net: nn.Module, event_shape: Sequence[int], bins: int = 256):
        super().__init__(net, event_shape)
        if bins < 2:
            raise ValueError(f"{type(self).__name__}: expected bins > 1, got {bins}")
        self.bins = bins

    def distribution(self, loc: Tensor, log_scale: Tensor) -> Any:
        """Discretized logistic with this location and log scale."""
        return distributions.DiscretizedLogistic(0.5 + loc, 0.1 * positive(log_scale), self.bins)

    def first_parameter(self, mean: Tensor) -> Tensor:
        """The location that is the mean."""
        return mean - 0.5


class DiscretizedLogisticMixture(DiscretizedLogistic):
    r"""Values on the grid `i / (bins - 1)`, each from a mixture of discretized logistic distributions.

    .. math:: P(x \mid z) = \prod_d \sum_c \pi_{dc}\, P(x_d; \mu_{dc}, s_{dc})

    Args:
        net: A network from `(*, latent)` to locations, log scales and logits of the components,
            `3 * components * prod(event_shape)` values.
        event_shape: Shape of one datum.
        components: Number of components.
        bins: Number of grid values, at least 2.

    Raises:
        ValueError: If sizes are too small; from `forward`, if the network's output is of another size.

    Reference:
        Salimans et al., 2017. PixelCNN++: improving the PixelCNN with discretized logistic mixture likelihood.

    Example:
        >>> from pyro_vae import networks
        >>> net = networks.MLP(2, 3 * 5 * 64)
        >>> DiscretizedLogisticMixture(net, (1, 8, 8), components=5, bins=17)(torch.zeros(3, 2)).event_shape
        torch.Size([1, 8, 8])
    """

    def __init__(self, net: nn.Module, event_shape: Sequence[int], components: int = 5, bins: int = 256):
        super().__init__(net, event_shape, bins)
        if components < 1:
            raise ValueError(f"DiscretizedLogisticMixture: expected components > 0, got {components}")
        self.components = components
        self.num_params = 3 * components

    def distribution(self, *parameters: Tensor) -> Any:
        """The mixture: locations of all components, then log scales, then logits."""
        loc, log_scale, logits = torch.stack(parameters, -1).unflatten(-1, (3, self.components)).unbind(-2)
        return dist.MixtureSameFamily(dist.Categorical(logits=logits), super().distribution(loc, log_scale))

    def first_parameter(self, mean: Tensor) -> Tensor:
        """The locations of all components, spread about the mean, since equal ones would stay equal."""
        spread = 0.2 * torch.linspace(-1, 1, self.components).to(mean)
        return (mean - 0.5) + spread.reshape(-1, *[1] * mean.ndim) if self.components > 1 else mean - 0.5
