"""Where Pyro's own estimators are silently wrong: one small rule a case."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from pyro import infer, poutine
from pyro.infer.tracegraph_elbo import TrackNonReparam
from pyro.ops.provenance import get_provenance
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_vae.estimators.particles import same
from pyro_vae.handlers import in_data_plate

__all__ = ["check"]


def check(estimator: Any, model: Callable, guide: Callable, *batch: Any) -> None:
    r"""Warn where one of Pyro's own estimators is silently wrong for a program, and say which estimator is right.

    The guide and the model are run on the batch, under the handlers around the call (`handlers.beta`, say), and their
    sites are looked at: scales, plates, reparameterization and, where it matters, which site depends on which.
    Estimators that are not Pyro's pass. Random numbers outside are left as they were; `programs.undisturbed` around
    the call does the same for training modes and for the param store.

    Args:
        estimator: The estimator.
        model: A Pyro model that keeps its local sites in one plate named "data", `dim=-1`.
        guide: Its guide.
        *batch: Arguments of both.

    Raises:
        ValueError: If the estimator needs reparameterized sites, and the program has others.

    Warns:
        UserWarning: One line for each way in which the loss or its gradient is not what it says to be.

    Example:
        >>> import pyro_vae
        >>> from pyro.infer import RenyiELBO
        >>> vae = pyro_vae.build((8, 8), latent=2)
        >>> check(RenyiELBO(num_particles=8), vae.model, vae.guide, torch.zeros(5, 8, 8))
        >>> vae.size = 1000
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     check(RenyiELBO(num_particles=8), vae.model, vae.guide, torch.zeros(5, 8, 8))
        >>> str(caught[0].message).partition(";")[2]
        ' use estimators.IWAE, Renyi or ReweightedWakeSleep'
    """
    rules = [rule for rule in RULES if isinstance(estimator, rule.estimators)]
    if not rules:
        return
    with torch.no_grad():
        program = _Program(model, guide, batch)
        found = [(rule, rule.find(estimator, program)) for rule in rules]
    for rule, names in found:
        if names:
            sites = ", ".join(repr(name) for name in sorted(names)) if names is not True else ""
            message = f"{type(estimator).__name__} {rule.problem.format(sites=sites, estimator=estimator)}"
            if rule.refused:
                raise ValueError(message)
            warnings.warn(message, stacklevel=2)


class _Program:
    """A model and a guide, traced once, and what the rules ask of them."""

    def __init__(self, model: Callable, guide: Callable, batch: tuple[Any, ...]):
        self.programs = {"model": model, "guide": guide}
        self.batch = batch
        with self._same_noise():
            self.trace = poutine.trace(guide).get_trace(*batch)
        self.guide = _sample_sites(self.trace)
        self.model = self.sites("model", self.trace)
        self.latents = {name: site for name, site in self.model.items() if not site["is_observed"]}
        self.observed = {name: site for name, site in self.model.items() if site["is_observed"]}
        self.pairs = [(name, site, self.guide[name]) for name, site in self.latents.items() if name in self.guide]
        self.auxiliary = self.guide.keys() - self.model.keys()
        self.unreparameterized: list[str] = [name for name, site in self.guide.items() if not _has_rsample(site)]
        sites = [*self.model.values(), *self.guide.values()]
        subsampled = any(not same(_plate_scale(site), 1.0) for site in sites)
        weights = [site["scale"] / _plate_scale(site) for site in sites]
        self.weighted: bool = not all(same(weights[0], weight) for weight in weights)
        self.scaled: bool = subsampled or not (self.weighted or same(weights[0], 1.0))
        # With a global latent, a batch has one weight; with local ones alone, each datum has its own.
        self.factorizes: bool = all(in_data_plate(site) for site in [*self.latents.values(), *self.guide.values()])
        self.num_data: int = max(
            (f.size for site in sites for f in site["cond_indep_stack"] if f.name == "data"), default=1
        )

    def sites(self, program: str, trace: Any) -> dict[str, Any]:
        """Sample sites of the model or the guide, with the latents of `trace`."""
        with self._same_noise():
            return _sample_sites(
                poutine.trace(poutine.replay(self.programs[program], trace=trace)).get_trace(*self.batch)
            )

    def changed_by(self, name: str, program: str) -> set[str]:
        """Sites of the model or the guide whose distribution depends on the latent `name`, all others held fixed."""
        site, before = self.guide[name], self.sites(program, self.trace)
        with self._same_noise():
            draws = [site["fn"].sample() for _ in range(5)]  # one may change nothing by chance, as a sum of classes
        changed = set()
        for draw in draws:
            trace = self.trace.copy()
            trace.nodes[name] = {**site, "value": draw}
            after = self.sites(program, trace)
            others = before.keys() & after.keys() - {name}
            changed |= {key for key in others if not torch.equal(_log_prob(before[key]), _log_prob(after[key]))}
        return changed

    def descendants(self, name: str) -> set[str]:
        """Sites of the guide that depend on its latent `name`, over others too."""
        found: set[str] = set()
        new = {name}
        while new:
            new = {child for parent in new for child in self.changed_by(parent, "guide")} - found
            found |= new
        return found

    def tracked(self) -> dict[str, dict[str, Any]]:
        """Sites of model and guide as TraceGraph_ELBO sees them: values know what they come from."""
        with self._same_noise(), TrackNonReparam():
            guide = poutine.trace(self.programs["guide"]).get_trace(*self.batch)
            model = poutine.trace(poutine.replay(self.programs["model"], trace=guide)).get_trace(*self.batch)
        return {"model": _sample_sites(model), "guide": _sample_sites(guide)}

    def _same_noise(self) -> AbstractContextManager[None]:
        """Runs that are compared must not differ by dropout: each starts from the generators' state, and leaves it."""
        devices = [tensor.device for tensor in self.batch if isinstance(tensor, Tensor) and tensor.is_cuda]
        return torch.random.fork_rng(devices[:1])


def _sample_sites(trace: Any) -> dict[str, Any]:
    return {
        name: site for name, site in trace.nodes.items() if site["type"] == "sample" and not site_is_subsample(site)
    }


def _log_prob(site: Any) -> Tensor:
    return site["fn"].log_prob(site["value"])


def _has_rsample(site: Any) -> bool:
    return getattr(site["fn"], "has_rsample", False)


def _plate_scale(site: Any) -> float:
    scale = 1.0
    for frame in site["cond_indep_stack"]:
        scale *= (frame.full_size or frame.size) / frame.size
    return scale


def _frames(site: Any) -> set[str]:
    return {frame.name for frame in site["cond_indep_stack"]}


def _mask(site: Any) -> Any:
    return True if site["mask"] is None else site["mask"]


def _closed_form(q: Any, p: Any) -> bool:
    try:
        torch.distributions.kl_divergence(q["fn"], p["fn"])
    except NotImplementedError:
        return False
    return True


# What the rules look for: each gives the sites that are in the way, or whether anything is.


def _unreparameterized_data(estimator: Any, program: _Program) -> list[str]:
    return [name for name, site in program.observed.items() if not _has_rsample(site)]


def _not_enumerated(estimator: Any, program: _Program) -> list[str]:
    infers = {name: program.guide[name]["infer"] for name in program.unreparameterized}
    return [name for name, how in infers.items() if not how.get("enumerate") or how.get("num_samples") is not None]


def _enumerated_in_turn(estimator: Any, program: _Program) -> list[str]:
    return [name for name, site in program.guide.items() if site["infer"].get("enumerate") == "sequential"]


def _averages_weights(estimator: Any, program: _Program) -> bool:
    """Whether there is a log-sum-exp over more than one term, where a scale has no place."""
    if isinstance(estimator, infer.TraceTMC_ELBO):
        return any(site["infer"].get("enumerate") for site in [*program.guide.values(), *program.latents.values()])
    return estimator.num_particles > 1


def _auxiliary_outside_plate(estimator: Any, program: _Program) -> list[str]:
    shared = set.intersection(*map(_frames, program.model.values())) if program.model else set()
    return [name for name in program.auxiliary if not shared <= _frames(program.guide[name])]


def _without_auxiliary_cost(estimator: Any, program: _Program) -> list[str]:
    if not program.auxiliary:
        return []
    return [name for name in program.unreparameterized if program.auxiliary & {name, *program.descendants(name)}]


def _with_later_sites(estimator: Any, program: _Program) -> list[str]:
    if len(program.guide) == 1:
        return []
    names = program.guide.keys() - set(program.unreparameterized)
    return [name for name in names if program.changed_by(name, "guide")]


def _scaled_on_one_side(estimator: Any, program: _Program) -> list[str]:
    return [
        name
        for name, p, q in program.pairs
        if not (same(p["scale"], q["scale"]) and same(_mask(p), _mask(q))) and _closed_form(q, p)
    ]


def _not_mean_field(estimator: Any, program: _Program) -> list[str]:
    names = [name for name, _, _ in program.pairs]
    if names == [name for name in program.guide if name in program.latents]:  # the same order is enough
        return []
    children = {name: program.changed_by(name, "model") for name in names}
    wrong = []
    for name, p, q in program.pairs:
        parents = {parent for parent in names if name in children[parent]}
        if _closed_form(q, p) and parents & program.descendants(name):
            wrong.append(name)
    return wrong


def _untracked(estimator: Any, program: _Program) -> list[str]:
    names = [name for name in program.unreparameterized if name in program.latents]
    tracked = program.tracked() if names else {}
    return [
        name
        for name in names
        for role, sites in tracked.items()
        if any(name not in get_provenance(_log_prob(sites[child])) for child in program.changed_by(name, role))
    ]


def _with_children_outside_plate(estimator: Any, program: _Program) -> list[str]:
    names = []
    for name in _not_enumerated(estimator, program):
        outside = {child for child, site in program.model.items() if not _frames(program.guide[name]) <= _frames(site)}
        if outside and outside & program.changed_by(name, "model"):
            names.append(name)
    return names


def _local(estimator: Any, program: _Program) -> list[str]:
    return [name for name, site in program.latents.items() if in_data_plate(site)]


def _compiled(estimator: Any, program: _Program) -> bool:
    return any(name.endswith(("_surrogate_loss", "_differentiable_loss")) for name in vars(estimator))


class _Rule(NamedTuple):
    """Of which estimators it is, what it looks for, the sentence after the estimator's name, and whether it refuses."""

    estimators: tuple[type, ...]
    find: Callable[[Any, _Program], Any]
    problem: str
    refused: bool = False


RULES: tuple[_Rule, ...] = (
    _Rule(
        (infer.TraceMeanField_ELBO, infer.TraceTailAdaptive_ELBO, infer.Trace_MMD, infer.EnergyDistance),
        lambda estimator, program: program.unreparameterized,
        "takes sites with rsample only, got {sites} without; use Trace_ELBO, TraceGraph_ELBO or estimators.VIMCO",
        refused=True,
    ),
    _Rule(
        (infer.EnergyDistance,),
        _unreparameterized_data,
        "draws data, and has no gradient through sites without rsample, got {sites}; use Trace_ELBO",
        refused=True,
    ),
    _Rule(
        (infer.RenyiELBO, infer.TraceTMC_ELBO, infer.ReweightedWakeSleep),
        lambda estimator, program: program.scaled and _averages_weights(estimator, program),
        "has a scale (N/B of a subsampled plate, say) inside its log-sum-exp and may report more than the evidence; "
        "use estimators.IWAE, Renyi or ReweightedWakeSleep",
    ),
    _Rule(
        (infer.RenyiELBO, infer.TraceTMC_ELBO, infer.ReweightedWakeSleep),
        lambda estimator, program: program.weighted and _averages_weights(estimator, program),
        "is no bound where latent and observed sites have different weights; "
        "beta belongs to estimators that have no log-sum-exp, such as Trace_ELBO",
    ),
    _Rule(
        (infer.RenyiELBO,),
        lambda estimator, program: program.unreparameterized,
        "with alpha={estimator.alpha:g} gives the guide no right gradient (none at all for alpha=0) "
        "at {sites} without rsample; use estimators.VIMCO or estimators.ReweightedWakeSleep",
    ),
    _Rule(
        (infer.RenyiELBO,),
        _auxiliary_outside_plate,
        "counts {sites} of the guide, outside the plate, once for every datum; use Trace_ELBO",
    ),
    _Rule(
        (infer.TraceTMC_ELBO,),
        _not_enumerated,
        "gives the guide no gradient at {sites} without rsample; use estimators.VIMCO or TraceEnum_ELBO",
    ),
    _Rule(
        (infer.TraceTMC_ELBO,),
        _enumerated_in_turn,
        "adds up the logarithms of what it enumerates in turn at {sites}; use config_enumerate(guide, 'parallel')",
    ),
    _Rule(
        (infer.ReweightedWakeSleep,),
        lambda estimator, program: program.factorizes and program.num_data > 1,
        "gives a whole batch one importance weight, where each datum should have its own; "
        "use estimators.ReweightedWakeSleep",
    ),
    _Rule(
        (infer.ReweightedWakeSleep,),
        _with_later_sites,
        "lets gradients of later sites of the guide flow back through {sites}, to be held fixed; "
        "use estimators.ReweightedWakeSleep",
    ),
    _Rule(
        (infer.TraceTailAdaptive_ELBO,),
        lambda estimator, program: estimator.num_particles > 1,
        "ranks particles wrongly (the smallest weight counts most; pyro issue 3170), and whole batches at once; "
        "use estimators.Renyi",
    ),
    _Rule(
        (infer.TraceMeanField_ELBO,),
        _scaled_on_one_side,
        "takes the guide's scale and mask at {sites}, where the model's differ; use Trace_ELBO",
    ),
    _Rule(
        (infer.TraceMeanField_ELBO,),
        _not_mean_field,
        "needs a guide in which nothing that a site depends on in the model comes from it, and got {sites}; "
        "use Trace_ELBO",
    ),
    _Rule(
        (infer.TraceGraph_ELBO,),
        _untracked,
        "loses track of what depends on {sites} (by an operation in place, or a Python number) "
        "and leaves it out of the gradient; use Trace_ELBO",
    ),
    _Rule(
        (infer.TraceEnum_ELBO,),
        _with_children_outside_plate,
        "leaves what depends on {sites} outside its plate out of the gradient; use Trace_ELBO",
    ),
    _Rule(
        (infer.Trace_ELBO,),
        _without_auxiliary_cost,
        "leaves auxiliary sites of the guide out of the gradient at {sites}; use TraceGraph_ELBO",
    ),
    _Rule(
        (infer.Trace_MMD,),
        _local,
        "compares q at {sites} given this batch with the prior, and not the aggregate over data, and no scale "
        "(N/B, beta) reaches that; use estimators.MMD",
    ),
    _Rule(
        (infer.EnergyDistance,),
        lambda estimator, program: estimator.prior_scale > 0,
        "sums log p(z) over its particles; divide prior_scale by num_particles={estimator.num_particles}",
    ),
    _Rule(  # TraceMeanField's compiles in every call
        (infer.JitTrace_ELBO, infer.JitTraceGraph_ELBO, infer.JitTraceEnum_ELBO),
        _compiled,
        "is compiled, and computes the loss of the program of its first call; use a new one for every program",
    ),
    _Rule(
        (infer.JitTrace_ELBO, infer.JitTraceGraph_ELBO, infer.JitTraceEnum_ELBO),
        lambda estimator, program: program.weighted or program.scaled,
        "keeps the scales (beta, N/B) of its first call; use the one without Jit where they change",
    ),
)
