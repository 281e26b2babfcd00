"""Draws of a program, chunk by chunk of its data, as variables with named dimensions."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from pyro_vae import likelihoods
from pyro_vae.data import InMemory
from pyro_vae.distributions import innermost
from pyro_vae.estimators.particles import global_latents
from pyro_vae.estimators.terminal import progress_bar
from pyro_vae.evaluation.batches import checked_batches
from pyro_vae.evaluation.draws import Draws, data_sites, posterior_draws, predictive_draws, prior_draws
from pyro_vae.evaluation.generation import observed_sites
from pyro_vae.export.names import (
    check_names,
    check_options,
    check_order,
    companions,
    numbered,
    safe,
    text_of,
    x_dims,
)
from pyro_vae.export.stores import Variables
from pyro_vae.export.weights import resampled, shapes_and_sizes
from pyro_vae.programs import Program, undisturbed

__all__ = ["Chunks"]

VALUES_AT_ONCE = 2**22  # values of x in the draws of a chunk: 16 MiB in float32, ten to twenty times that in all
LEAST_VALUES = 128  # what a datum counts for at least, since layers of a network are wider than small data

_CONDITIONAL = (
    "log p(x | z) of each datum at draws of its own latents, given the decoder's weights. loo on it is conditional on "
    "these weights, even of data that they were learned from. Where latents belong to single data it is the harmonic "
    "mean estimate of the log evidence, with heavy-tailed ratios: see k-hat, and prefer importance-weighted evidence."
)
_STATISTICS = {
    "log_weights": "log p(x, z) - log q(z | x) of each draw, in nats, unscaled",
    "khat": "shape of the Pareto tail of the importance weights; NaN of too few draws, -inf of equal weights. Of a "
    "program with global latents each draw has its own, where diagnostics.khat gives all weights one draw of them, and "
    "k-hat may be higher here",
    "ess": "effective number of draws: 1 / sum of squares of the smoothed weights, normalized",
}
_SAMPLE = ("chain", "draw")


class Chunks:
    """Draws of a program, chunk by chunk of its data.

    Args:
        program: The program.
        x: Its data.
        num_samples: As all that follow, an argument of `to_arviz`.
        num_prior_samples: See there.
        labels: See there.
        coords: See there.
        chunk: See there.
        reweight: See there.
        seed: See there.
        config: See there.

    Attributes:
        attributes: Of the tree.
        num_data: Number of data.

    Raises:
        ValueError: As `to_arviz` does.

    Example:
        >>> import pyro_vae
        >>> chunks = Chunks(pyro_vae.build((8, 8), latent=2), torch.ones(5, 8, 8), num_samples=30, chunk=2)
        >>> chunks.each(lambda groups, rows: print(rows, groups["posterior"]["z"][1].shape))
        slice(0, 2, None) (1, 30, 2, 2)
        slice(2, 4, None) (1, 30, 2, 2)
        slice(4, 5, None) (1, 30, 1, 2)
    """

    def __init__(
        self,
        program: Program,
        x: Any,
        *,
        num_samples: int,
        num_prior_samples: int | None = None,
        labels: Any = None,
        coords: Mapping[str, Any] | None = None,
        chunk: int | None = None,
        reweight: str | None = None,
        seed: int = 0,
        config: Mapping[str, Any] | str | None = None,
    ):
        self.num_prior_samples = num_samples if num_prior_samples is None else num_prior_samples
        check_options(num_samples, self.num_prior_samples, chunk, reweight, coords)
        self.program, self.num_samples, self.reweight, self.seed = program, num_samples, reweight, seed
        self.batches = checked_batches(program, x, 1)
        self.num_data = self.batches.num_data
        check_order(self.batches.source, labels, coords)
        self.paired = labels is not None or "datum" in (coords or {})  # with the data, one for one
        first, sites = self._first()
        values = max(first[0].numel(), LEAST_VALUES) * max(num_samples, self.num_prior_samples)
        self.chunk = min(chunk or max(1, VALUES_AT_ONCE // values), self.num_data)
        self.batches.batch_size = self.chunk
        self.parts = _parts(sites, self.batches.source)
        self.names = companions(program, len(first) - 1)
        if labels is not None and "label" in self.names:
            raise ValueError("labels: expected none, as the program takes some by that name itself, got others")
        self.labels = self._labels(labels)
        self.x_dims = x_dims(first[0].shape[1:], self._columns())
        self.coords = self._known_coords() | {name: np.asarray(values) for name, values in (coords or {}).items()}
        self.wanted = set(coords or {})  # coordinates whose dimension has not come yet
        self.attributes = self._attributes(config)
        self.shared: dict[str, Tensor] | None = None
        self.prior_shared: dict[str, Tensor] | None = None

    def each(self, take: Callable[[Mapping[str, Variables], slice], Any], progress: bool = False) -> None:
        """Give groups of each chunk to `take`, with the rows that it is of."""
        start = 0
        with (
            undisturbed(self.program, self.seed),
            pyro.validation_enabled(False),
            progress_bar(self.num_data, progress) as begin,
        ):
            advance = begin("draws")
            for chunk in self._chunks():
                rows = slice(start, start + len(chunk[0]))
                if rows.stop > self.num_data:
                    raise ValueError(f"data: expected each of {self.num_data} data at most once, got more")
                take(self._groups(chunk, rows), rows)
                gc.collect(1)  # what was written to Zarr is held in cycles, and would add up
                advance(len(chunk[0]))
                start = rows.stop
        if self.paired and start != self.num_data:
            raise ValueError(
                f"labels and coords['datum']: expected a DataLoader that gives all {self.num_data} data, got {start}; "
                "take drop_last=False, or the Dataset"
            )

    def _first(self) -> tuple[tuple[Tensor, ...], list[Any]]:
        """The first datum, and the sites where the model observes it; what other sites are is kept."""
        with undisturbed(self.program, self.seed), pyro.validation_enabled(False):
            first = tuple(tensor[:1] for tensor in next(self.batches.epoch(0)))
            guide, model = self._traces(first)
        sites = observed_sites(model)
        check_names(site["name"] for site in sites)
        local = data_sites(model)
        x = {site["name"] for site in sites}
        self.factors = {site["name"] for site in local if isinstance(site["fn"], dist.Unit)}
        self.others = [site["name"] for site in local if site["name"] not in x | self.factors]
        stacks = {site["name"]: site["cond_indep_stack"] for site in guide.nodes.values() if site["type"] == "sample"}
        self.plated = {name for name, stack in stacks.items() if any(f.vectorized and f.dim == -1 for f in stack)}
        return first, sites

    def _traces(self, batch: tuple[Tensor, ...]) -> tuple[Any, Any]:
        guide: Any = poutine.trace(self.program.guide).get_trace(*batch)
        return guide, poutine.trace(poutine.replay(self.program.model, guide)).get_trace(*batch)

    def _chunks(self) -> Iterator[tuple[Tensor, ...]]:
        for batch in self.batches.epoch(0):  # which a loader makes of a size of its own
            yield from zip(*(tensor.split(self.chunk) for tensor in batch), strict=True)

    def _groups(self, batch: tuple[Tensor, ...], rows: slice) -> dict[str, Variables]:
        draws = posterior_draws(self.program, *batch, num_samples=self.num_samples, shared=self.shared)
        self.shared = draws.shared
        check_names([*draws.latents, *draws.shared])
        khat, ess = shapes_and_sizes(draws)
        if self.reweight:
            draws = resampled(draws, rows.start)
        predicted = predictive_draws(self.program, *batch, draws=draws)
        groups = {
            "posterior": self._latents(draws.latents, draws.shared),
            "posterior_predictive": self._data(predicted, drawn=True),
            "log_likelihood": self._log_likelihood(draws),
            "sample_stats": _statistics(draws.log_weights, khat, ess),
            **self._prior(batch, set(draws.latents)),
            "observed_data": self._data(batch[0], drawn=False) | self._observed_beside(batch),
            "constant_data": self._constants(batch[1:], rows),
        }
        return self._with_coordinates({name: group for name, group in groups.items() if group}, rows)

    def _observed_beside(self, batch: tuple[Tensor, ...]) -> Variables:
        """Values of sites where something else than x is observed."""
        if not self.others:
            return {}
        variables: Variables = {}
        model = self._traces(batch)[1]
        for site in self.others:
            value, shape, name = model.nodes[site]["value"], model.nodes[site]["fn"].event_shape, safe(site)
            value = value.expand(len(batch[0]), *shape)
            variables[name] = (("datum", *numbered(name, len(shape))), _array(value), {})
        return variables

    def _prior(self, batch: tuple[Tensor, ...], names: set[str]) -> dict[str, Variables]:
        """Draws from the model alone, where global latents are those of the model too, and not of the guide."""
        if self.num_prior_samples == 0:
            return {}
        if self.prior_shared is None:
            plate = pyro.plate("samples", self.num_prior_samples, dim=-2)
            self.prior_shared = global_latents(poutine.trace(plate(self.program.model)).get_trace(*batch))
        latents, x = prior_draws(self.program, *batch, num_samples=self.num_prior_samples, shared=self.prior_shared)
        latents = {name: value for name, value in latents.items() if name in names}  # and no data but x
        return {"prior": self._latents(latents, self.prior_shared), "prior_predictive": self._data(x, drawn=True)}

    def _latents(self, latents: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> Variables:
        variables: Variables = {}
        for site, value in latents.items():
            name, ndim = safe(site), value.ndim - 2
            dims = ("latent",) if site == "z" and ndim == 1 else numbered(name, ndim)
            variables[name] = ((*_SAMPLE, "datum", *dims), _array(value)[None], {})
        for site, value in shared.items():
            # Draws stand at dim=-2. At dim=-1 is one, in place of data, or a plate that is the latent's own.
            value = value if site in self.plated or value.shape[1] > 1 else value[:, 0]
            name = safe(site)
            variables[name] = ((*_SAMPLE, *numbered(name, value.ndim - 1)), _array(value)[None], {})
        return variables

    def _data(self, x: Tensor, drawn: bool) -> Variables:
        """Data of shape `(B, *event_shape)`, or draws of them, by site."""
        leading: tuple[str, ...] = (*_SAMPLE, "datum") if drawn else ("datum",)
        values = [x]
        if self.parts[0].width is not None:
            values = list(x.flatten(2 if drawn else 1).split([part.width or 0 for part in self.parts], -1))
        variables: Variables = {}
        for part, value in zip(self.parts, values, strict=True):
            name, integers = safe(part.name), part.drawn if drawn else part.given
            dims = self.x_dims if part.width is None else numbered(name, 1)
            if part.width == 1:  # one column is a scalar, as its log-likelihood is
                value, dims = value[..., 0], ()
            array = _array(value if integers is None else value.to(integers))
            variables[name] = ((*leading, *dims), array[None] if drawn else array, {})
        return variables

    def _log_likelihood(self, draws: Draws) -> Variables:
        attributes = {"description": _CONDITIONAL, "units": "nats"}
        return {
            safe(name): ((*_SAMPLE, "datum"), _array(value.double())[None], attributes)
            for name, value in draws.log_likelihood.items()
            if name not in self.factors
        }

    def _constants(self, companions: tuple[Tensor, ...], rows: slice) -> Variables:
        variables: Variables = {} if self.labels is None else {"label": (("datum",), self.labels[rows], {})}
        for name, value in zip(self.names, companions, strict=True):
            variables[name] = (("datum", *numbered(name, value.ndim - 1)), _array(value), {})
        return variables

    def _with_coordinates(self, groups: dict[str, Variables], rows: slice) -> dict[str, Variables]:
        for group in groups.values():
            sizes = {
                dim: size for dims, values, _ in group.values() for dim, size in zip(dims, values.shape, strict=True)
            }
            if lost := sorted(sizes.keys() & group.keys()):
                raise ValueError(f"expected sites that have other names than dimensions, got {', '.join(lost)}")
            group.update({dim: ((dim,), self._coordinate(dim, size, rows), {}) for dim, size in sizes.items()})
            self.wanted -= set(sizes)
        if self.wanted:
            known = sorted({name for group in groups.values() for name, (dims, *_) in group.items() if dims == (name,)})
            raise ValueError(f"coords: expected some of the dimensions {known}, got {sorted(self.wanted)}")
        return groups

    def _coordinate(self, dim: str, size: int, rows: slice) -> np.ndarray:
        expected = self.num_data if dim == "datum" else size
        values = self.coords.get(dim, np.arange(expected))
        if values.shape != (expected,):
            raise ValueError(f"coords: expected {expected} values for {dim!r}, got an array of shape {values.shape}")
        return values[rows] if dim == "datum" else values

    def _columns(self) -> tuple[str, ...] | None:
        own = getattr(self.batches.source, "columns", None)
        return own or getattr(getattr(self.program, "likelihood", None), "columns", None)

    def _known_coords(self) -> dict[str, np.ndarray]:
        """Names of a table's columns."""
        columns = self._columns()
        if columns is None:
            return {}
        known, start = {"column": np.asarray(columns)}, 0
        for part in self.parts:
            if part.width is not None:
                known[f"{safe(part.name)}_dim_0"] = np.asarray(columns[start : start + part.width])
                start += part.width
        return known

    def _labels(self, labels: Any) -> np.ndarray | None:
        if labels is None and not self.names:
            labels = getattr(self.batches.source, "y", None)
        if labels is None:
            return None
        values = _array(labels) if isinstance(labels, Tensor) else np.asarray(labels)
        if values.shape != (self.num_data,):
            raise ValueError(f"labels: expected {self.num_data}, one a datum, got an array of shape {values.shape}")
        return values.astype("int8") if values.dtype == bool else values

    def _attributes(self, config: Mapping[str, Any] | str | None) -> dict[str, Any]:
        kind = type(self.program)
        found = {
            "creation_library": "pyro_vae",
            "creation_library_version": version("pyro-vae"),
            "inference_library": "pyro",
            "inference_library_version": version("pyro-ppl"),
            "torch_version": version("torch"),
            "program": f"{kind.__module__}.{kind.__qualname__}",
            "seed": self.seed,
            "num_samples": self.num_samples,
            "chunk": self.chunk,
            "reweight": self.reweight or "none",
        }
        if config is None:
            return found
        return found | {"config": text_of(config)}


class _Part(NamedTuple):
    """A site where x is observed: all of it at "x", the next of its columns at "x.<part>".

    Attributes:
        name: The site's name.
        width: Number of columns; None where it is all of x.
        drawn: Integer dtype of what is drawn there; None of floats.
        given: Integer dtype of the data there; None of floats.
    """

    name: str
    width: int | None
    drawn: torch.dtype | None
    given: torch.dtype | None


def _parts(sites: list[Any], source: Any) -> list[_Part]:
    whole = [site["name"] for site in sites] == ["x"]
    grey = not isinstance(source, InMemory) or source.grey  # of a stream nobody knows
    return [
        _Part(site["name"], None if whole else site["fn"].event_shape.numel(), *_integers(site["fn"], grey))
        for site in sites
    ]


def _integers(fn: Any, grey: bool) -> tuple[torch.dtype | None, torch.dtype | None]:
    """Dtypes of integers that hold a distribution's draws, and the data; None of floats."""
    if isinstance(innermost(fn), dist.Bernoulli | likelihoods.Bernoulli):
        return torch.int8, None if grey else torch.int8
    return (torch.int64, torch.int64) if fn.support.is_discrete else (None, None)


def _statistics(log_weights: Tensor, khat: Tensor, ess: Tensor) -> Variables:
    dims, values = ((*_SAMPLE, "datum"), ("datum",), ("datum",)), (log_weights.double()[None], khat, ess)
    named = zip(_STATISTICS.items(), dims, values, strict=True)
    return {name: (own, _array(value), {"description": text}) for (name, text), own, value in named}


def _array(value: Tensor) -> np.ndarray:
    """Values in a dtype that all formats know."""
    value = value.detach().cpu()
    if value.dtype is torch.bool:
        value = value.to(torch.int8)
    return (value.float() if value.dtype in (torch.float16, torch.bfloat16) else value).numpy()
