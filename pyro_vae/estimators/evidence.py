"""The evidence of one batch from many particles, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_vae.estimators.particles import LogProbabilities, log_probabilities

__all__ = ["Evidence", "estimate_evidence"]

VALUES_AT_ONCE = 2**20  # decoder outputs in a pass: 4 MB, which caches still hold
PARTICLES_AT_ONCE = 256  # enough that the encoder's pass over the batch costs nothing beside the decoder's


class Evidence(NamedTuple):
    """Estimates for each datum of a batch, tensors of shape `(B,)` in nats, float64, on the CPU.

    Attributes:
        log_evidence: Importance-weighted estimate of log p(x).
        error: Its Monte Carlo standard error.
        rate: KL divergence from the prior to the posterior.
        distortion: Expected negative log-likelihood under the posterior.
    """

    log_evidence: Tensor
    error: Tensor
    rate: Tensor
    distortion: Tensor


def estimate_evidence(
    model: Callable,
    guide: Callable,
    *batch: Any,
    num_particles: int = 5000,
    at_once: int = PARTICLES_AT_ONCE,
    draw: Callable[..., LogProbabilities] | None = None,
    advance: Callable[[float], Any] | None = None,
) -> Evidence:
    r"""Log-evidence, rate and distortion of each datum, from the same particles.

    .. math:: \log \hat p(x) = \log \tfrac1K \sum_k w_k, \quad R = \tfrac1K \sum_k \log \frac{q(z_k \mid x)}{p(z_k)},
              \quad D = -\tfrac1K \sum_k \log p(x \mid z_k)

    The error is that of the mean weight, relative to it: :math:`\sqrt{\sum_k w_k^2 / (\sum_k w_k)^2 - 1/K}`. It knows
    nothing of a mode of the posterior where no particle has been. Particles are taken in passes, with running sums, so
    that memory does not depend on their number.

    Args:
        model: A Pyro model that keeps its local sites in one plate named "data", `dim=-1`.
        guide: Its guide.
        *batch: Arguments of both.
        num_particles: Number `K` of particles a datum.
        at_once: Particles in a pass.
        draw: What takes a pass, called with the batch and `num_particles=`; by default `log_probabilities`.
        advance: Called with the share of the work done since the last call, for a progress bar.

    Raises:
        ValueError: If `num_particles` is not positive, or no site is in a plate named "data".

    Reference:
        Burda, Grosse and Salakhutdinov, 2016. Importance weighted autoencoders. Alemi et al., 2018. Fixing a broken
        ELBO (rate and distortion).

    Example:
        >>> import pyro_vae
        >>> vae = pyro_vae.build((8, 8), latent=2)
        >>> estimate_evidence(vae.model, vae.guide, torch.zeros(5, 8, 8), num_particles=10).log_evidence.shape
        torch.Size([5])
    """
    if num_particles < 1:
        raise ValueError(f"num_particles: expected a positive number, got {num_particles}")
    draw = draw or partial(log_probabilities, model, guide)
    log_sum: Any = torch.tensor(-torch.inf)
    log_squares: Any = torch.tensor(-torch.inf)
    rate: Any = 0
    distortion: Any = 0
    for first in range(0, num_particles, at_once):
        k = min(at_once, num_particles - first)
        with torch.no_grad():
            passed = draw(*batch, num_particles=k)
        prior, likelihood, posterior = (log_prob.cpu().double() for log_prob in passed)
        log_weights = prior + likelihood - posterior
        log_sum = torch.logaddexp(log_sum, torch.logsumexp(log_weights, 0))
        log_squares = torch.logaddexp(log_squares, torch.logsumexp(2 * log_weights, 0))
        rate = rate + (posterior - prior).sum(0) / num_particles
        distortion = distortion - likelihood.sum(0) / num_particles
        if advance is not None:
            advance(k / num_particles)
    error = ((log_squares - 2 * log_sum).exp() - 1 / num_particles).clamp(min=0).sqrt()
    return Evidence(log_sum - math.log(num_particles), error, rate, distortion)
