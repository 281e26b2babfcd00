"""Bounds that are functions of log-weights, and better gradients of them, for guides whose draws are differentiable."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor

from pyro_vae.estimators.gradients import WeightedEstimator, Weights

__all__ = ["CIWAE", "IWAE", "MIWAE", "PIWAE", "Bound", "DReG", "Renyi", "StickingTheLanding", "log_mean_exp"]


class Bound(WeightedEstimator):
    """A bound on the log evidence that is differentiated as it stands; what a subclass defines is `bound`."""

    @abstractmethod
    def bound(self, log_weights: Tensor) -> Tensor:
        """The bound of each datum, of shape `(B,)`, from log-weights of shape `(K, B)`."""

    def weigh(self, log_weights: Tensor) -> tuple[Tensor, Weights]:
        """The bound, and its derivatives with respect to the log-weights."""
        with torch.enable_grad():
            log_weights = log_weights.detach().requires_grad_()
            bound = self.bound(log_weights)
            (weights,) = torch.autograd.grad(bound.sum(), log_weights)
        return bound.detach(), Weights(model=weights, path=weights, score=weights)


class IWAE(Bound):
    r"""The importance-weighted bound, which rises with K to the evidence.

    .. math:: \log \tfrac1K \sum_k w_k, \qquad w_k = \frac{p(x, z_k)}{q(z_k \mid x)}, \quad z_k \sim q(z \mid x)

    The gradient's signal-to-noise ratio rises with K for the model, and falls for the guide (Rainforth et al., 2018):
    `DReG` mends that.

    Args:
        num_particles: Number `K` of particles a datum.
        chunk: Particles at once, where memory is short.

    Raises:
        ValueError: If the guide's draws are not differentiable (there is `VIMCO`).

    Reference:
        Burda, Grosse and Salakhutdinov, 2016. Importance weighted autoencoders. Rainforth et al., 2018. Tighter
        variational bounds are not necessarily better.

    Example:
        >>> import pyro_vae
        >>> vae, x = pyro_vae.build((8, 8), latent=2), torch.ones(3, 8, 8)
        >>> fitted = pyro_vae.fit(vae, x, estimator=IWAE(5), epochs=1, batch_size=3, progress=False)
    """

    def __init__(self, num_particles: int = 8, *, chunk: int | None = None):
        super().__init__(num_particles, chunk=chunk)

    def bound(self, log_weights: Tensor) -> Tensor:
        """The logarithm of the mean weight."""
        return log_mean_exp(log_weights)


class Renyi(Bound):
    r"""The variational Renyi bound of order alpha: 0 is the importance-weighted bound, 1 the ELBO.

    .. math:: \frac{1}{1 - \alpha} \log \tfrac1K \sum_k w_k^{1 - \alpha}

    Weights are those of single data, and the scale of a subsampled plate stands outside the logarithm, so that it
    bounds the evidence for :math:`\alpha \ge 0`. For :math:`\alpha < 0` it may lie above.

    Args:
        alpha: The order.
        num_particles: Number `K` of particles a datum.
        chunk: Particles at once, where memory is short.

    Raises:
        ValueError: If the guide's draws are not differentiable.

    Reference:
        Li and Turner, 2016. Renyi divergence variational inference.

    Example:
        >>> log_weights = torch.tensor([[0.0], [1.0]])
        >>> Renyi(alpha=0.5).bound(log_weights) < IWAE().bound(log_weights)
        tensor([True])
    """

    def __init__(self, alpha: float, num_particles: int = 8, *, chunk: int | None = None):
        super().__init__(num_particles, chunk=chunk)
        self.alpha = alpha

    @property
    def importance_weighted(self) -> bool:
        """Whether it is other than the ELBO."""
        return super().importance_weighted and self.alpha != 1

    def bound(self, log_weights: Tensor) -> Tensor:
        """The logarithm of the power mean."""
        if self.alpha == 1:
            return log_weights.mean(0)
        return log_mean_exp((1 - self.alpha) * log_weights) / (1 - self.alpha)


class CIWAE(Bound):
    r"""A combination of the ELBO and the importance-weighted bound.

    .. math:: \beta\, \tfrac1K \sum_k \log w_k + (1 - \beta) \log \tfrac1K \sum_k w_k

    Args:
        beta: The ELBO's weight, in [0, 1] (not that of `handlers.beta`).
        num_particles: Number `K` of particles a datum.
        chunk: Particles at once, where memory is short.

    Raises:
        ValueError: If `beta` is outside [0, 1], or the guide's draws are not differentiable.

    Reference:
        Rainforth et al., 2018. Tighter variational bounds are not necessarily better.

    Example:
        >>> CIWAE(beta=1.0).bound(torch.tensor([[0.0], [1.0]]))
        tensor([0.5000])
    """

    def __init__(self, beta: float, num_particles: int = 8, *, chunk: int | None = None):
        if not 0 <= beta <= 1:
            raise ValueError(f"CIWAE: expected beta in [0, 1], got {beta}")
        super().__init__(num_particles, chunk=chunk)
        self.beta = beta

    def bound(self, log_weights: Tensor) -> Tensor:
        """The weighted mean of the two."""
        return self.beta * log_weights.mean(0) + (1 - self.beta) * log_mean_exp(log_weights)


class MIWAE(Bound):
    r"""The mean of M importance-weighted bounds of K particles each.

    .. math:: \tfrac1M \sum_m \log \tfrac1K \sum_k w_{mk}

    Args:
        m: Number `M` of bounds.
        k: Number `K` of particles in each.
        chunk: Particles at once, where memory is short.

    Raises:
        ValueError: If `m` or `k` is not positive, or the guide's draws are not differentiable.

    Reference:
        Rainforth et al., 2018. Tighter variational bounds are not necessarily better.

    Example:
        >>> MIWAE(m=4, k=2).num_particles
        8
    """

    def __init__(self, m: int, k: int, *, chunk: int | None = None):
        if m < 1 or k < 1:
            raise ValueError(f"{type(self).__name__}: expected m >= 1 and k >= 1, got m={m}, k={k}")
        super().__init__(m * k, chunk=chunk)
        self.m, self.k = m, k

    @property
    def importance_weighted(self) -> bool:
        """Whether it is other than the ELBO."""
        return self.k > 1

    def bound(self, log_weights: Tensor) -> Tensor:
        """The mean over groups of the logarithm of the mean weight."""
        return log_mean_exp(log_weights.unflatten(0, (self.m, self.k)), dim=1).mean(0)


class PIWAE(MIWAE):
    r"""The model learns from one importance-weighted bound of M K particles, the guide from M bounds of K.

    .. math:: \nabla_\theta \log \tfrac{1}{MK} \sum_{mk} w_{mk}, \qquad
              \nabla_\phi \tfrac1M \sum_m \log \tfrac1K \sum_k w_{mk}

    Its value is the model's bound.

    Args:
        m: Number `M` of the guide's bounds.
        k: Number `K` of particles in each.
        chunk: Particles at once, where memory is short.

    Raises:
        ValueError: If `m` or `k` is not positive, or the guide's draws are not differentiable.

    Reference:
        Rainforth et al., 2018. Tighter variational bounds are not necessarily better.

    Example:
        >>> PIWAE(m=4, k=2).num_particles
        8
    """

    @property
    def importance_weighted(self) -> bool:
        """Whether it is other than the ELBO."""
        return self.num_particles > 1

    def weigh(self, log_weights: Tensor) -> tuple[Tensor, Weights]:
        """The model's bound; normalized weights for the model, and those within groups for the guide."""
        _, guide = super().weigh(log_weights)
        return log_mean_exp(log_weights), guide._replace(model=log_weights.softmax(0))


class StickingTheLanding(WeightedEstimator):
    r"""A bound whose gradient leaves the guide's score out: what remains vanishes where the guide is exact.

    .. math:: \nabla_\phi \log w_k \to \frac{\partial \log w_k}{\partial z_k} \nabla_\phi z_k

    For the ELBO the score has expectation zero, and the gradient remains unbiased. For an importance-weighted bound it
    has not: the gradient is *biased* there, to which `DReG` is the answer. Global latents keep their score.

    Args:
        num_particles: Number of particles a datum, over which the ELBO is averaged.
        bound: Another bound, such as `IWAE(8)`, which has its own number of particles.
        chunk: Particles at once, where memory is short.

    Raises:
        ValueError: If the guide's draws are not differentiable.

    Reference:
        Roeder, Wu and Duvenaud, 2017. Sticking the landing: simple, lower-variance gradient estimators for variational
        inference.

    Example:
        >>> StickingTheLanding(bound=IWAE(8)).num_particles
        8
    """

    def __init__(self, num_particles: int = 1, bound: Bound | None = None, *, chunk: int | None = None):
        if bound is not None:
            if num_particles not in (1, bound.num_particles):
                raise ValueError(
                    f"StickingTheLanding: expected the bound's {bound.num_particles} particles, got {num_particles}"
                )
            num_particles, chunk = bound.num_particles, chunk or bound.chunk
        super().__init__(num_particles, chunk=chunk)
        self.bound = bound

    @property
    def importance_weighted(self) -> bool:
        """Whether its bound is."""
        return self.bound is not None and self.bound.importance_weighted

    def weigh(self, log_weights: Tensor) -> tuple[Tensor, Weights]:
        """The bound, and its weights but for the score's."""
        bound, weights = (self.bound or Renyi(alpha=1.0)).weigh(log_weights)
        return bound, weights._replace(score=None)


class DReG(IWAE):
    r"""The importance-weighted bound, with a doubly reparameterized gradient for the guide.

    .. math:: \nabla_\phi = \sum_k \tilde w_k^2 \frac{\partial \log w_k}{\partial z_k} \nabla_\phi z_k, \qquad
              \tilde w_k = \frac{w_k}{\sum_j w_j}

    It has the expectation of `IWAE`'s, and a signal-to-noise ratio that does not fall with K. The model's gradient is
    `IWAE`'s. A parameter that model and guide share, as under a `VampPrior`, has the sum of both.

    Args:
        num_particles: Number `K` of particles a datum.
        chunk: Particles at once, where memory is short.

    Raises:
        ValueError: If the guide's draws are not differentiable.

    Reference:
        Tucker, Lawson, Gu and Maddison, 2019. Doubly reparameterized gradient estimators for Monte Carlo objectives.

    Example:
        >>> import pyro_vae
        >>> vae, x = pyro_vae.build((8, 8), latent=2), torch.ones(3, 8, 8)
        >>> loss = DReG(num_particles=5)(vae.model, vae.guide)(x)
        >>> loss.backward()
    """

    def weigh(self, log_weights: Tensor) -> tuple[Tensor, Weights]:
        """The bound; normalized weights for the model, and their squares for the guide."""
        weights = log_weights.softmax(0)
        return self.bound(log_weights), Weights(model=weights, path=weights**2)


def log_mean_exp(log_weights: Tensor, dim: int = 0) -> Tensor:
    """The logarithm of the mean weight.

    Example:
        >>> log_mean_exp(torch.tensor([1.0, 3.0]).log()).exp()
        tensor(2.)
    """
    return log_weights.logsumexp(dim) - math.log(log_weights.shape[dim])
