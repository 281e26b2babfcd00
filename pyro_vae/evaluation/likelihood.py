"""The log-likelihood of each datum, and as code length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from pyro_vae.estimators.terminal import progress_bar
from pyro_vae.evaluation.annealed import annealed_log_likelihood
from pyro_vae.evaluation.summary import summarize
from pyro_vae.programs import Program

__all__ = ["bits_per_dimension", "log_likelihood"]


def log_likelihood(
    program: Program,
    data: Any,
    num_particles: int | None = None,
    *,
    method: Literal["importance", "ais"] = "importance",
    seed: int = 0,
    compile: str | bool = "auto",
    progress: bool = True,
) -> Tensor:
    r"""Estimate of each datum's log evidence, a lower bound in expectation that rises with K.

    .. math:: \log \hat p(x) = \log \tfrac1K \sum_k w_k

    By importance sampling a weight is :math:`p(x, z_k) / q(z_k \mid x)` of one draw from the guide. By annealed
    importance sampling it is that of a chain from the prior to the posterior, which takes a few thousand times as long
    and owes nothing to the guide: see `annealed_log_likelihood`, which also takes the chains' length and gives errors.

    Args:
        program: Any program that keeps its local sites in one plate named "data".
        data: Tensor, array, `Dataset` or `DataLoader`.
        num_particles: Number `K` of weights a datum: particles, or annealed chains. None is 5,000 particles, or 16
            chains. Memory does not depend on it.
        method: "importance", or "ais" for annealed importance sampling.
        seed: Seed of the particles or chains.
        compile: Whether to compile a pass of particles: "auto" does so where all would take more than 20 seconds
            without. What cannot be compiled is warned of, and runs as it is.
        progress: Whether to show a progress bar past two seconds.

    Returns:
        A tensor of shape `(N,)`, in nats, float64.

    Raises:
        ValueError: If `num_particles` is not positive, the method is another, a latent is discrete (with "ais"), or the
            data do not suit the program.

    Reference:
        Burda, Grosse and Salakhutdinov, 2016. Importance weighted autoencoders. Wu et al., 2017. On the quantitative
        analysis of decoder-based generative models.

    Example:
        >>> import pyro_vae
        >>> import torch
        >>> log_likelihood(pyro_vae.build((8, 8), latent=2), torch.ones(3, 8, 8), num_particles=10).shape
        torch.Size([3])
    """
    if method == "ais":
        num_chains = 16 if num_particles is None else num_particles
        return annealed_log_likelihood(program, data, num_chains, seed=seed, progress=progress).log_evidence
    if method != "importance":
        raise ValueError(f'method: expected "importance" or "ais", got {method!r}')
    num_particles = 5000 if num_particles is None else num_particles
    with progress_bar(1, progress) as begin:
        advance = begin("importance sampling")
        return summarize(program, data, num_particles, seed=seed, compile=compile, advance=advance).log_likelihood


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
