"""Importance weights of each datum's draws: how far they can be trusted, and draws resampled by them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pyro_vae.diagnostics.khat import FEWEST_PARTICLES, pareto_shapes, summed
from pyro_vae.evaluation.draws import Draws

__all__ = ["resampled", "shapes_and_sizes"]


def shapes_and_sizes(draws: Draws) -> tuple[Tensor, Tensor]:
    """Shape k-hat of the tail of each datum's weights, and effective number of its draws, each of shape `(B,)`.

    k-hat is NaN where draws are too few for it, and minus infinity where the largest weights are all the same.

    Example:
        >>> import pyro_vae
        >>> from pyro_vae.evaluation import posterior_draws
        >>> draws = posterior_draws(pyro_vae.build((8, 8), latent=2), torch.ones(3, 8, 8), num_samples=50)
        >>> khat, ess = shapes_and_sizes(draws)
        >>> khat.shape, bool((ess <= 50.1).all())
        (torch.Size([3]), True)
    """
    log_weights, rounding = _exact(draws)
    if len(log_weights) < FEWEST_PARTICLES:
        none = torch.full(log_weights.shape[1:], torch.nan, dtype=log_weights.dtype)
        return none, 1 / (log_weights.softmax(0) ** 2).sum(0)
    return pareto_shapes(log_weights, rounding)


def resampled(draws: Draws, first: int = 0) -> Draws:
    """Draws of each datum taken with replacement, in proportion to their Pareto-smoothed weights.

    Args:
        draws: The draws.
        first: Number of the first datum among all.

    Raises:
        ValueError: If some latents are global, or all weights of a datum are 0, or some NaN or infinite.

    Example:
        >>> import pyro_vae
        >>> from pyro_vae.evaluation import posterior_draws
        >>> draws = posterior_draws(pyro_vae.build((8, 8), latent=2), torch.ones(3, 8, 8), num_samples=50)
        >>> bool(torch.isin(resampled(draws).latents["z"], draws.latents["z"]).all())
        True
    """
    if draws.shared:
        raise ValueError(
            f"reweight: expected latents of single data alone, got {', '.join(draws.shared)}, of which all data share "
            "each draw and each would weigh it otherwise; leave reweight=None"
        )
    weights = _smoothed(draws)
    if len(wrong := (~weights.isfinite().all(0)).nonzero()[:, 0] + first):
        named = ", ".join(map(str, wrong[:5].tolist())) + (", ..." if len(wrong) > 5 else "")
        raise ValueError(
            f"reweight: expected weights of which some are above 0 and all are numbers, got others for {len(wrong)} "
            f"data: {named}; leave reweight=None"
        )
    rows = torch.multinomial(weights.T, len(weights), replacement=True).T

    def taken(value: Tensor) -> Tensor:
        index = rows.to(value.device).reshape(rows.shape + (1,) * (value.ndim - 2))
        return torch.take_along_dim(value, index, 0)

    def each(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: taken(value) for name, value in values.items()}

    return Draws(
        latents=each(draws.latents),
        shared={},
        log_prior=taken(draws.log_prior),
        log_likelihood=each(draws.log_likelihood),
        log_posterior=taken(draws.log_posterior),
    )


def _smoothed(draws: Draws) -> Tensor:
    """Weights of shape `(S, B)`, smoothed where their tail has a shape."""
    from arviz_stats.base import array_stats

    log_weights, _ = _exact(draws)
    weights = log_weights.softmax(0)
    fitted = shapes_and_sizes(draws)[0].isfinite()
    if fitted.any():
        # It takes log-likelihoods, of which the weights of leave-one-out are the reciprocals.
        smoothed, _ = array_stats.psislw(-log_weights[:, fitted].T.numpy(), axis=-1)
        weights[:, fitted] = torch.as_tensor(smoothed).T.softmax(0)
    return weights


def _exact(draws: Draws) -> tuple[Tensor, Tensor]:
    """Log-weights, and how much of each may be rounding, both of shape `(S, B)`."""
    return summed(draws.log_prior, *draws.log_likelihood.values(), -draws.log_posterior)
