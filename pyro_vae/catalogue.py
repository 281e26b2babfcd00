"""What there is to swap: every component with its arguments, support and a line of description."""

from __future__ import annotations

import importlib
import inspect
from typing import NamedTuple

from pyro_vae.distributions import describe
from pyro_vae.expressions import names

__all__ = ["Entry", "entries"]

KINDS = {"prior": "priors", "likelihood": "likelihoods", "posterior": "posteriors", "net": "networks"}


class Entry(NamedTuple):
    """A component.

    Attributes:
        name: Its name in an expression.
        arguments: Its arguments as in Python, defaults included.
        support: What it is a distribution over; nothing for a network.
        summary: The first sentence of its documentation.
    """

    name: str
    arguments: str
    support: str
    summary: str


def entries(slot: str) -> list[Entry]:
    """The components of a slot: prior, likelihood, posterior or net.

    Raises:
        ValueError: For another slot.

    Example:
        >>> entries("prior")[0].support
        'real numbers'
    """
    if slot not in KINDS:
        raise ValueError(f"expected one of {', '.join(KINDS)}; got {slot!r}")
    module = importlib.import_module(f"pyro_vae.{KINDS[slot]}")
    return [_entry(name, getattr(module, name)) for name in names(slot)]


def _entry(name: str, cls: type) -> Entry:
    arguments = ", ".join(map(_argument, inspect.signature(cls).parameters.values()))
    support = getattr(cls, "support", None)
    if isinstance(support, property):  # another component's, as its documentation says
        support = "that of " + (support.__doc__ or "").splitlines()[0].rstrip(".").lower()
    elif support is not None:
        support = describe(support)
    return Entry(name, arguments, support or "", (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " "))


def _argument(parameter: inspect.Parameter) -> str:
    if isinstance(parameter.default, type) and parameter.default is not parameter.empty:
        return f"{parameter.name}={parameter.default.__name__}()"
    return str(parameter.replace(annotation=parameter.empty))
