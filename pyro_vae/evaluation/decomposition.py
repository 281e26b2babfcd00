"""What the ELBO pays for: reconstruction, information about the datum, total correlation, distance to the prior."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.estimators.divergences import by_dimension
from pyro_vae.estimators.evidence import VALUES_AT_ONCE
from pyro_vae.estimators.particles import Particles, given, local_sites, log_prob
from pyro_vae.estimators.terminal import progress_bar
from pyro_vae.evaluation.batches import checked_batches
from pyro_vae.evaluation.draws import check_whole, posterior_draws
from pyro_vae.programs import Program, undisturbed

__all__ = ["ELBODecomposition", "elbo_decomposition"]

ROWS = 1024  # draws of a block
WIDTH = 64  # values that a pair of draw and datum takes at least: of what is computed on the way to a density


@dataclass(frozen=True)
class ELBODecomposition:
    """The terms of the ELBO of N data, means over these in nats per datum.

    Attributes:
        reconstruction: Expected log-likelihood under the posterior.
        rate: KL divergence from the prior to the posterior of a datum.
        mutual_information: Of the latents and the index of the datum; at most `log(num_data)`.
        marginal_kl: KL divergence from the prior to the aggregate posterior q(z).
        total_correlation: KL divergence from the product of its dimensions to q(z); None where the dimensions of prior
            or posterior are not independent.
        dimension_wise_kl: KL divergence from the prior to q(z) of each dimension by itself, summed; None as above.
        kl_per_dimension: Share of each dimension in the rate, of shape `(D,)`; None where a site has dimensions that
            are not independent given the sites before it.
        information_per_dimension: Mutual information of each dimension by itself and the index of the datum, of shape
            `(D,)`; None as the total correlation is.
        errors: Monte Carlo standard error of each of the scalars above, by its name.
        dimensions: Names of the D latent dimensions, such as "z[0]".
        num_data: Number N of data.
        num_samples: Draws of the latents for each.
    """

    reconstruction: float
    rate: float
    mutual_information: float
    marginal_kl: float
    total_correlation: float | None
    dimension_wise_kl: float | None
    kl_per_dimension: Tensor | None
    information_per_dimension: Tensor | None
    errors: dict[str, float]
    dimensions: tuple[str, ...]
    num_data: int
    num_samples: int

    @property
    def elbo(self) -> float:
        """The evidence lower bound: reconstruction less rate."""
        return self.reconstruction - self.rate


def elbo_decomposition(
    program: Program,
    x: Any,
    num_samples: int = 4,
    *,
    num_data: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> ELBODecomposition:
    r"""Take the ELBO apart, with the aggregate posterior of all data that are given.

    .. math:: \text{ELBO} &= E[\log p(x \mid z)] - \text{rate}, \qquad q(z) = \tfrac1N \sum_n q(z \mid x_n) \\
        \text{rate} &= \underbrace{E\Bigl[\log \frac{q(z \mid x)}{q(z)}\Bigr]}_{\text{mutual information}}
        + \underbrace{\mathrm{KL}(q(z) \,\|\, p(z))}_{\text{marginal KL}} \\
        \mathrm{KL}(q(z) \,\|\, p(z)) &= \underbrace{\mathrm{KL}\Bigl(q(z) \,\Big\|\, \prod_j q(z_j)\Bigr)}_{\text{total
        correlation}} + \underbrace{\sum_j \mathrm{KL}(q(z_j) \,\|\, p(z_j))}_{\text{dimension-wise KL}}

    The mixture q(z) is that of all N data, and no estimate from minibatches. All terms are means over the same draws,
    so that they add up by identity. The second line of the marginal KL needs one latent site whose dimensions are
    independent, in prior and posterior; without, its terms are None and all else stands. Global latents are drawn once
    from the guide, and all is given these.

    Each draw is scored under the posterior of each datum: work and time grow with :math:`N^2 \cdot` `num_samples`, to
    some 10 seconds for 2,000 data, 4 draws and 50 dimensions on one core, and a few thousand data say most of it. The
    guide runs on blocks of pairs, again for each block, which is slow for a posterior of slow densities (an inverse
    autoregressive flow goes through its dimensions one by one, a `SemiAmortized` one takes its steps again). Memory
    holds the data, the draws, and 2^20 values a block.

    Args:
        program: Any program that keeps its local sites in one plate named "data".
        x: Tensor, array, `Dataset` or `DataLoader` of N data.
        num_samples: Draws of the latents for each datum. With one, standard errors are upper bounds.
        num_data: Take the first so many data alone; None takes all.
        seed: Seed of the draws.
        progress: Whether to show a progress bar past two seconds.

    Returns:
        An `ELBODecomposition`, in nats per datum.

    Raises:
        ValueError: If `num_samples` or `num_data` is not a positive whole number, or the data do not suit the program.

    Reference:
        Hoffman and Johnson, 2016. ELBO surgery: yet another way to carve up the variational evidence lower bound. Chen
        et al., 2018. Isolating sources of disentanglement in variational autoencoders.

    Example:
        >>> import pyro_vae
        >>> found = elbo_decomposition(pyro_vae.build((8, 8), latent=2), torch.rand(20, 8, 8).round())
        >>> abs(found.rate - found.mutual_information - found.total_correlation - found.dimension_wise_kl) < 1e-6
        True
        >>> found.mutual_information <= math.log(20)
        True
    """
    check_whole(1, num_samples=num_samples)
    if num_data is not None:
        check_whole(1, num_data=num_data)
    checked = checked_batches(program, x, num_samples)
    with (
        undisturbed(program, seed),
        pyro.validation_enabled(False),
        progress_bar(1, progress) as begin,
    ):
        advance = begin("aggregate posterior")
        batches = list(
            leading(checked.epoch(0), num_data)
        )  # once, as data may come in another order, or drawn anew, the next time
        shared = posterior_draws(program, *batches[0], num_samples=1).shared
        drawn = _joined([_draw(program, batch, num_samples, shared) for batch in batches])
        aggregate = _aggregate(program, batches, drawn, shared, advance)
    return _decomposed(drawn, *aggregate)


def leading(batches: Iterable[tuple[Tensor, ...]], num_data: int | None) -> Iterator[tuple[Tensor, ...]]:
    """Batches of the first so many data, or of all.

    Example:
        >>> [len(x) for (x,) in leading([(torch.zeros(3),), (torch.zeros(3),)], 4)]
        [3, 1]
    """
    left = math.inf if num_data is None else num_data
    for batch in batches:
        yield tuple(tensor[: int(min(left, len(tensor)))] for tensor in batch)
        left -= len(batch[0])
        if left <= 0:
            return


class _Drawn(NamedTuple):
    """Draws of the latents, `(S, N)` of all, and what they score under their own datum, float64."""

    latents: dict[str, Tensor]  # (S, N, *event_shape)
    log_prior: Tensor
    log_likelihood: Tensor
    log_posterior: Tensor
    by_dimension: tuple[Tensor, Tensor] | None  # log p and log q of each dimension, (S, N, D)


def _draw(program: Program, batch: tuple[Tensor, ...], num_samples: int, shared: dict[str, Tensor]) -> _Drawn:
    particles = Particles(program.model, program.guide, batch, {}, num_samples, reparameterized=False, shared=shared)
    shape = num_samples, len(batch[0])
    guide = particles.latents
    priors = {site["name"]: site for site in local_sites(particles.model, observed=False)}
    data = local_sites(particles.model, observed=True)
    model = [priors[site["name"]] for site in guide]

    def total(sites: list[Any]) -> Tensor:
        return torch.as_tensor(sum(log_prob(site).double() for site in sites)).expand(shape)

    each = None
    with suppress(ValueError):  # dimensions are not independent
        each = _by_dimension(model, shape).double(), _by_dimension(guide, shape).double()
    return _Drawn(
        latents={s["name"]: s["value"].expand(*shape, *_event_shape(s)) for s in guide},
        log_prior=total(model),
        log_likelihood=total(data),
        log_posterior=total(guide),
        by_dimension=each,
    )


def _event_shape(site: Any) -> torch.Size:
    return site["value"].shape[site["value"].ndim - site["fn"].event_dim :]


def _by_dimension(sites: list[Any], shape: tuple[int, ...]) -> Tensor:
    """Log-probabilities of each dimension, sites side by side, of shape `(*shape, D)`."""
    parts = []
    for site in sites:
        log_probs = log_prob(by_dimension(site, "elbo_decomposition leaves its terms out"))
        parts.append(log_probs.expand(*shape, *_event_shape(site)).reshape(*shape, -1))
    return torch.cat(parts, -1)


def _joined(parts: list[_Drawn]) -> _Drawn:
    names = parts[0].latents
    split = [part.by_dimension for part in parts if part.by_dimension is not None]
    return _Drawn(
        latents={name: torch.cat([part.latents[name] for part in parts], 1) for name in names},
        log_prior=torch.cat([part.log_prior for part in parts], 1),
        log_likelihood=torch.cat([part.log_likelihood for part in parts], 1),
        log_posterior=torch.cat([part.log_posterior for part in parts], 1),
        by_dimension=(torch.cat([p for p, _ in split], 1), torch.cat([q for _, q in split], 1)) if split else None,
    )


def _aggregate(
    program: Program,
    batches: Sequence[tuple[Tensor, ...]],
    drawn: _Drawn,
    shared: dict[str, Tensor],
    advance: Callable[[float], None],
) -> tuple[Tensor, Tensor | None]:
    """Log q(z) of each draw, `(S, N)`, and log q(z_j) of each of its dimensions, `(S, N, D)`, or None."""
    marginals = drawn.by_dimension is not None and len(drawn.latents) == 1
    flat = {name: value.flatten(0, 1) for name, value in drawn.latents.items()}
    shape, num_draws = drawn.log_prior.shape, drawn.log_prior.numel()
    width = max(WIDTH, sum(value[0].numel() for value in flat.values()))
    # Many draws and few data a block: the guide's networks, which see data, run the less often.
    rows = min(num_draws, ROWS)
    columns = max(1, VALUES_AT_ONCE // (rows * width))
    found = []
    for start in range(0, num_draws, rows):
        block = {name: value[start : start + rows, None] for name, value in flat.items()}
        mixture = _Mixture(marginals)
        for batch in _pieces(batches, columns):
            mixture.add(_scored(program, batch, block, shared), (min(rows, num_draws - start), len(batch[0])))
            advance(rows * len(batch[0]) / (num_draws * shape[1]))
        found.append(mixture)
    log_q = torch.cat([mixture.joint for mixture in found]).reshape(shape) - math.log(shape[1])
    if not marginals:
        return log_q, None
    return log_q, torch.cat([mixture.each for mixture in found]).reshape(*shape, -1) - math.log(shape[1])


class _Mixture:
    """Logs of running sums of densities, of draws and of each of their dimensions."""

    def __init__(self, marginals: bool):
        self.joint = self.each = torch.tensor(-torch.inf)
        self.marginals = marginals

    def add(self, sites: list[Any], shape: tuple[int, int]) -> None:
        """Add the densities, under some data's posteriors, of draws: `shape` is (draws, data)."""
        if self.marginals:
            each = _by_dimension(sites, shape)
            self.each = torch.logaddexp(self.each, each.logsumexp(1).double())
            total: Any = each.sum(-1)
        else:
            total = sum(map(log_prob, sites))
        self.joint = torch.logaddexp(self.joint, total.expand(shape).double().logsumexp(1))


def _pieces(batches: Sequence[tuple[Tensor, ...]], size: int) -> Iterator[tuple[Tensor, ...]]:
    for batch in batches:
        yield from zip(*(tensor.split(size) for tensor in batch), strict=True)


def _scored(program: Program, batch: tuple[Tensor, ...], block: dict[str, Tensor], shared: dict[str, Tensor]) -> Any:
    """The guide's local latents on these data, each draw of the block given to all of them."""
    size, num_data = len(next(iter(block.values()))), len(batch[0])
    latents = {name: value.expand(size, num_data, *value.shape[2:]) for name, value in block.items()}
    plate = pyro.plate("draws", size, dim=-2)
    trace: Any = poutine.trace(given(plate(program.guide), latents | shared)).get_trace(*batch)
    return local_sites(trace, observed=False)


def _decomposed(drawn: _Drawn, log_q: Tensor, log_q_each: Tensor | None) -> ELBODecomposition:
    terms = {
        "reconstruction": drawn.log_likelihood,
        "rate": drawn.log_posterior - drawn.log_prior,
        "mutual_information": drawn.log_posterior - log_q,
        "marginal_kl": log_q - drawn.log_prior,
    }
    if log_q_each is not None:
        terms["total_correlation"] = log_q - log_q_each.sum(-1)
        terms["dimension_wise_kl"] = log_q_each.sum(-1) - drawn.log_prior
    kl = information = None
    if drawn.by_dimension is not None:
        log_p_given, log_q_given = drawn.by_dimension
        kl = (log_q_given - log_p_given).mean((0, 1)).cpu()
        information = None if log_q_each is None else (log_q_given - log_q_each).mean((0, 1)).cpu()
    num_samples, num_data = drawn.log_prior.shape
    means = {name: value.mean().item() for name, value in terms.items()}
    return ELBODecomposition(
        reconstruction=means["reconstruction"],
        rate=means["rate"],
        mutual_information=means["mutual_information"],
        marginal_kl=means["marginal_kl"],
        total_correlation=means.get("total_correlation"),
        dimension_wise_kl=means.get("dimension_wise_kl"),
        kl_per_dimension=kl,
        information_per_dimension=information,
        errors={name: _error(value) for name, value in terms.items()},
        dimensions=_names(drawn.latents),
        num_data=num_data,
        num_samples=num_samples,
    )


def _error(values: Tensor) -> float:
    """Standard error of the mean of values `(S, N)`, whose draws are independent and whose data are fixed."""
    of_one = values.var(0).mean() if len(values) > 1 else values.var(correction=0)
    return (of_one / values.numel()).sqrt().item()


def _names(latents: dict[str, Tensor]) -> tuple[str, ...]:
    return tuple(
        name if value.ndim == 2 else f"{name}[{i}]"
        for name, value in latents.items()
        for i in range(value[0, 0].numel())
    )
