"""Whether the latents say anything of the data, and which of them do."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.diagnostics.verdict import Verdict
from pyro_vae.estimators.particles import given, local_sites, log_prob
from pyro_vae.evaluation import (
    ELBODecomposition,
    checked_batches,
    elbo_decomposition,
    posterior_draws,
    posterior_means,
)
from pyro_vae.programs import Program, undisturbed

__all__ = ["Collapse", "collapse"]

MOVED = 0.01  # variance over data of a posterior mean that makes a unit active (Burda et al., 2016)
SAID = 0.01  # nats per datum, below which a dimension says nothing: a squared correlation of 0.02
LEAST_INFORMATION = 0.1
NAMES = 6  # that a line has room for
SHARPEN = (
    "anneal=schedules.Linear(0.5) or Cyclical(4), estimators.FreeBits(nats), anneal=schedules.ControlVAE(rate), "
    "beta below 1, a decoder that sees less"
)


@dataclass(frozen=True)
class Collapse:
    """What `collapse` found; tensors are float64, on the CPU, of shape `(D,)` for D latent dimensions.

    Attributes:
        decomposition: The ELBO's terms, with the rate, the mutual information and the KL per dimension.
        variance: Variance over the data of each posterior mean, in squared units of the latent.
        active: Which dimensions the data move: those whose variance is above 0.01.
        dead: Which dimensions say nothing: those whose own mutual information with the datum is below 0.01 nats; where
            that cannot be told, whose KL is; where that cannot either, which are not active.
        least_information: Mutual information in nats per datum that counts as a use of the latents.
        decoded: By how many nats the log-likelihood of a datum changes, up or down, if it is given the latents of
            another, a mean over the first batch: nothing, where the decoder ignores them. NaN of one datum.
    """

    decomposition: ELBODecomposition
    variance: Tensor
    active: Tensor
    dead: Tensor
    least_information: float
    decoded: float

    @property
    def active_units(self) -> int:
        """Number of dimensions that the data move."""
        return int(self.active.sum())

    @property
    def dead_dimensions(self) -> tuple[str, ...]:
        """Names of the dimensions that say nothing."""
        return tuple(name for name, dead in zip(self.dimensions, self.dead.tolist(), strict=True) if dead)

    @property
    def dimensions(self) -> tuple[str, ...]:
        """Names of the dimensions."""
        return self.decomposition.dimensions

    @property
    def rate(self) -> float:
        """KL divergence from prior to posterior, in nats per datum."""
        return self.decomposition.rate

    @property
    def mutual_information(self) -> float:
        """What the latents say of which datum they belong to, in nats per datum."""
        return self.decomposition.mutual_information

    @property
    def verdict(self) -> Verdict:
        """Holds where latents and data have the mutual information, within two standard errors either way.

        Dimensions that are dead beside others that are not are no failure: a model has no use for them. It is the guide
        that is asked; if it holds and the decoder ignores what the guide says, the finding adds so.
        """
        found, dead = self.decomposition, self.dead_dimensions
        finding = (
            f"{found.mutual_information:.2f} nats of mutual information (at most {math.log(found.num_data):.2f} of "
            f"{found.num_data:,} data), rate {found.rate:.2f}, {self.active_units} of {len(self.dead)} units active"
        )
        numbers = (found.mutual_information, found.rate, found.errors["mutual_information"])
        if not all(map(math.isfinite, numbers)):
            return Verdict(False, f"{finding}: not finite", "to fit again with a smaller lr")
        if found.num_data < 2:
            return Verdict(None, "one datum has no mutual information with anything", "more data")
        beyond = found.mutual_information - self.least_information
        if abs(beyond) < 2 * found.errors["mutual_information"]:
            return Verdict(None, finding, "more samples: num_samples")
        if beyond < 0:
            return Verdict(False, f"{finding}: too little", SHARPEN)
        if self.decoded < SAID:
            ignored = "the decoder ignores them, as another datum's latents reconstruct the same"
            return Verdict(True, f"{finding}; but {ignored}", "inference_gap, as the true posterior says nothing then")
        if dead:
            some = ", ".join(dead[:NAMES]) + (f" and {len(dead) - NAMES} more" if len(dead) > NAMES else "")
            fewer = f"a latent of {len(self.dead) - len(dead)} would do; to use them all, estimators.FreeBits(nats)"
            return Verdict(True, f"{finding}; dead: {some}", fewer)
        return Verdict(True, finding)


def collapse(
    program: Program,
    x: Any,
    *,
    least_information: float = LEAST_INFORMATION,
    num_data: int | None = 2000,
    num_samples: int = 4,
    seed: int = 0,
    progress: bool = True,
) -> Collapse:
    r"""Look for posterior collapse: latents, or dimensions of them, that are the same whatever the datum.

    .. math:: \text{active} = \{d : \operatorname{Var}_x(E_{q(z \mid x)}[z_d]) > 0.01\}, \qquad
              I = E\Bigl[\log \frac{q(z \mid x)}{q(z)}\Bigr] \ge \text{least information}

    It is judged by the mutual information: active units alone mislead, as a mean that moves by a tenth of a standard
    deviation makes a unit active and says next to nothing, and a rate may be spent on a posterior that is off the prior
    for all data alike. At the default of 0.1 nats even one normal latent would have a squared correlation of 0.18 with
    what it stands for; collapsed models have far less, used latents a multiple.

    Variances are in the latent's own units, so that a threshold of 0.01 suits a prior of scale one; what is dead is
    told by nats. Of several latent sites, the means of those that depend on others are at one draw of these. Memory and
    time are those of `elbo_decomposition`.

    It is the guide that is asked, which may say much of the datum beside a decoder that ignores what it says: if so
    (another datum's latents reconstruct the same, within 0.01 nats), the check holds, and the finding says so.

    Args:
        program: Any program that keeps its local sites in one plate named "data".
        x: Tensor, array, `Dataset` or `DataLoader`.
        least_information: Mutual information in nats per datum that counts as a use of the latents.
        num_data: The ELBO is taken apart on the first so many data, as time grows with their square; None takes all.
            Variances are over all.
        num_samples: Draws of the latents for each datum.
        seed: Seed of the draws.
        progress: Whether to show a progress bar past two seconds.

    Returns:
        A `Collapse`.

    Raises:
        ValueError: If a number is not positive, or the data do not suit the program.

    Reference:
        Burda, Grosse and Salakhutdinov, 2016. Importance weighted autoencoders (active units). Hoffman and Johnson,
        2016. ELBO surgery. Dai, Wang and Wipf, 2020. The usual suspects? Reassessing blame for VAE posterior collapse
        (dimensions that are dead for want of a use).

    Example:
        >>> import pyro_vae, torch
        >>> vae = pyro_vae.build((8, 8), latent=2)
        >>> _ = torch.nn.init.zeros_(vae.posterior.net.layers[-1].weight)  # the same whatever the datum
        >>> print(collapse(vae, torch.rand(50, 8, 8).round()).verdict.finding)
        0.00 nats of mutual information (at most 3.91 of 50 data), rate 0.00, 0 of 2 units active: too little
    """
    if not least_information > 0:
        raise ValueError(f"least_information: expected a positive number, got {least_information}")
    found = elbo_decomposition(program, x, num_samples, num_data=num_data, seed=seed, progress=progress)
    variance = posterior_means(program, x, seed=seed).double().var(0, correction=0)
    active = variance > MOVED
    said = found.kl_per_dimension if found.information_per_dimension is None else found.information_per_dimension
    dead = ~active if said is None else said < SAID
    return Collapse(found, variance, active, dead, least_information, _decoded(program, x, seed))


def _decoded(program: Program, x: Any, seed: int) -> float:
    """By how much the log-likelihood of a datum changes, if each of a batch has the latents of the one before."""
    with undisturbed(program, seed), pyro.validation_enabled(False):
        batch = next(checked_batches(program, x, 1).epoch(0))
        if len(batch[0]) < 2:
            return math.nan
        draws = posterior_draws(program, *batch, num_samples=1)
        swapped = {name: value.roll(1, 1) for name, value in draws.latents.items()}
        model = given(pyro.plate("samples", 1, dim=-2)(program.model), swapped | draws.shared)
        trace: Any = poutine.trace(model).get_trace(*batch)
        sites = [site for site in local_sites(trace, observed=True) if site["name"] in draws.log_likelihood]
        other = torch.as_tensor(sum(log_prob(site).double() for site in sites)).expand(1, len(batch[0]))
        return (sum(value.double() for value in draws.log_likelihood.values()) - other).abs().mean().item()
