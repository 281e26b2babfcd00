"""Names of variables and dimensions, and what may be asked of an export."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from inspect import Parameter, signature
from typing import Any

import torch
import yaml
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from pyro_vae.evaluation.draws import check_whole
from pyro_vae.programs import Program

__all__ = ["check_names", "check_options", "check_order", "companions", "numbered", "safe", "text_of", "x_dims"]


def companions(program: Program, count: int) -> list[str]:
    """Names of what the model takes beside x, as it calls them."""
    names: list[str] = []
    for parameter in list(signature(program.model).parameters.values())[1:]:
        if parameter.kind is Parameter.VAR_POSITIONAL:
            rest = count - len(names)
            names += [parameter.name] if rest == 1 else [f"{parameter.name}_{i}" for i in range(rest)]
        elif parameter.kind is not Parameter.VAR_KEYWORD:
            names.append(parameter.name)
    return names[:count]


def x_dims(event_shape: torch.Size, columns: tuple[str, ...] | None) -> tuple[str, ...]:
    """Dimensions of a value of x: of an image, of a table with names of columns, or of all else."""
    if len(event_shape) == 3:
        return "channel", "height", "width"
    return ("column",) if len(event_shape) == 1 and columns else numbered("x", len(event_shape))


def numbered(name: str, ndim: int) -> tuple[str, ...]:
    """Dimensions as ArviZ names them."""
    return tuple(f"{name}_dim_{i}" for i in range(ndim))


def safe(name: str) -> str:
    """The name of a site without what separates groups."""
    return name.replace("/", ".")


def check_names(sites: Iterable[str]) -> None:
    """Raise where two sites would be one variable."""
    known: dict[str, str] = {}
    for site in sites:
        if (other := known.setdefault(safe(site), site)) != site:
            raise ValueError(f"expected sites whose names differ by more than '/' and '.', got {other!r} and {site!r}")


def check_order(source: Any, labels: Any, coords: Mapping[str, Any] | None) -> None:
    """Raise where labels or names of data would come to stand beside other data than theirs."""
    given = [*(["labels"] if labels is not None else []), *(["coords['datum']"] if "datum" in (coords or {}) else [])]
    if not given or not isinstance(source, DataLoader):
        return
    in_order = isinstance(source.sampler, SequentialSampler)
    if not in_order or type(source.batch_sampler) not in (BatchSampler, type(None)):
        raise ValueError(
            f"{given[0]}: expected a DataLoader that keeps the order of its data, got one with a sampler of its own; "
            "take shuffle=False, or the Dataset"
        )


def text_of(config: Mapping[str, Any] | str) -> str:
    """A configuration as YAML."""
    if isinstance(config, str):
        return config
    try:
        return yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
    except (TypeError, ValueError, yaml.YAMLError):
        raise ValueError("config: expected text, or a mapping of text, numbers and lists by name, got other") from None


def check_options(
    num_samples: int,
    num_prior_samples: int,
    chunk: int | None,
    reweight: str | None,
    coords: Mapping[str, Any] | None,
) -> None:
    """Raise where options of `to_arviz` are not what they may be."""
    check_whole(1, num_samples=num_samples)
    check_whole(0, num_prior_samples=num_prior_samples)
    if chunk is not None:
        check_whole(1, chunk=chunk)
    if "draw" in (coords or {}) and num_prior_samples not in (0, num_samples):
        raise ValueError(
            f"coords: expected none for 'draw' where numbers of draws differ, got {num_samples} and, of the prior, "
            f"{num_prior_samples}"
        )
    if reweight not in (None, "psis"):
        raise ValueError(f"reweight: expected None or 'psis', got {reweight!r}")
