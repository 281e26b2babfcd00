"""Do the data suit the program? Asked before anything is computed from them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import constraints

from pyro_vae import likelihoods
from pyro_vae.data.batches import Batches
from pyro_vae.data.disk import OnDisk
from pyro_vae.data.sets import InMemory, to_float
from pyro_vae.distributions import Grid, describe, innermost
from pyro_vae.handlers import in_data_plate
from pyro_vae.programs import Program, check_param_sites, undisturbed

__all__ = ["check"]

_BINARIZE = 'binarize the data (data.load(..., binarize="dynamic")), or use a ContinuousBernoulli likelihood'
_AT_ONCE = 2**18  # values of a file that are floats at once, 1 MiB, which stays in a processor's cache


def check(program: Program, batches: Batches) -> None:
    """Check shapes and values of the data against the program, before anything is computed from them.

    Args:
        program: The program.
        batches: Its data. Data in memory are checked whole, a stream by its first batch. Data on disk are checked by
            their first batch, and from then on by `batches` as they are read: exposures, and values at sites whose
            support is the same in every batch.

    Raises:
        ValueError: If the event shape or the columns differ from the likelihood's, or values are outside its support.
            Of data on disk, as they are read, also if values are grey under a Bernoulli after a look that found 0 and
            1 alone.

    Warns:
        UserWarning: If grey values meet a Bernoulli likelihood.

    Example:
        >>> import pyro_vae
        >>> vae = pyro_vae.build((8, 8), latent=2)
        >>> check(vae, Batches(torch.zeros(10, 8, 9), vae, batch_size=10))
        Traceback (most recent call last):
        ...
        ValueError: x: expected data of event shape (8, 8), got (8, 9)
    """
    with undisturbed(program), pyro.validation_enabled(False):
        ordered = Batches(batches.source, program, batches.batch_size)
        likelihood = getattr(program, "likelihood", None)
        _check_columns(likelihood, ordered.source)
        first = next(ordered.epoch(0))
        batches.event_shape = tuple(first[0].shape[1:])
        batches.tests = []
        on_disk = isinstance(ordered.source, OnDisk)
        if getattr(likelihood, "exposure", False):
            _check_exposure((ordered.source.tensors if isinstance(ordered.source, InMemory) else first)[1])
            if on_disk:
                batches.tests.append(lambda _, exposure: _check_exposure(exposure))
        expected = getattr(likelihood, "event_shape", None)
        if expected is not None and tuple(first[0].shape[1:]) != tuple(expected):
            raise ValueError(f"x: expected data of event shape {tuple(expected)}, got {tuple(first[0].shape[1:])}")
        guide: Any = poutine.trace(program.guide).get_trace(*first)
        model: Any = poutine.trace(poutine.replay(program.model, trace=guide)).get_trace(*first)
        check_param_sites(program, pyro.get_param_store().get_state()["params"])
        _check_plates(guide)
        _check_plates(model)
        sites = [s for s in model.nodes.values() if s["type"] == "sample" and s["is_observed"] and in_data_plate(s)]
        sites = [site for site in sites if not site["infer"].get("_deterministic")]
        if not sites:
            raise ValueError(
                f'expected an observed site in a plate named "data" at dim=-1, got {list(model.nodes)[1:-1]}'
            )
        for site, columns in zip(sites, _columns_of(sites, first[0]), strict=True):
            wanted, got = tuple(site["fn"].batch_shape + site["fn"].event_shape), tuple(site["value"].shape)
            if wanted != got:
                raise ValueError(f"{site['name']}: expected data of shape {wanted}, got {got}")
            _check_site(_Wanted(site), site["value"], columns, ordered, batches)


def _check_site(wanted: _Wanted, seen: Tensor, columns: Any, ordered: Batches, batches: Batches) -> None:
    """Check the values of a site: all in memory, of others those seen, and of those on disk the rest later."""
    source = ordered.source
    whole = columns is not None and isinstance(source, InMemory)
    grey = wanted.check(_Parts(ordered, len(seen), columns) if whole else [seen])
    on_disk = isinstance(source, OnDisk)
    if on_disk and wanted.binary:
        grey = grey or source.grey
    if grey:
        warnings.warn(
            f"{wanted.site}: grey values under a Bernoulli are a loss and no likelihood; {_BINARIZE}", stacklevel=5
        )
    # What is binarized or dequantized as it is served is what was seen.
    if on_disk and columns is not None and not source.redrawn and (general := wanted.of_any_batch()):
        batches.tests.append(_OfDisk(general, columns, ordered.dtype, grey))


def _check_columns(likelihood: Any, source: Any) -> None:
    if likelihood is None or not isinstance(source, InMemory):
        return
    wanted = getattr(likelihood, "columns", None)
    if wanted is None and source.categories:
        names = list(source.categories)
        raise ValueError(
            f"data: expected columns of numbers, got text or categories in {', '.join(names)} "
            f"(a Heterogeneous likelihood takes them; --labels {names[0]} makes it the labels)"
        )
    if wanted is not None and source.columns is not None and tuple(wanted) != source.columns:
        raise ValueError(f"data: expected columns {', '.join(wanted)}, got {', '.join(source.columns)}")


def _check_exposure(exposure: Tensor) -> None:
    if not (exposure > 0).all():
        raise ValueError(f"exposure: expected values above 0, got {exposure.min().item():g}")


def _check_plates(trace: Any) -> None:
    for site in trace.nodes.values():
        if site["type"] == "sample" and in_data_plate(site) and not site_is_subsample(site):
            dims = {frame.name: frame.dim for frame in site["cond_indep_stack"] if frame.vectorized}
            if dims != {"data": -1}:
                raise ValueError(f'{site["name"]}: expected the plate "data" at dim=-1 alone, got {dims}')


def _columns_of(sites: list[Any], x: Tensor) -> Iterator[Any]:
    """What of the data stands at each site: all of it, for sites "x.<part>" the next columns, or None for else."""
    start = 0
    for site in sites:
        value: Tensor = site["value"]
        following: tuple[Any, ...] | None = None
        if value is x:
            following = (...,)
        elif site["name"].startswith("x.") and value.ndim == x.ndim:
            columns = (..., slice(start, start + value.shape[-1]))
            start += value.shape[-1]
            if value.shape == x[columns].shape and (value == x[columns]).all():
                following = columns
        yield following


class _Parts:
    """What will come to stand at a site, in parts of one size (supports may have bounds of the batch's shape)."""

    def __init__(self, batches: Batches, size: int, columns: Any):
        self.batches, self.size, self.columns = batches, size, columns

    def __iter__(self) -> Iterator[Tensor]:
        for start in range(0, self.batches.num_data, self.size):
            first = min(start, self.batches.num_data - self.size)  # the last part laps over
            rows = torch.arange(first, first + self.size, device=self.batches.device)
            yield self.batches.rows(rows)[0][self.columns]


class _Wanted:
    """What values at an observed site must be."""

    def __init__(self, site: Any):
        support, base = site["fn"].support, innermost(site["fn"])
        while isinstance(support, constraints.independent):
            support = support.base_constraint
        self.site, self.support, self.likelihood = site["name"], support, type(base).__name__.removeprefix("Soft")
        self.binary = self.likelihood == "Bernoulli"

    def check(self, parts: Iterable[Tensor]) -> bool:
        """Raise unless the values are in the support; whether they are grey where they should be 0 or 1."""
        grey = False
        for x in parts:
            if not self.support.check(x).all():
                wanted = f"values in the support of the {self.likelihood} likelihood ({describe(self.support)})"
                raise ValueError(f"{self.site}: expected {wanted}, got {_misfit(self.likelihood, self.support, parts)}")
            grey = grey or (self.binary and not ((x == 0) | (x == 1)).all().item())
        return grey

    def of_any_batch(self) -> _Wanted | None:
        """The same where the support is that of every batch, which bounds that differ within one are not."""
        general = copy.copy(self)
        general.support = _of_any_batch(self.support)
        return None if general.support is None else general


class _OfDisk:
    """The test of what is read from disk for a site, some data at a time, as they are much larger as floats."""

    def __init__(self, wanted: _Wanted, columns: Any, dtype: torch.dtype, may_be_grey: bool):
        self.wanted, self.columns, self.dtype, self.may_be_grey = wanted, columns, dtype, may_be_grey

    def __call__(self, x: Tensor, *_: Tensor) -> None:
        for part in x.split(max(1, _AT_ONCE // x[0].numel())):
            values = to_float(part[self.columns], self.dtype)
            if self.wanted.check([values]) and not self.may_be_grey:
                value = values[(values > 0) & (values < 1)][0].item()
                raise ValueError(
                    f"{self.wanted.site}: expected 0 and 1, as in the data looked at first, got {value:g}; {_BINARIZE}"
                )


def _of_any_batch(support: Any) -> Any:
    """A constraint with bounds that are all alike, such as a binomial's count, as numbers; None where they differ."""
    if isinstance(support, Tensor):
        low, high = support.min().item(), support.max().item()
        return low if low == high else None
    if isinstance(support, list | tuple):
        parts = [_of_any_batch(part) for part in support]
        return None if any(part is None for part in parts) else parts
    if not isinstance(support, constraints.Constraint):
        return support
    if constraints.is_dependent(support):
        return None
    general = copy.copy(support)
    for name, value in vars(support).items():
        setattr(general, name, _of_any_batch(value))
        if value is not None and getattr(general, name) is None:
            return None
    return general


def _misfit(name: str, support: Any, parts: Iterable[Tensor]) -> str:
    """The values that do not fit, and what would."""
    low, high = min(x.min().item() for x in parts), max(x.max().item() for x in parts)
    got = f"values from {low:g} to {high:g}"
    # Are the ends all that does not fit?
    if low >= 0 and high <= 1 and all(support.check(x.clamp(1e-6, 1 - 1e-6)).all() for x in parts):
        return f"{got}, of which 0 and 1 do not fit: dequantize grey levels (data.load(..., dequantize=256))"
    if isinstance(support, Grid):
        finer = (bins for bins in range(2, 257) if all(Grid(bins).check(x).all() for x in parts))
        if (bins := next(finer, None)) is not None:
            return f"{got}, on a grid of bins={bins}"
    fit = [other for other, known in _supports() if other != name and all(known.check(x).all() for x in parts)]
    return f"{got}; likelihoods that would fit: {', '.join(fit) or 'none'}"


def _supports() -> Iterator[tuple[str, Any]]:
    """Names of our likelihoods, with their supports where these depend on no argument."""
    for name in likelihoods.__all__:
        support = getattr(getattr(likelihoods, name), "support", None)
        if isinstance(support, constraints.Constraint) and not constraints.is_dependent(support):
            yield name, support
