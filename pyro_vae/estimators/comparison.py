"""Estimators side by side: bound, gap to the evidence, gradient noise, time and memory."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from statistics import median
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_vae.estimators.checks import check
from pyro_vae.estimators.evidence import PARTICLES_AT_ONCE, VALUES_AT_ONCE, Evidence, estimate_evidence
from pyro_vae.estimators.gradients import leaves, loss_to_differentiate
from pyro_vae.estimators.measures import Moments, peak_memory
from pyro_vae.estimators.particles import local_sites, log_prob
from pyro_vae.estimators.terminal import print_table, progress_bar
from pyro_vae.handlers import data_frame
from pyro_vae.programs import Program, num_inputs, placement, undisturbed

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["compare"]

PARTS = ("model", "guide")
MEASURES = {  # name: units and description
    "bound": ("nats per datum", "bound on the log-evidence: minus the loss, mean over repeats"),
    "bound_se": ("nats per datum", "standard error of the bound"),
    "gap": ("nats per datum", "reference less bound"),
    "gradient_variance": ("nats^2 per datum^2", "variance of a coordinate of the gradient, mean over coordinates"),
    "gradient_snr": ("1", "signal-to-noise ratio of the gradient"),
    "milliseconds": ("ms", "loss and gradient, median over repeats"),
    "memory": ("MiB", "memory at the peak of loss and gradient"),
    "reference": ("nats per datum", "log-evidence by importance sampling"),
    "reference_se": ("nats per datum", "Monte Carlo standard error of the reference"),
}


def compare(
    program: Program,
    batch: Any,
    estimators: Mapping[str, ELBO],
    *,
    repeats: int = 64,
    reference_particles: int = 5000,
    seed: int = 0,
    progress: bool = True,
) -> xr.Dataset:
    r"""Compare estimators on one batch of a program: bound, gap, gradient noise, milliseconds and memory.

    Each estimator takes `repeats` losses and gradients :math:`g` of the loss per datum, all of them on the same seeds.

    .. math:: \text{bound} = -\frac{\text{loss}}{N}, \qquad \text{gap} = \log \hat p(x) - \text{bound}, \qquad
              \text{variance} = \frac{\operatorname{tr} \operatorname{Var} g}{\dim g}, \qquad
              \text{SNR} = \frac{\lVert E\, g \rVert}{\sqrt{\operatorname{tr} \operatorname{Var} g}}

    Variance and SNR are those of the model's parameters and of the guide's apart: of those that the log-density of
    either depends on at fixed latents (a parameter may be of both). The squared norm of the mean gradient is taken less
    the :math:`\operatorname{tr} \operatorname{Var} g / \text{repeats}` that noise adds to it, and an SNR of 0 is one
    that so few repeats do not tell from none. Of an estimator whose loss is no bound, as with free bits, the bound is
    minus the loss all the same; where the loss is infinite, as in tail-adaptive inference, it is NaN.
    The reference leaves latents outside the plate out, and the gap then includes their divergence.

    The program is in eval mode, as in evaluation, so that there is no dropout. Its mode, gradients, RNG state and the
    param store are left as they were. The memory is what the tensors of a step take at its peak, gradients included.

    Args:
        program: Any program that keeps its local sites in one plate named "data".
        batch: The arguments of model and guide: a tensor, or a tuple of them, of which those that the program does not
            take (labels, say) are left out.
        estimators: Estimators by name, Pyro's own among them.
        repeats: Losses and gradients of each, at least 2.
        reference_particles: Particles a datum of the reference log-evidence.
        seed: Seed of all random numbers.
        progress: Whether to show the table, and a progress bar past two seconds.

    Returns:
        A `Dataset` with dimensions `estimator` and `part` (model, guide): `bound`, `bound_se` and `gap` and the scalars
        `reference` and `reference_se` in nats per datum, `gradient_variance`, `gradient_snr`, `milliseconds`, and
        `memory` in MiB (NaN on devices that do not tell).

    Raises:
        ValueError: If an argument is out of range, or an estimator does not suit the program, with its name.

    Warns:
        UserWarning: Where an estimator is silently wrong for the program (see `check`).

    Reference:
        Rainforth et al., 2018. Tighter variational bounds are not necessarily better (signal-to-noise ratio).

    Example:
        >>> import pyro_vae
        >>> from pyro.infer import Trace_ELBO
        >>> from pyro_vae.estimators import IWAE
        >>> vae, x = pyro_vae.build((8, 8), latent=2), torch.ones(3, 8, 8)
        >>> found = compare(vae, x, {"ELBO": Trace_ELBO(), "IWAE": IWAE(8)}, repeats=16, progress=False)
        >>> bool(found.gap.sel(estimator="IWAE") < found.gap.sel(estimator="ELBO"))
        True
        >>> found.gradient_snr.dims
        ('estimator', 'part')
    """
    _check_arguments(estimators, repeats, reference_particles)
    seeds = torch.randint(2**62, (repeats,), generator=torch.Generator().manual_seed(seed)).tolist()
    store = pyro.get_param_store()
    trained = store.get_state()
    with undisturbed(program, seed), store.scope(trained), torch.enable_grad():
        bench = _Bench(program, batch)
        with bench.own_gradients():
            for name, estimator in estimators.items():
                bench.attempt(name, estimator)
            with pyro.validation_enabled(False), progress_bar(1 + len(estimators), progress) as advance:
                torch.manual_seed(seed)
                reference = bench.reference(reference_particles, advance(f"{reference_particles:,} particles"))
                found = [bench.measure(estimator, seeds, advance(name)) for name, estimator in estimators.items()]
    attributes = {"repeats": repeats, "reference_particles": reference_particles, "seed": seed}
    dataset = _dataset(list(estimators), found, reference, attributes | bench.attributes)
    if progress:
        print_table(dataset)
    return dataset


def _check_arguments(estimators: Any, repeats: int, reference_particles: int) -> None:
    if not isinstance(estimators, Mapping) or not estimators:
        raise ValueError(f"expected estimators by name, such as {{'ELBO': Trace_ELBO()}}, got {estimators!r}")
    for name, estimator in estimators.items():
        if not isinstance(estimator, ELBO):
            raise ValueError(f"{name}: expected an estimator such as Trace_ELBO(), got {estimator!r}")
    if repeats < 2:
        raise ValueError(f"repeats: expected at least 2, which a variance needs, got {repeats}")
    if reference_particles < 1:
        raise ValueError(f"reference_particles: expected a positive number, got {reference_particles}")


class _Bench:
    """A program on a batch, where one estimator after another is measured."""

    def __init__(self, program: Program, batch: Any):
        self.program = program
        self.device, dtype = placement(program)
        batch = batch if isinstance(batch, tuple | list) else (batch,)
        self.batch = tuple(_placed(item, self.device, dtype) for item in batch[: num_inputs(program)])
        guide = poutine.trace(program.guide).get_trace(*self.batch)
        latents = _sampled(guide)
        # A latent's value too: a point estimate's density has no gradient.
        guide_total = sum(log_prob(site).sum() + site["value"].sum() for site in latents)
        for site in latents:
            site["value"] = site["value"].detach()
        model = poutine.trace(poutine.replay(program.model, trace=guide)).get_trace(*self.batch)
        model_total = sum(log_prob(site).sum() for site in _sampled(model))
        totals = zip(PARTS, (model_total, guide_total), strict=True)
        self.parts = {part: list(leaves(torch.as_tensor(total))) for part, total in totals}
        self.parameters = {*itertools.chain(*self.parts.values(), program.parameters())}
        self.num_data: int = data_frame(local_sites(guide, observed=False)[0]).full_size
        self.values = sum(site["value"].numel() for site in local_sites(model, observed=True))

    @property
    def attributes(self) -> dict[str, Any]:
        """What was measured, as plain numbers and text."""
        packages = {"pyro_vae": "pyro-vae", "pyro": "pyro-ppl", "torch": "torch"}
        versions = {name: version(package) for name, package in packages.items()}
        return {
            "num_data": self.num_data,
            "program": type(self.program).__name__,
            "device": str(self.device),
        } | versions

    @contextmanager
    def own_gradients(self) -> Iterator[None]:
        """Gradients that parameters have already are kept, and given back."""
        before = {parameter: parameter.grad for parameter in self.parameters}
        try:
            yield
        finally:
            for parameter, gradient in before.items():
                parameter.grad = gradient

    def step(self, estimator: ELBO) -> float:
        """A loss, which leaves its gradient in the parameters."""
        loss = loss_to_differentiate(estimator, self.program.model, self.program.guide, *self.batch)
        if loss.requires_grad:
            loss.backward()
        return loss.item()

    def clear(self) -> None:
        """Remove all gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def attempt(self, name: str, estimator: ELBO) -> None:
        """A first step, so that one that does not suit is told of before the long work, and the others are warm."""
        self.clear()
        try:
            check(estimator, self.program.model, self.program.guide, *self.batch)
            self.step(estimator)
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{name}: {error}") from error
        if all(parameter.grad is None for parameter in self.parameters):
            kind = type(self.program).__name__
            raise ValueError(f"{name}: no parameter of {kind} has a gradient; does it call declare_parameters?")

    def reference(self, num_particles: int, advance: Callable[[float], None]) -> Evidence:
        """The log-evidence."""
        at_once = max(1, min(PARTICLES_AT_ONCE, VALUES_AT_ONCE // max(1, self.values)))
        programs = self.program.model, self.program.guide
        return estimate_evidence(*programs, *self.batch, num_particles=num_particles, at_once=at_once, advance=advance)

    def measure(self, estimator: ELBO, seeds: Sequence[int], advance: Callable[[float], None]) -> dict[str, Any]:
        """What there is to know of an estimator, by the names of `MEASURES`."""
        bounds, times, moments = [], [], Moments({*itertools.chain(*self.parts.values())})
        for seed in seeds:
            self.clear()
            torch.manual_seed(seed)
            start = time.perf_counter()
            bounds.append(-self.step(estimator) / self.num_data)  # a number, for which an accelerator has waited
            times.append(1000 * (time.perf_counter() - start))
            moments.add(self.num_data)
            advance(1 / len(seeds))
        self.clear()
        torch.manual_seed(seeds[0])
        mean, se = _mean_and_error(bounds)
        return {
            "bound": mean,
            "bound_se": se,
            "gradient_variance": [moments.variance(self.parts[part]) for part in PARTS],
            "gradient_snr": [moments.snr(self.parts[part]) for part in PARTS],
            "milliseconds": median(times),
            "memory": peak_memory(lambda: self.step(estimator), self.device),
        }


def _placed(item: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if not isinstance(item, Tensor):
        return item
    if item.dtype == torch.uint8:
        raise ValueError("expected a batch of floats or booleans, got uint8; data.to_float(x) gives floats")
    return item.to(device, dtype if item.is_floating_point() or item.dtype == torch.bool else None)


def _sampled(trace: Any) -> list[Any]:
    sites = [site for site in trace.nodes.values() if site["type"] == "sample"]
    return [site for site in sites if not site_is_subsample(site)]


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    all_values = torch.tensor(values, dtype=torch.float64)
    if not all_values.isfinite().all():
        return math.nan, math.nan
    return all_values.mean().item(), all_values.std().item() / math.sqrt(len(values))


def _dataset(names: list[str], found: list[dict], reference: Evidence, attributes: dict[str, Any]) -> xr.Dataset:
    import xarray as xr

    dataset = xr.Dataset(coords={"estimator": names, "part": list(PARTS)}, attrs=attributes)
    for name in found[0]:
        dims = ("estimator", "part") if name.startswith("gradient") else ("estimator",)
        dataset[name] = dims, [row[name] for row in found]
    dataset["reference"] = reference.log_evidence.mean().item()
    dataset["reference_se"] = reference.error.square().sum().sqrt().item() / len(reference.error)
    dataset["gap"] = dataset.reference - dataset.bound
    for name, (units, description) in MEASURES.items():
        dataset[name].attrs = {"units": units, "long_name": description}
    return dataset[list(MEASURES)]
