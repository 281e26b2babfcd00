"""The log-likelihood of each datum, and as code length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pyro_vae.evaluation.summary import summarize
from pyro_vae.programs import Program

__all__ = ["bits_per_dimension", "log_likelihood"]


def log_likelihood(program: Program, data: Any, num_particles: int = 5000, *, seed: int = 0) -> Tensor:
    r"""Importance-weighted estimate of each datum's log evidence, a lower bound in expectation that rises with K.

    .. math:: \log \hat p(x) = \log \tfrac1K \sum_k \frac{p(x, z_k)}{q(z_k \mid x)}, \quad z_k \sim q(z \mid x)

    Args:
        program: Any program that keeps its local sites in one plate named "data".
        data: Tensor, array, `Dataset` or `DataLoader`.
        num_particles: Number `K` of particles a datum; memory does not depend on it.
        seed: Seed of the particles.

    Returns:
        A tensor of shape `(N,)`, in nats, float64.

    Raises:
        ValueError: If `num_particles` is not positive, or the data do not suit the program.

    Reference:
        Burda, Grosse and Salakhutdinov, 2016. Importance weighted autoencoders.

    Example:
        >>> import pyro_vae
        >>> import torch
        >>> log_likelihood(pyro_vae.build((8, 8), latent=2), torch.ones(3, 8, 8), num_particles=10).shape
        torch.Size([3])
    """
    return summarize(program, data, num_particles, seed=seed).log_likelihood


def bits_per_dimension(log_likelihood: Tensor, event_shape: Sequence[int], bins: int | None = None) -> Tensor:
    r"""Log-likelihoods in nats per datum as code length, in bits per dimension.

    .. math:: b = -\frac{\log p(x)}{D \log 2}, \qquad
              b = -\frac{\log p(y)}{D \log 2} + \log_2 \text{bins}, \quad y = \frac{i + u}{\text{bins}}

    The first is of discrete data and their probabilities. The second is of grey levels `i` that were dequantized by
    noise `u`, uniform on (0, 1), and of their density. It gives to levels the probability of their cell, whose volume
    is :math:`\text{bins}^{-D}`, so that by Jensen's inequality `b` is, in expectation over the noise, an upper bound on
    the bits per dimension of the discrete data:

    .. math:: -\log P(i) = -\log \int_{\text{cell } i} p(y)\, dy = D \log \text{bins} - \log E_u[p(y)]
              \le D \log \text{bins} - E_u[\log p(y)]

    Args:
        log_likelihood: Log-likelihoods (or lower bounds on them) of any shape, in nats per datum.
        event_shape: Shape of one datum, of `D` values.
        bins: Number of grey levels of data that were dequantized; None for discrete data.

    Returns:
        A tensor of the shape of `log_likelihood`, in bits per dimension.

    Raises:
        ValueError: If a datum has no values, or there are fewer than two bins.

    Reference:
        Theis, van den Oord and Bethge, 2016. A note on the evaluation of generative models.

    Example:
        >>> import torch
        >>> bits_per_dimension(torch.zeros(2), (1, 28, 28), bins=256)  # the uniform density
        tensor([8., 8.])
    """
    dimensions = math.prod(event_shape)
    if dimensions < 1 or (bins is not None and bins < 2):
        raise ValueError(f"expected dimensions and at least 2 bins, got event shape {tuple(event_shape)}, bins={bins}")
    return -log_likelihood / (dimensions * math.log(2)) + (0.0 if bins is None else math.log2(bins))
