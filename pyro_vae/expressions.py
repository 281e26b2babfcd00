"""Components as text, written as in Python: `MLP(hidden=[200, 200])`. Nothing is evaluated."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from pyro.infer import ELBO
from torch import nn

from pyro_vae.schedules import Schedule

__all__ = ["build", "parse", "write"]


class _Slot(NamedTuple):
    """Where the bare names of an argument are looked up, and what they must be."""

    modules: tuple[str, ...]
    base: type
    factory: bool = False  # whether the object is made later, by arguments that come first


_SLOTS = {
    "program": _Slot(("pyro_vae.programs",), nn.Module),
    "prior": _Slot(("pyro_vae.priors",), nn.Module),
    "likelihood": _Slot(("pyro_vae.likelihoods",), nn.Module),
    "posterior": _Slot(("pyro_vae.posteriors",), nn.Module),
    "net": _Slot(("pyro_vae.networks",), nn.Module),
    "estimator": _Slot(("pyro_vae.estimators", "pyro.infer"), ELBO),
    "anneal": _Slot(("pyro_vae.schedules",), Schedule),
    "optimizer": _Slot(("torch.optim",), torch.optim.Optimizer, factory=True),
}
_TRUSTED = ("pyro_vae", "pyro.infer", "torch.optim", "torch.nn")


def parse(text: str, slot: str, *, known: Mapping[str, Any] | None = None, trust: bool = True) -> Any:
    """Build the object that `text` describes, a call as in Python.

    Names are those of the slot's module (`prior`: `pyro_vae.priors`), or dotted (`my_package.MyPrior`). Arguments are
    literals or further calls. An argument that is left out and is known to the builder is filled in.

    Args:
        text: The expression, such as `"MLP(hidden=[200, 200])"`.
        slot: What it is to be: program, prior, likelihood, posterior, net, estimator, anneal, or optimizer, of which
            it gives the class or a `functools.partial`, to be called with the parameters.
        known: Values for arguments that the expression leaves out. `out_shape` gives `out_features` (times the
            component's `num_params`), and a text `network` is parsed for an argument `net`.
        trust: Whether names outside `pyro_vae` may be imported, which runs their module's code.

    Raises:
        ValueError: If the text is no such call, or a name or argument is unknown, with what there is.

    Example:
        >>> parse("MLP(hidden=[200, 200])", "net", known={"in_features": 784, "out_features": 40}).hidden
        (200, 200)
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        tree = None
    if not isinstance(tree, ast.Call | ast.Name | ast.Attribute):
        raise ValueError(f"{slot}: expected a call such as Name(argument=1), got {text!r}")
    return _build(tree, slot, dict(known or {}), trust)


def build(
    event_shape: Sequence[int],
    latent: int = 20,
    *,
    prior: str = "StandardNormal()",
    likelihood: str = "Bernoulli()",
    posterior: str = "DiagonalNormal()",
    network: str = "MLP()",
    trust: bool = True,
) -> nn.Module:
    """Build a `VAE` from expressions, with networks of the right sizes filled in.

    Args:
        event_shape: Shape of one datum.
        latent: Number of latent dimensions.
        prior: The prior.
        likelihood: The likelihood.
        posterior: The posterior.
        network: The network of a likelihood or posterior that names none of its own.
        trust: Whether names outside `pyro_vae` may be imported.

    Raises:
        ValueError: If sizes are not positive or an expression does not parse.

    Example:
        >>> build((1, 8, 8), latent=2, network="MLP(hidden=[16])").likelihood.net.hidden
        (16,)
    """
    event_shape = tuple(event_shape)
    if latent < 1 or min(event_shape, default=1) < 1:
        raise ValueError(f"expected positive sizes, got latent={latent}, event_shape={event_shape}")
    known = {"latent": latent, "event_shape": event_shape, "network": network}
    decoder = known | {"in_features": latent, "out_shape": event_shape}
    encoder = known | {"in_features": event_shape, "out_shape": (latent,)}
    parts = {
        "posterior": parse(posterior, "posterior", known=encoder, trust=trust),
        "likelihood": parse(likelihood, "likelihood", known=decoder, trust=trust),
    }
    parts["prior"] = parse(prior, "prior", known=encoder | parts, trust=trust)
    return parse("VAE()", "program", known=parts)


def write(value: Any, slot: str = "") -> str:
    """Write an object as the expression that builds it, the inverse of `parse`.

    It reads each argument of the constructor from the attribute of the same name, and leaves out defaults.

    Args:
        value: A literal, or an object whose constructor keeps its arguments as attributes.
        slot: The slot whose names need no module in front.

    Raises:
        ValueError: If an argument is no attribute, or the class cannot be imported.

    Example:
        >>> from pyro_vae.networks import MLP
        >>> write(MLP(784, 40, hidden=(200,)), "net")
        'MLP(in_features=784, out_features=40, hidden=(200,))'
    """
    if isinstance(value, functools.partial) and not value.args:
        return f"{_name(value.func, slot)}({_arguments(value.keywords)})"
    if isinstance(value, type):  # a factory without options, such as torch.optim.Adam
        return f"{_name(value, slot)}()"
    if inspect.isroutine(value):
        raise ValueError(f"{value.__name__} is a function, which no expression can name")
    if isinstance(value, _LITERALS):
        return repr(tuple(value) if isinstance(value, torch.Size) else value)
    if type(value).__init__ is nn.Module.__init__:  # a module without arguments
        return f"{_name(type(value), slot)}()"
    given = {}
    for parameter in inspect.signature(type(value)).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise ValueError(f"{type(value).__name__} takes {parameter}, which no expression can name")
        if parameter.name == "max_iarange_nesting":  # deprecated, and no ELBO of Pyro keeps it
            continue
        if not hasattr(value, parameter.name):
            raise ValueError(f"{type(value).__name__} does not keep its argument {parameter.name!r} as an attribute")
        argument = getattr(value, parameter.name)
        if argument is not parameter.default and not _same(argument, parameter.default):
            given[parameter.name] = argument
    return f"{_name(type(value), slot)}({_arguments(given)})"


_LITERALS = (str, bytes, int, float, complex, bool, tuple, list, dict, set, type(None))


def _same(argument: Any, default: Any) -> bool:
    return type(argument) is type(default) and isinstance(argument, _LITERALS) and argument == default


def _arguments(given: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={write(value, name)}" for name, value in given.items())


def _name(cls: Any, slot: str) -> str:
    name = cls.__name__
    if any(getattr(_import(module), name, None) is cls for module in (_SLOTS[slot].modules if slot in _SLOTS else ())):
        return name
    if cls.__module__ == "__main__" or cls.__qualname__ != name:
        raise ValueError(f"{cls.__qualname__} is not at the top of a module that can be imported")
    return f"{cls.__module__}.{name}"


def _build(node: ast.expr, slot: str, known: dict[str, Any], trust: bool) -> Any:
    call = node if isinstance(node, ast.Call) else ast.Call(func=node, args=[], keywords=[])
    cls = _resolve(ast.unparse(call.func), slot, trust)
    signature = inspect.signature(cls)
    _check_names(cls.__name__, call, signature)
    if hasattr(cls, "num_params") and "out_shape" in known:
        known = known | {"out_features": cls.num_params * math.prod(known["out_shape"])}

    positions = [p.name for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    nodes = dict(zip(positions, call.args, strict=False)) | {str(k.arg): k.value for k in call.keywords}
    given = {name: _value(value, name if name in _SLOTS else slot, known, trust) for name, value in nodes.items()}
    if _SLOTS[slot].factory:
        if first := [name for name in ("params", "lr") if name in given]:
            raise ValueError(f"{cls.__name__}: {first[0]} is given apart, not in the expression")
        return functools.partial(cls, **given) if given else cls
    for name in signature.parameters.keys() - given.keys():
        if name == "net" and "network" in known:
            given[name] = parse(known["network"], "net", known=known, trust=trust)
        elif name in known:
            given[name] = known[name]
    missing = [p.name for p in signature.parameters.values() if p.default is p.empty and p.name not in given]
    missing = [
        n
        for n in missing
        if signature.parameters[n].kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    ]
    if missing:
        raise ValueError(f"{cls.__name__}: expected a value for {', '.join(missing)}; it takes {signature}")
    try:
        return cls(**given)
    except TypeError as error:
        raise ValueError(f"{cls.__name__}: {error}") from error


def _value(node: ast.expr, slot: str, known: dict[str, Any], trust: bool) -> Any:
    if isinstance(node, ast.Call):
        return _build(node, slot, known, trust)
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise ValueError(f"expected a literal or a call such as Name(argument=1), got {ast.unparse(node)!r}") from None


def _check_names(name: str, call: ast.Call, signature: inspect.Signature) -> None:
    takes = ", ".join(signature.parameters) or "no arguments"
    if any(isinstance(argument, ast.Starred) for argument in call.args) or any(k.arg is None for k in call.keywords):
        raise ValueError(f"{name}: expected literals, got {ast.unparse(call)!r}")
    for parameter in signature.parameters.values():
        if call.args and parameter.kind in (parameter.VAR_POSITIONAL, parameter.POSITIONAL_ONLY):
            raise ValueError(f"{name} takes {parameter} by position, which no expression can name")
    try:
        signature.bind_partial(*call.args, **{str(k.arg): k.value for k in call.keywords})
    except TypeError as error:
        raise ValueError(f"{name}: {error}; it takes {takes}") from None


def _resolve(name: str, slot: str, trust: bool) -> type:
    modules, base, _ = _SLOTS[slot]
    *path, last = name.split(".")
    if path:
        candidates: tuple[str, ...] = (".".join(path), f"pyro_vae.{'.'.join(path)}")
        if not trust and not name.startswith(tuple(f"{module}." for module in _TRUSTED)):
            candidates = candidates[1:]
    else:
        candidates = modules
    for module in candidates:
        try:
            found = getattr(_import(module), last, None)
        except ModuleNotFoundError as error:
            if error.name and not module.startswith(error.name):  # the module is there, one that it imports is not
                raise
            continue
        if isinstance(found, type) and issubclass(found, base) and not inspect.isabstract(found):
            return found
    if path and not trust and len(candidates) == 1:
        raise ValueError(f"{name}: a class outside pyro_vae is imported only with trust=True (--trust)")
    raise ValueError(f"{slot}: unknown name {name!r}; there is {', '.join(_names(modules, base))}")


def _names(modules: Sequence[str], base: type) -> list[str]:
    found = {
        name
        for module in modules
        for name, value in vars(_import(module)).items()
        if isinstance(value, type) and issubclass(value, base) and value is not base and not inspect.isabstract(value)
        if name in getattr(_import(module), "__all__", ())
    }
    return sorted(found)


_import = importlib.import_module
