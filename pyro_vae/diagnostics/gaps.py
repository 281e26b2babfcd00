"""What the ELBO loses, and by whose fault: that of the posterior's family, or of the encoder that picks one of it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from pyro_vae.diagnostics.khat import ROUNDING, TOLERATED_SHARE, largest_shape, pareto_shapes
from pyro_vae.diagnostics.verdict import Verdict
from pyro_vae.estimators.evidence import PARTICLES_AT_ONCE
from pyro_vae.estimators.particles import Particles, given, global_latents, local_sites, log_weights
from pyro_vae.estimators.terminal import progress_bar
from pyro_vae.evaluation import LatentSpace, annealed_log_likelihood, checked_batches
from pyro_vae.evaluation.annealed import mean_weight
from pyro_vae.evaluation.draws import check_whole
from pyro_vae.programs import Program, num_inputs, placement, undisturbed

__all__ = ["InferenceGap", "inference_gap"]

LEARNING_RATES = (3e-2, 3e-3, 3e-4)  # of Adam: parameters that stand alone want a large one, wide networks a small one
PILOT_DATA = 2  # on which the learning rate is chosen
FIT_PARTICLES = 16  # in each step of a fit
CHOICE_PARTICLES = 1000  # from which the better of two guides is told
FEWEST_PARTICLES = 100  # of fewer, neither the error of an ELBO nor the tail of the weights can be told
UNSURE = 0.7  # nats of Monte Carlo error: the weights are then worth about two draws (1 / sqrt 2)


@dataclass(frozen=True)
class InferenceGap:
    """What `inference_gap` found; tensors of shape `(N,)` in nats, float64, on the CPU.

    Attributes:
        log_evidence: The best estimate of log p(x).
        best_elbo: The ELBO of the guide's family at its best for the datum alone.
        elbo: The ELBO of the guide.
        errors: Monte Carlo standard errors of "log_evidence" and of the gaps "approximation", "amortization" (whose two
            ELBOs share random numbers) and "inference", by name.
        evidence: Mean log evidence of the data by each method that was tried.
        threshold: What the inference gap may be, in nats per datum.
        heavy: Share of the data whose evidence is by importance weights with a k-hat above 0.7 (see `khat`), or none.
    """

    log_evidence: Tensor
    best_elbo: Tensor
    elbo: Tensor
    errors: Mapping[str, Tensor]
    evidence: Mapping[str, float]
    threshold: float
    heavy: float = 0.0

    @property
    def approximation(self) -> Tensor:
        """What the best of the family misses of the evidence; below 0 only by Monte Carlo error."""
        return self.log_evidence - self.best_elbo

    @property
    def amortization(self) -> Tensor:
        """What the guide misses of the best of its family; below 0 only by Monte Carlo error."""
        return self.best_elbo - self.elbo

    @property
    def inference(self) -> Tensor:
        """What the guide misses of the evidence: the sum of both."""
        return self.log_evidence - self.elbo

    @property
    def means(self) -> dict[str, tuple[float, float]]:
        """Mean of each gap over the data, by name, and its standard error (of one datum, the Monte Carlo error)."""
        gaps = {name: getattr(self, name) for name in ("approximation", "amortization", "inference")}
        return {name: _mean(gap, self.errors[name]) for name, gap in gaps.items()}

    @property
    def verdict(self) -> Verdict:
        """Holds where the inference gap is at most the threshold, and two standard errors do not change that.

        None where the evidence of more than 10 % of the data is unsure: an error above 0.7 nats, or heavy weights.
        """
        if not self.inference.isfinite().all():
            return self._not_finite()
        means = self.means
        numbers = {name: f"{mean:.2f} ± {error:.2f}" for name, (mean, error) in means.items()}
        found = (
            f"inference gap {numbers['inference']} nats per datum, where {self.threshold:g} is the most: approximation "
            f"{numbers['approximation']}, amortization {numbers['amortization']}; {len(self.elbo)} data"
        )
        gap, error = means["inference"]
        if gap - 2 * error > self.threshold:
            return Verdict(False, found, self._advice())
        if not gap + 2 * error <= self.threshold:
            return Verdict(None, found, "more data (num_data)")
        if self.heavy > TOLERATED_SHARE:
            found += f"; the weights that the evidence is of have too heavy a tail in {self.heavy:.0%} of the data"
            return Verdict(None, found, "a richer or wider posterior, as the evidence may well be higher")
        if (self.errors["log_evidence"] > UNSURE).double().mean() > TOLERATED_SHARE:
            return Verdict(None, found, "more num_temperatures, as the evidence may well be higher than was found")
        return Verdict(True, found)

    def _not_finite(self) -> Verdict:
        unknown, found, of = self.inference.isnan().sum(), "the inference gap is", f"of {len(self.elbo)} data"
        if unknown:
            return Verdict(None, f"{found} not a number for {unknown} {of}", "finite data, parameters and densities")
        found += f" infinite for {self.inference.isinf().sum()} {of}"
        return Verdict(False, found, "a guide that draws no latents at which the model's density is zero")

    def _advice(self) -> str:
        remedies = {
            "approximation": "a richer posterior (FullNormal, Flow)",
            "amortization": "a larger encoder, longer training, or a SemiAmortized posterior",
        }
        # Of two gaps that are too much together, one at least is more than half of what they may be.
        return "; ".join(text for name, text in remedies.items() if self.means[name][0] > self.threshold / 2)


def inference_gap(
    program: Program,
    x: Any,
    num_data: int = 16,
    *,
    num_particles: int = 5000,
    num_chains: int = 16,
    num_temperatures: int = 300,
    steps: int = 300,
    threshold: float = 1.0,
    seed: int = 0,
    progress: bool = True,
) -> InferenceGap:
    r"""Approximation and amortization gap of each datum: what the ELBO loses to the guide's family, and to its encoder.

    .. math:: \log p(x) - L(x, q(z \mid x)) = \underbrace{\log p(x) - \max_{q \in Q} L(x, q)}_\text{approximation}
              + \underbrace{\max_{q \in Q} L(x, q) - L(x, q(z \mid x))}_\text{amortization}

    The best of the family is that of a copy of the guide whose parameters, all of them, are fitted to the one datum
    against the model as it is, by Adam from where they are. A guide with a network can give one datum any output, and
    so all of its family; where the fit gains nothing, the guide itself is the best. The learning rate is the best of
    three on the first two data. Both ELBOs are then estimated by fresh particles.

    All estimates of the log evidence are lower bounds in expectation, and the one is taken whose mean less two standard
    errors is the highest: by importance sampling from the guide or from the best of its family, or by annealed
    importance sampling (but for latents that gradients cannot move freely: on a sphere, or with a support that depends
    on other latents). Where all are too low, so is the approximation gap.

    The KL divergence of the guide from the posterior is the inference gap. One nat, the threshold, is that of a normal
    whose mean is off by 1.4 of its standard deviations. Global latents are drawn once from the guide and all is given
    these. Data are fitted one at a time, and particles pass in parts of bounded size, so that memory is that of two
    copies of the program, of Adam's moments, and of the `num_data` data.

    Args:
        program: Any program that keeps its local sites in one plate named "data", whose guide has reparameterized draws
            and parameters to train.
        x: Tensor, array, `Dataset` or `DataLoader`.
        num_data: How many of the data, the first ones, are taken.
        num_particles: Particles a datum of the ELBOs and of importance sampling, at least 100.
        num_chains: Annealed chains a datum; 0 leaves annealed importance sampling out.
        num_temperatures: Number of their steps (see `evaluation.annealed_log_likelihood`).
        steps: Steps of the fit of each datum.
        threshold: What the inference gap may be, in nats per datum.
        seed: Seed of all random numbers.
        progress: Whether to show a progress bar past two seconds.

    Returns:
        An `InferenceGap`.

    Raises:
        ValueError: If a number is too small, draws of the guide are not reparameterized, it has no parameters to
            train, or the data do not suit the program.

    Reference:
        Cremer, Li and Duvenaud, 2018. Inference suboptimality in variational autoencoders.

    Example:
        >>> import pyro_vae
        >>> vae = pyro_vae.build((8, 8), latent=2)
        >>> found = inference_gap(vae, torch.ones(2, 8, 8), num_particles=100, num_temperatures=10, steps=10)
        >>> torch.allclose(found.approximation + found.amortization, found.inference)
        True
    """
    check_whole(1, num_data=num_data, steps=steps)
    check_whole(FEWEST_PARTICLES, num_particles=num_particles)
    if num_chains < 0 or num_chains == 1:
        raise ValueError(f"num_chains: expected at least 2, of which an error can be told, or 0, got {num_chains}")
    with undisturbed(program, seed), pyro.validation_enabled(False), progress_bar(2, progress) as begin:
        batch = _first(program, x, num_data)
        program = _given_global(program, batch)
        fits = _Fits(program, batch, num_particles, steps)
        weights = fits.log_weights(seed, begin("fitting the guide to each datum"))
        estimates = {
            name: mean_weight(each)[:2]
            for name, each in zip(("importance sampling", "importance sampling, fitted"), weights, strict=True)
        }
        if num_chains > 0 and _moves_freely(program, batch):
            annealed = annealed_log_likelihood(
                program,
                TensorDataset(*batch),
                num_chains,
                num_temperatures=num_temperatures,
                seed=seed,
                advance=begin("annealing"),
            )
            estimates["annealed importance sampling"] = annealed.log_evidence, annealed.error
    return _result(*weights, estimates, threshold, torch.finfo(placement(program)[1]).eps)


def _first(program: Program, x: Any, num_data: int) -> tuple[Any, ...]:
    """The first data, as one batch."""
    batches, found = [], 0
    for batch in checked_batches(program, x, 1).epoch(0):
        batches.append(tuple(item[: num_data - found] for item in batch))
        found += len(batches[-1][0])
        if found >= num_data:
            break
    return tuple(torch.cat(items) for items in zip(*batches, strict=True))


class _GivenGlobal(nn.Module):
    """A program whose global latents have these values: what remains is local."""

    def __init__(self, program: Program, values: Mapping[str, Tensor]):
        super().__init__()
        self.program, self.values = program, dict(values)
        self.num_inputs = num_inputs(program)

    def model(self, *batch: Any) -> None:
        given(self.program.model, self.values)(*batch)

    def guide(self, *batch: Any) -> None:
        given(self.program.guide, self.values)(*batch)


def _given_global(program: Program, batch: tuple[Any, ...]) -> Program:
    # In the shapes in which a program draws them by itself, which may be in plates of their own.
    drawn = global_latents(poutine.trace(program.guide).get_trace(*batch))
    return _GivenGlobal(program, drawn) if drawn else program


def _moves_freely(program: Program, batch: tuple[Any, ...]) -> bool:
    try:
        LatentSpace(program, *batch)
    except ValueError:
        return False
    return True


class _Fits:
    """The guide, and a copy of it that is fitted to one datum after another against the model of the original."""

    def __init__(self, program: Program, batch: tuple[Any, ...], num_particles: int, steps: int):
        self.program, self.batch = program, batch
        self.num_particles, self.steps = num_particles, steps
        self.copy = copy.deepcopy(program)
        self.parameters = self._trained()
        self.start = [parameter.detach().clone() for parameter in self.parameters]

    def log_weights(self, seed: int, advance: Callable[[float], Any]) -> tuple[Tensor, Tensor]:
        """Log-weights of the guide and of its family's best for each datum, each of shape `(K, N)`."""
        num_data = len(self.batch[0])
        pilots = range(min(PILOT_DATA, num_data))
        done = 1 / (num_data + len(pilots) * len(LEARNING_RATES))
        generator = torch.Generator().manual_seed(seed)
        seeds = torch.randint(2**62, (num_data,), generator=generator).tolist()
        reached = dict.fromkeys(LEARNING_RATES, 0.0)
        for lr in LEARNING_RATES:
            for i in pilots:
                self._fit(i, lr, seeds[i])
                reached[lr] += self._elbo(self._copied_guide, i, seeds[i])
                advance(done)
        best = max(reached, key=lambda lr: reached[lr] if math.isfinite(reached[lr]) else -math.inf)
        pairs = []
        for i in range(num_data):
            pairs.append(self._pair(i, best, seeds[i]))
            advance(done)
        own, fitted = zip(*pairs, strict=True)
        return torch.stack(own, 1), torch.stack(fitted, 1)

    def _pair(self, i: int, lr: float, seed: int) -> tuple[Tensor, Tensor]:
        """Log-weights of the guide and of its family's best for datum `i`, from the same random numbers."""
        self._fit(i, lr, seed)
        # The better one is told by other particles than those of the result, which would favour it.
        gained = self._elbo(self._copied_guide, i, seed + 1) > self._elbo(self.program.guide, i, seed + 1)
        own = self._weights(self.program.guide, i, seed + 2, self.num_particles)
        return own, self._weights(self._copied_guide, i, seed + 2, self.num_particles) if gained else own

    def _fit(self, i: int, lr: float, seed: int) -> None:
        """Fit the copy's guide to datum `i`, from where the guide is."""
        torch._foreach_copy_(self.parameters, self.start)
        torch.manual_seed(seed)
        # Of moments too small for normal numbers, as of pixels that are black, only this one takes no longer.
        optimizer = torch.optim.Adam(self.parameters, lr=lr, fused=True)
        for step in range(self.steps):
            optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / self.steps)) / 2
            gradients = self._gradients(self._datum(i), self.parameters)
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()

    def _gradients(self, batch: tuple[Any, ...], parameters: list[Tensor]) -> tuple[Tensor | None, ...]:
        """Of minus the ELBO per datum."""
        with torch.enable_grad():
            particles = Particles(self.program.model, self._copied_guide, batch, {}, FIT_PARTICLES)
            loss = -particles.log_weights.mean()
            return torch.autograd.grad(loss, parameters, allow_unused=True)

    def _trained(self) -> list[Tensor]:
        """The parameters of the copy's guide."""
        guide: Any = poutine.trace(self.program.guide).get_trace(*self.batch)
        for site in local_sites(guide, observed=False):
            if not site["fn"].has_rsample:
                raise ValueError(
                    "inference_gap: expected a guide with reparameterized draws, by which it can be fitted to a datum, "
                    f"got {type(site['fn']).__name__} at site {site['name']!r}"
                )
        parameters = [parameter for parameter in self.copy.parameters() if parameter.requires_grad]
        gradients: Any = [None]
        if parameters:
            gradients = self._gradients(self._datum(0), parameters)
        found = [each for each, gradient in zip(parameters, gradients, strict=False) if gradient is not None]
        if not found:
            raise ValueError(
                "inference_gap: expected a guide with parameters to fit to a datum, got one without parameters that "
                "require gradients (requires_grad_() thaws frozen ones)"
            )
        return found

    def _copied_guide(self, *batch: Any) -> None:
        # PyroModules of one name would share their parameters through the store.
        with pyro.get_param_store().scope():
            self.copy.guide(*batch)

    def _datum(self, i: int) -> tuple[Any, ...]:
        return tuple(item[i : i + 1] for item in self.batch)

    def _elbo(self, guide: Callable, i: int, seed: int) -> float:
        return self._weights(guide, i, seed, min(CHOICE_PARTICLES, self.num_particles)).mean().item()

    def _weights(self, guide: Callable, i: int, seed: int, num_particles: int) -> Tensor:
        """Log-weights of datum `i`, of shape `(K,)`."""
        torch.manual_seed(seed)
        sizes = [min(PARTICLES_AT_ONCE, num_particles - k) for k in range(0, num_particles, PARTICLES_AT_ONCE)]
        parts = [log_weights(self.program.model, guide, *self._datum(i), num_particles=size) for size in sizes]
        return torch.cat(parts)[:, 0].cpu().double()


def _result(
    own: Tensor, fitted: Tensor, estimates: Mapping[str, tuple[Tensor, Tensor]], threshold: float, precision: float
) -> InferenceGap:
    evidence = {name: estimate.mean().item() for name, (estimate, _) in estimates.items()}
    # Of several noisy ones the highest would be too high.
    surely = {name: evidence[name] - 2 * (error.norm() / len(error)).item() for name, (_, error) in estimates.items()}
    best = max(surely, key=lambda name: -math.inf if math.isnan(surely[name]) else surely[name])
    weights = {"importance sampling": own, "importance sampling, fitted": fitted}.get(best)
    log_evidence, error = estimates[best]
    return InferenceGap(
        log_evidence=log_evidence,
        best_elbo=fitted.mean(0),
        elbo=own.mean(0),
        errors={
            "log_evidence": error,
            "approximation": torch.hypot(error, _mean_error(fitted)),
            "amortization": _mean_error(fitted - own),
            "inference": torch.hypot(error, _mean_error(own)),
        },
        evidence=evidence,
        threshold=threshold,
        heavy=0.0 if weights is None else _heavy(weights, precision),
    )


def _heavy(log_weights: Tensor, precision: float) -> float:
    """Share of the data whose weights have a tail with a shape above what so many can be corrected for."""
    shapes, _ = pareto_shapes(log_weights, ROUNDING * precision * log_weights.abs())
    return (~(shapes <= largest_shape(len(log_weights)))).double().mean().item()  # so that NaN is one


def _mean_error(values: Tensor) -> Tensor:
    return values.std(0, correction=0) / math.sqrt(len(values))


def _mean(gap: Tensor, error: Tensor) -> tuple[float, float]:
    se = gap.std().item() / math.sqrt(len(gap)) if len(gap) > 1 else error.item()
    return gap.mean().item(), se
