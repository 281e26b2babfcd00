"""A posterior that is refined datum by datum."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.distributions import as_pyro

__all__ = ["SemiAmortized"]


class SemiAmortized(nn.Module):
    r"""An amortized posterior refined by a few gradient steps on each datum's own ELBO.

    .. math:: \lambda_0 = f(x), \quad
              \lambda_{t+1} = \lambda_t + r\, g_t \min(1, c / \lVert g_t \rVert), \quad
              g = \nabla_\lambda E_{q_\lambda}[\log p(x, z) - \log q_\lambda(z)], \quad q(z \mid x) = q_{\lambda_T}(z)

    Each step takes one reparameterized draw, and none is longer than `lr * max_norm`. In training the steps are
    differentiated as well, so that the encoder learns to propose what the steps do best from.

    Args:
        base: A posterior of `pyro_vae` with reparameterized draws, which gives the family and the proposal.
        likelihood: The program's own likelihood (in an expression it is filled in).
        prior: The program's own prior (in an expression it is filled in).
        steps: Number of gradient steps `T`.
        lr: Step size `r`.
        max_norm: Norm `c` to which a datum's gradient is clipped.

    Raises:
        ValueError: If `base` is no posterior of a network's outputs, the prior has a global latent or the likelihood
            an "optimal" scale, or a number is not positive; from `forward`, if draws of `base` are not reparameterized.

    Reference:
        Kim et al., 2018. Semi-amortized variational autoencoders.

    Example:
        >>> from pyro_vae import likelihoods, networks, posteriors, priors
        >>> base = posteriors.DiagonalNormal(networks.MLP(64, 2 * 3), 3)
        >>> likelihood = likelihoods.Bernoulli(networks.MLP(3, 64), (64,))
        >>> SemiAmortized(base, likelihood, priors.StandardNormal(3), steps=2)(torch.ones(5, 64)).event_shape
        torch.Size([3])
    """

    def __init__(
        self,
        base: nn.Module,
        likelihood: nn.Module,
        prior: nn.Module,
        steps: int = 5,
        lr: float = 0.1,
        max_norm: float = 5.0,
    ):
        super().__init__()
        if not (hasattr(base, "outputs") and hasattr(base, "distribution")):
            raise ValueError(f"SemiAmortized: expected a base such as DiagonalNormal, got {type(base).__name__}")
        # Each step would draw a global latent anew, count in an optimal scale's running average, and know no exposure.
        modules = list(likelihood.modules())
        optimal = any(getattr(module, "scale", None) == "optimal" for module in modules)
        if hasattr(prior, "guide") or optimal or any(getattr(module, "exposure", False) for module in modules):
            raise ValueError(
                "SemiAmortized: expected a prior without global latents, and a likelihood without scale='optimal' and "
                "without exposure"
            )
        if not getattr(base, "twice_differentiable", True):
            raise ValueError(
                f"SemiAmortized: expected a base whose draws have second derivatives, got {type(base).__name__}"
            )
        if steps < 1 or not lr > 0 or not max_norm > 0:
            raise ValueError(f"SemiAmortized: expected positive steps, lr, max_norm; got {steps=}, {lr=}, {max_norm=}")
        self.base: Any = base
        self.likelihood = likelihood
        self.prior = prior
        self.steps = steps
        self.lr = lr
        self.max_norm = max_norm

    @property
    def support(self) -> Any:
        """The base."""
        return self.base.support

    @property
    def latent(self) -> Any:
        """The base's."""
        return self.base.latent

    def forward(self, x: Tensor) -> dist.Distribution:
        """The posterior q(z given x)."""
        training = torch.is_grad_enabled()
        # Evaluation runs without gradients, but the steps are made of them.
        with torch.enable_grad():
            outputs = self.base.outputs(x)
            if not training:
                outputs = outputs.detach().requires_grad_()
            for _ in range(self.steps):
                (gradient,) = torch.autograd.grad(self._elbo(outputs, x), outputs, create_graph=training)
                # Where the ELBO is steep a plain step would overshoot, and the next one more so.
                norm = torch.linalg.vector_norm(gradient, dim=-1, keepdim=True)
                outputs = outputs + self.lr * gradient * (self.max_norm / norm.clamp(min=self.max_norm))
        return self.base.distribution(outputs if training else outputs.detach())

    def _elbo(self, outputs: Tensor, x: Tensor) -> Tensor:
        """The sum over data of the ELBO, estimated by one draw."""
        posterior = self.base.distribution(outputs)
        if not posterior.has_rsample:
            raise ValueError(
                f"SemiAmortized: expected a base with reparameterized draws, got {type(self.base).__name__}"
            )
        z = posterior.rsample()
        log_prior, log_likelihood = as_pyro(self.prior()).log_prob(z), self.likelihood(z).log_prob(x)
        return (log_prior + log_likelihood - posterior.log_prob(z)).sum()
