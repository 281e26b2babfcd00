"""The guide against Markov chains on the exact posterior, for a few data."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from pyro.infer import MCMC, NUTS
from torch import Tensor, nn

from pyro_vae.diagnostics.calibration import guide_draws, scalars
from pyro_vae.diagnostics.verdict import Verdict
from pyro_vae.estimators.terminal import progress_bar
from pyro_vae.evaluation import LatentSpace, checked_batches, posterior_draws
from pyro_vae.evaluation.draws import check_whole
from pyro_vae.programs import Program, undisturbed

__all__ = ["Nuts", "nuts"]

TOLERATED_SHARE = 0.1  # of dimensions, as with as many as a latent space has, a few are off in any guide
LARGEST_RHAT = 1.05  # the reference asks for 1.01, which short chains of many dimensions reach in few of these
FEWEST_DRAWS = 100  # effective ones: the error of a distance is then 0.13, below what distances are judged by
DIVERGENT_SHARE = 0.01
NORMAL_ERROR = 1.29  # expected distance of n normal draws to their distribution, times the root of n


@dataclass(frozen=True)
class Nuts:
    """What `nuts` found, for each of N data and D latent dimensions; tensors are float64, on the CPU.

    Attributes:
        names: The latent dimensions, such as "z[0]".
        guide_mean: Mean under the guide, of shape `(N, D)`, in units of the latent, as all means and scales.
        guide_scale: Standard deviation under the guide, of shape `(N, D)`.
        mean: Mean under the posterior, by the chains, of shape `(N, D)`.
        scale: Standard deviation under the posterior, of shape `(N, D)`.
        distance: Wasserstein distance of the marginals of guide and posterior, in standard deviations of the posterior,
            of shape `(N, D)`.
        error: What the distance would be, in expectation, if both were the same, for their draws are finitely many, of
            shape `(N, D)`.
        rhat: Rank-normalized split R-hat of the chains, of shape `(N, D)`.
        ess: Effective sample size of the chains, of bulk or tail, whichever is less, of shape `(N, D)`.
        divergences: Share of divergent transitions, of shape `(N,)`.
        threshold: What a distance may be at most, beside its error.
    """

    names: tuple[str, ...]
    guide_mean: Tensor
    guide_scale: Tensor
    mean: Tensor
    scale: Tensor
    distance: Tensor
    error: Tensor
    rhat: Tensor
    ess: Tensor
    divergences: Tensor
    threshold: float

    @property
    def mixed(self) -> Tensor:
        """Of which data the chains can be relied on, of shape `(N,)`."""
        # Compared so that NaN is no.
        mixed = (self.rhat <= LARGEST_RHAT) & (self.ess >= FEWEST_DRAWS)
        return mixed.all(1) & (self.divergences <= DIVERGENT_SHARE)

    @property
    def share(self) -> float:
        """Share of distances above the threshold and their error, over data with good chains."""
        above = self.distance > self.threshold + self.error
        return above[self.mixed].double().mean().item()

    @property
    def verdict(self) -> Verdict:
        """Holds where at most 10 % of the distances are above the threshold; None without chains to compare with."""
        good, of = int(self.mixed.sum()), len(self.mixed)
        if 2 * good < of or not good:
            found = (
                f"the chains are of use for {good} of {of} data: R-hat up to {self.rhat.max():.2f}, effective sample "
                f"from {self.ess.min():.0f}, divergences up to {self.divergences.max():.1%}"
            )
            return Verdict(None, found, "more warmup_steps and num_samples")
        found = (
            f"Wasserstein distance to NUTS above {self.threshold:g} standard deviations in {self.share:.0%} of "
            f"{len(self.names)} latent dimensions of {good} data, median {self.distance[self.mixed].median():.2f}"
        )
        if self.share <= TOLERATED_SHARE:
            return Verdict(True, found)
        ratio = (self.guide_scale / self.scale)[self.mixed].median().item()
        shift = ((self.guide_mean - self.mean).abs() / self.scale)[self.mixed].median().item()
        found += f"; scales {ratio:.2f} of the posterior's, means off by {shift:.2f} standard deviations (medians)"
        if shift > abs(math.log(ratio)):
            return Verdict(False, found, "a larger encoder, longer training, or SemiAmortized")
        return Verdict(False, found, "a richer posterior (Flow, FullNormal), or an estimator of many particles (IWAE)")


def nuts(
    program: Program,
    x: Any,
    *,
    num_data: int = 2,
    num_samples: int = 250,
    warmup_steps: int = 250,
    num_chains: int = 4,
    num_guide_samples: int = 4000,
    threshold: float = 0.2,
    seed: int = 0,
    progress: bool = True,
) -> Nuts:
    r"""Compare the guide with the No-U-Turn sampler on the exact posterior of single data.

    .. math:: W_{nd} = \frac{1}{\sigma_{nd}} \int \lvert Q_{nd}(t) - P_{nd}(t) \rvert\, dt

    where Q and P are the distribution functions of latent dimension d of datum n under the guide and under the
    posterior, and :math:`\sigma` the posterior's standard deviation. A distance of 0.2 is that of a mean off by 0.2, or
    of a normal scale off by a quarter.

    The chains are Pyro's NUTS in the space without constraints (see `evaluation.LatentSpace`), one after another in
    this process. Half of them start at draws from the prior, half at draws from the guide: where these end up in
    different modes, R-hat tells. Of data where R-hat is above 1.05, the effective sample below 100, or more than 1 % of
    the transitions diverge, nothing is concluded. Global latents are drawn once from the guide for all data at hand,
    and chains and guide are given these. Data are taken one by one, and of each all draws are held. Weights, RNG state,
    modes and param store are left as they were.

    Args:
        program: Any program that keeps its local sites in one plate named "data", with continuous latents.
        x: Tensor, array, `Dataset` or `DataLoader`.
        num_data: How many of the first data are taken: the chains of each take 20,000 to 60,000 gradients, which is ten
            seconds to two minutes.
        num_samples: Draws of each chain, after warmup, at least 4.
        warmup_steps: Steps to find a step size and a scale of each dimension.
        num_chains: Number of chains, at least 2, as R-hat compares them.
        num_guide_samples: Draws from the guide, of each datum.
        threshold: What a distance may be at most, in standard deviations of the posterior, beside its error.
        seed: Seed of all random numbers.
        progress: Whether to show a progress bar past two seconds.

    Returns:
        A `Nuts`.

    Raises:
        ValueError: If a latent is discrete, on a sphere, or of a support that depends on other latents, a number is too
            small, or the data do not suit the program.

    Reference:
        Hoffman and Gelman, 2014. The No-U-Turn sampler. Vehtari, Gelman, Simpson, Carpenter and Bürkner, 2021.
        Rank-normalization, folding, and localization: an improved R-hat.

    Example:
        >>> import pyro_vae
        >>> vae, x = pyro_vae.build((8, 8), latent=2), torch.ones(3, 8, 8)
        >>> found = nuts(vae, x, num_data=1, num_samples=10, warmup_steps=10, num_chains=2)
        >>> found.names, found.distance.shape
        (('z[0]', 'z[1]'), torch.Size([1, 2]))
    """
    check_whole(1, num_data=num_data, warmup_steps=warmup_steps)
    check_whole(2, num_chains=num_chains, num_guide_samples=num_guide_samples)
    check_whole(4, num_samples=num_samples)
    batches = checked_batches(program, x, 1)
    of = min(num_data, batches.num_data)
    with undisturbed(program, seed), _frozen(program), progress_bar(of, progress) as begin:
        rows: list[dict[str, Any]] = []
        for datum, shared in itertools.islice(_single_data(program, batches), of):
            space = LatentSpace(program, *datum, shared=shared)
            advance = begin(f"NUTS, datum {len(rows) + 1} of {of}")
            chains = _chains(space, num_samples, warmup_steps, num_chains, advance)
            rows.append(_compared(chains, guide_draws(program, datum, num_guide_samples, shared)))
    tensors = {name: torch.stack([row[name] for row in rows]) for name in rows[0] if name != "names"}
    return Nuts(rows[0]["names"], **tensors, threshold=threshold)


class _Chains(NamedTuple):
    """Draws of chains.

    Attributes:
        latents: Latents by site, of shape `(chains, draws, *event_shape)`.
        divergences: Share of transitions that diverged.
    """

    latents: dict[str, Tensor]
    divergences: float


def _single_data(program: Program, batches: Any) -> Iterator[tuple[tuple[Any, ...], dict[str, Tensor]]]:
    """Batches of one datum, and a draw from the guide of the global latents, which is that of the first batch."""
    shared = None
    for batch in batches.epoch(0):
        if shared is None:
            shared = posterior_draws(program, *batch, num_samples=1).shared
        for i in range(len(batch[0])):
            yield tuple(item[i : i + 1] for item in batch), shared


def _chains(
    space: LatentSpace, num_samples: int, warmup_steps: int, num_chains: int, advance: Callable[[float], None]
) -> _Chains:
    """Chains of NUTS, one after another, of a single datum."""
    starts = torch.cat([space.prior_draws(num_chains // 2), space.posterior_draws(num_chains - num_chains // 2)[0]])
    share = 1 / (num_chains * (num_samples + warmup_steps))
    moved, divergences = [], 0

    def potential(place: dict[str, Tensor]) -> Tensor:
        log_prior, log_likelihood = space.log_densities(place["u"][None, None])
        return -(log_prior + log_likelihood).sum()

    for start in starts[:, 0]:
        run = MCMC(
            NUTS(potential_fn=potential),
            num_samples,
            warmup_steps,
            initial_params={"u": start},
            hook_fn=lambda *_: advance(share),
            disable_progbar=True,
        )
        with torch.enable_grad():
            run.run()
        moved.append(run.get_samples()["u"])
        divergences += len(run.diagnostics()["divergences"]["chain 0"])
    return _Chains(space.latents(torch.stack(moved)), divergences / (num_chains * num_samples))


def _compared(chains: _Chains, draws: dict[str, Tensor]) -> dict[str, Any]:
    """What there is to tell of a datum, by the names of `Nuts`, with tensors of shape `(D,)`."""
    from arviz_stats.base import array_stats
    from scipy.stats import wasserstein_distance

    names, posterior = scalars(chains.latents)
    guide = scalars({name: draws[name] for name in chains.latents})[1][:, 0]
    axes = {"chain_axis": 0, "draw_axis": 1}
    with np.errstate(all="ignore"):  # of a chain that never moved
        bulk = array_stats.ess(posterior.numpy(), **axes)
        tail = array_stats.ess(posterior.numpy(), method="tail", prob=(0.05, 0.95), **axes)
        rhat = array_stats.rhat(posterior.numpy(), **axes)
    ess = torch.as_tensor(np.minimum(bulk, tail))
    pooled = posterior.flatten(0, 1)
    scale = pooled.std(0)
    distances = [wasserstein_distance(*pair) for pair in zip(pooled.T.numpy(), guide.T.numpy(), strict=True)]
    return {
        "names": names,
        "guide_mean": guide.mean(0),
        "guide_scale": guide.std(0),
        "mean": pooled.mean(0),
        "scale": scale,
        "distance": torch.tensor(distances, dtype=torch.float64) / scale,
        "error": NORMAL_ERROR * (1 / ess + 1 / len(guide)).sqrt(),
        "rhat": torch.as_tensor(rhat),
        "ess": ess,
        "divergences": torch.tensor(chains.divergences, dtype=torch.float64),
    }


@contextmanager
def _frozen(program: nn.Module) -> Iterator[None]:
    """Without gradients of the parameters, so that none are computed beside those of the latents."""
    trainable = [parameter for parameter in program.parameters() if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
