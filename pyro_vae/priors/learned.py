"""Priors that are as rich as one likes: the aggregated posterior of pseudo-inputs, and normalizing flows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.distributions import FlowDistribution, import_zuko, mixture
from pyro_vae.priors.latent import Latent

__all__ = ["Flow", "VampPrior"]


class VampPrior(nn.Module):
    r"""The posterior itself, averaged over pseudo-inputs: the variational mixture of posteriors.

    .. math:: p(z) = \frac1C \sum_c q(z \mid u_c)

    Args:
        posterior: The program's own posterior (in an expression it is filled in).
        pseudo_inputs: A tensor of data `(C, *event_shape)`, which stay as they are; or a pair `(C, event_shape)` of
            pseudo-inputs to learn, which start as small noise (and, under `fit(start_at_mean=True)`, about the data's
            mean). None is `(components, event_shape)`.
        components: Number `C` of pseudo-inputs.
        event_shape: Shape of one datum.

    Raises:
        ValueError: If there is no shape of pseudo-inputs.

    Reference:
        Tomczak and Welling, 2018. VAE with a VampPrior.

    Example:
        >>> from pyro_vae import networks, posteriors
        >>> posterior = posteriors.DiagonalNormal(networks.MLP(64, 2 * 20), 20)
        >>> VampPrior(posterior, (5, (1, 8, 8)))().event_shape
        torch.Size([20])
    """

    inputs: Tensor

    def __init__(
        self,
        posterior: nn.Module,
        pseudo_inputs: Tensor | tuple[int, Sequence[int]] | None = None,
        components: int = 500,
        event_shape: Sequence[int] | None = None,
    ):
        super().__init__()
        self.posterior = posterior
        if isinstance(pseudo_inputs, Tensor):
            inputs = pseudo_inputs.detach().clone()
            self.register_buffer("inputs", inputs)
        else:
            components, event_shape = pseudo_inputs or (components, event_shape)
            if event_shape is None or components < 1:
                raise ValueError(
                    "VampPrior: expected pseudo_inputs (data, or a count and an event shape), "
                    f"got {components} of shape {event_shape}"
                )
            self.inputs = nn.Parameter(0.01 * torch.randn(components, *event_shape))
            pseudo_inputs = None
        self.pseudo_inputs = pseudo_inputs
        self.components, *shape = self.inputs.shape
        self.event_shape = tuple(shape)

    @property
    def support(self) -> Any:
        """The posterior."""
        return getattr(self.posterior, "support", None)

    @property
    def latent(self) -> Any:
        """The posterior's."""
        return getattr(self.posterior, "latent", None)

    def forward(self) -> dist.Distribution:
        """The prior p(z)."""
        return mixture(self.inputs.new_zeros(self.components), self.posterior(self.inputs))

    def start_at(self, mean: Tensor) -> None:
        """Move learned pseudo-inputs, which start as noise, to the data's mean."""
        if isinstance(self.inputs, nn.Parameter):
            with torch.no_grad():
                self.inputs.add_(mean.to(self.inputs))

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return f"components={self.components}, event_shape={self.event_shape}"


class Flow(Latent):
    r"""A normalizing flow of zuko.

    .. math:: p(z) = N(f(z); 0, I)\, \left| \det \frac{\partial f}{\partial z} \right|

    A flow of zuko that is made already is a prior as it is: `VAE(prior=zuko.flows.NSF(20), ...)`.

    Args:
        latent: Number of latent dimensions.
        flow: A class of `zuko.flows` such as `RealNVP`, `MAF`, `NSF`, or a `functools.partial` of it; called with the
            number of dimensions. None is `RealNVP(transforms=6)` with hidden layers of 128, fast both ways.

    Raises:
        ValueError: If `latent` is less than 2.

    Reference:
        Dinh, Sohl-Dickstein and Bengio, 2017. Density estimation using Real NVP. Chen et al., 2017. Variational lossy
        autoencoder (flows as priors).

    Example:
        >>> Flow(20)().event_shape
        torch.Size([20])
    """

    def __init__(self, latent: int, flow: Callable[..., nn.Module] | None = None):
        super().__init__(latent, least=2)
        self.flow = flow
        make = flow or import_zuko().flows.RealNVP
        options: Any = {} if flow else {"transforms": 6, "hidden_features": (128, 128)}
        self.transforms = make(latent, **options)

    def forward(self) -> dist.Distribution:
        """The prior p(z)."""
        return FlowDistribution(self.transforms())
