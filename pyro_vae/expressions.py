"""Components as text, written as in Python: `MLP(hidden=[200, 200])`. Nothing is evaluated."""

from __future__ import annotations

import ast
import functools
import graphlib
import importlib
import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from pyro.infer import ELBO
from torch import nn

from pyro_vae.distributions import import_zuko
from pyro_vae.estimators import Kernel
from pyro_vae.schedules import Schedule

__all__ = ["build", "names", "parse", "write"]


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
    "base": _Slot(("pyro_vae.posteriors",), nn.Module),
    "pixel": _Slot(("pyro_vae.likelihoods",), nn.Module, factory=True),
    "parts": _Slot(("pyro_vae.likelihoods",), nn.Module, factory=True),
    "flow": _Slot(("zuko.flows",), nn.Module, factory=True),
    "temperature": _Slot(("pyro_vae.schedules",), Schedule),
    "capacity": _Slot(("pyro_vae.schedules",), Schedule),
    "kernel": _Slot(("pyro_vae.estimators",), Kernel),
    "net": _Slot(("pyro_vae.networks",), nn.Module),
    "estimator": _Slot(("pyro_vae.estimators", "pyro.infer"), ELBO),
    "anneal": _Slot(("pyro_vae.schedules",), Schedule),
    "optimizer": _Slot(("torch.optim",), torch.optim.Optimizer, factory=True),
}
_HINTS = {  # what to do about a missing argument
    "base": "such as base=DiagonalNormal()",
    "features": "such as features=20, the number of latent dimensions",
    "in_shape": "an encoder and a decoder are a pair of networks: 'ConvEncoder(), ConvDecoder()'",
    "loc": "of each column, as scale; from Python Standardized.of(net, x)",
    "out_features": "a component says its network's size as num_params",
    "out_shape": "an encoder and a decoder are a pair of networks: 'ConvEncoder(), ConvDecoder()'",
}
_TRUSTED = ("pyro_vae", "pyro.infer", "torch.optim", "torch.nn", "zuko.flows")
_GIVEN_APART = ("params", "lr", "net", "event_shape")  # what a factory is called with later


def parse(text: str, slot: str, *, known: Mapping[str, Any] | None = None, trust: bool = True) -> Any:
    """Build the object that `text` describes, a call as in Python.

    Names are those of the slot's module (`prior`: `pyro_vae.priors`), or dotted (`my_package.MyPrior`). Arguments are
    literals or further calls. An argument that is left out and is known to the builder is filled in.

    Args:
        text: The expression, such as `"MLP(hidden=[200, 200])"`.
        slot: What it is to be: program, prior, likelihood, posterior, net, estimator, anneal, or optimizer, of which
            it gives the class or a `functools.partial`, to be called with the parameters.
        known: Values for arguments that the expression leaves out. A text `network` is parsed for an argument `net`,
            with as many outputs as the component takes.
        trust: Whether names outside `pyro_vae` may be imported, which runs their module's code.

    Raises:
        ValueError: If the text is no such call, or a name or argument is unknown, with what there is.

    Example:
        >>> parse("MLP(hidden=[200, 200])", "net", known={"in_features": 784, "out_features": 40}).hidden
        (200, 200)
    """
    return _build(_tree(text, slot), slot, dict(known or {}), trust)


def _tree(text: str, slot: str) -> ast.expr:
    tree = _parsed(text, slot)
    if not isinstance(tree, ast.Call | ast.Name | ast.Attribute):
        raise ValueError(f"{slot}: expected a call such as Name(argument=1, other='text in quotes'), got {text!r}")
    return tree


def _parsed(text: str, slot: str) -> ast.expr | None:
    if not isinstance(text, str):
        name = getattr(text, "__name__", type(text).__name__)
        raise ValueError(f"{slot}: expected a text such as '{name}()', got {name} itself")
    try:
        return ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        return None


def build(
    event_shape: Sequence[int],
    latent: int = 20,
    *,
    prior: str = "StandardNormal()",
    likelihood: str = "Bernoulli()",
    posterior: str = "DiagonalNormal()",
    network: str = "MLP()",
    size: int | None = None,
    standardize: tuple[Sequence[float], Sequence[float]] | None = None,
    trust: bool = True,
) -> nn.Module:
    """Build a `VAE` from expressions, with networks of the right sizes filled in.

    Args:
        event_shape: Shape of one datum.
        latent: Number of latent dimensions.
        prior: The prior.
        likelihood: The likelihood.
        posterior: The posterior.
        network: The network of a likelihood or posterior that names none of its own; or a pair of an encoder's and a
            decoder's, `"ConvEncoder(), ConvDecoder()"`.
        size: Number of data, for a prior with a global latent.
        standardize: Mean and scale of each column of the data, for an encoder `Standardized(net=MLP())`.
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
    encoder_network, decoder_network = _networks(network)
    known = {"latent": latent, "event_shape": event_shape}
    encoder = known | {"in_features": event_shape, "in_shape": event_shape, "network": encoder_network}
    if standardize is not None:
        encoder |= {"loc": tuple(standardize[0]), "scale": tuple(standardize[1])}
    decoder = known | {"in_features": latent, "network": decoder_network}
    texts = {"prior": prior, "likelihood": likelihood, "posterior": posterior}
    trees = {name: _tree(text, name) for name, text in texts.items()}
    parts = _together(trees, {"prior": known, "likelihood": decoder, "posterior": encoder}, trust)
    if hasattr(parts["prior"], "guide"):
        parts["size"] = size
    return parse("VAE()", "program", known=parts)


def _networks(text: str) -> tuple[str, str]:
    """The encoder's and the decoder's network: one for both, or a pair `Encoder(), Decoder()`."""
    tree = _parsed(text, "network")
    pair = [ast.unparse(element) for element in tree.elts] if isinstance(tree, ast.Tuple) else [text, text]
    if len(pair) != 2:
        raise ValueError(f"network: expected one network, or a pair Encoder(), Decoder(); got {text!r}")
    return pair[0], pair[1]


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
    return _write(value, slot, {})


def _write(value: Any, slot: str, siblings: Mapping[str, Any]) -> str:
    if isinstance(value, functools.partial) and not value.args:
        return f"{_name(value.func, slot)}({_arguments(value.keywords, {})})"
    if isinstance(value, type):  # a factory without options, such as torch.optim.Adam
        return f"{_name(value, slot)}()"
    if inspect.isroutine(value):
        raise ValueError(f"{value.__name__} is a function, which no expression can name")
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {_write(entry, slot, {})}" for key, entry in value.items()) + "}"
    if isinstance(value, _LITERALS):
        return repr(tuple(value) if isinstance(value, torch.Size) else value)
    if isinstance(value, torch.Tensor):
        raise ValueError(f"a tensor of shape {tuple(value.shape)} is no literal, which no expression can name")
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
        if argument is parameter.default or _same(argument, parameter.default):
            continue
        # What a part shares with the program, such as a VampPrior the posterior, is written once and shared again.
        if argument is not siblings.get(parameter.name):
            given[parameter.name] = argument
    modules = {name: argument for name, argument in given.items() if isinstance(argument, nn.Module)}
    return f"{_name(type(value), slot)}({_arguments(given, modules if slot == 'program' else {})})"


_LITERALS = (str, bytes, int, float, complex, bool, tuple, list, dict, set, type(None))


def _same(argument: Any, default: Any) -> bool:
    return type(argument) is type(default) and isinstance(argument, _LITERALS) and argument == default


def _arguments(given: Mapping[str, Any], siblings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={_write(value, name, siblings)}" for name, value in given.items())


def _name(cls: Any, slot: str) -> str:
    name = cls.__name__
    if any(getattr(_import(module), name, None) is cls for module in (_SLOTS[slot].modules if slot in _SLOTS else ())):
        return name
    if cls.__module__ == "__main__" or cls.__qualname__ != name:
        raise ValueError(f"{cls.__qualname__} is not at the top of a module that can be imported")
    return f"{cls.__module__}.{name}"


def _build(node: ast.expr, slot: str, known: dict[str, Any], trust: bool) -> Any:
    cls, nodes = _call(node, slot, trust)
    signature = inspect.signature(cls)
    if slot == "program":
        given = _together(nodes, dict.fromkeys(nodes, known), trust)
    else:
        given = {name: _value(value, name, slot, known, trust) for name, value in nodes.items() if name != "net"}
    if _SLOTS[slot].factory:
        if first := [name for name in _GIVEN_APART if name in nodes]:
            raise ValueError(f"{cls.__name__}: {first[0]} is given apart, not in the expression")
        return functools.partial(cls, **given) if given else cls
    given |= {name: known[name] for name in signature.parameters if name in known and name not in nodes}
    if "net" in nodes or ("net" in signature.parameters and "network" in known):
        network = nodes.get("net") or _tree(known["network"], "net")
        sized = known | _sizes(cls, given, network) if "event_shape" in known else known
        given["net"] = _value(network, "net", slot, sized, trust)
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = [p.name for p in signature.parameters.values() if p.default is p.empty and p.kind not in optional]
    if missing := [name for name in required if name not in given]:
        hint = "".join(f" ({text})" for name, text in _HINTS.items() if name in missing)
        takes = ", ".join(signature.parameters)
        raise ValueError(f"{cls.__name__}: expected a value for {', '.join(missing)}{hint}; it takes {takes}")
    return _construct(cls, given)


def _construct(cls: type, given: Mapping[str, Any]) -> Any:
    try:
        return cls(**given)
    except TypeError as error:
        raise ValueError(f"{cls.__name__}: {error}") from error


def _call(node: ast.expr, slot: str, trust: bool) -> tuple[type, dict[str, ast.expr]]:
    """The class that a call names, and its arguments by name."""
    call = node if isinstance(node, ast.Call) else ast.Call(func=node, args=[], keywords=[])
    cls = _resolve(ast.unparse(call.func), slot, trust)
    signature = inspect.signature(cls)
    if call.args and next(iter(signature.parameters)) == "net" and not isinstance(call.args[0], ast.Call | ast.Name):
        # Categorical(4): the network and the shape are filled in, and the first literal comes after them.
        filled = ("net", "event_shape", "latent")
        signature = signature.replace(parameters=[p for p in signature.parameters.values() if p.name not in filled])
    _check_names(cls.__name__, call, signature)
    positions = [p.name for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    return cls, dict(zip(positions, call.args, strict=False)) | {str(k.arg): k.value for k in call.keywords}


def _together(nodes: Mapping[str, ast.expr], known: Mapping[str, dict], trust: bool) -> dict[str, Any]:
    """The parts of a program, where one may take another: a VampPrior the posterior, for example."""
    needs = {name: set(_needs(node, name, nodes.keys() - {name}, trust)) for name, node in nodes.items()}
    try:
        order = list(graphlib.TopologicalSorter(needs).static_order())
    except graphlib.CycleError as error:
        names = [ast.unparse(nodes[name]).split("(")[0] for name in error.args[1][:-1]]
        raise ValueError(
            f"expected one of {' and '.join(names)} to do without the other, got each in need of it"
        ) from None
    built: dict[str, Any] = {}
    for name in order:
        shared = {needed: built[needed] for needed in needs[name]}
        built[name] = _value(nodes[name], name, "program", known[name] | shared, trust)
    return {name: built[name] for name in nodes}


def _needs(node: ast.expr, slot: str, siblings: Iterable[str], trust: bool) -> Iterable[str]:
    """Which siblings a call leaves to be filled in."""
    if isinstance(node, ast.Call | ast.Name) and slot in _SLOTS:
        cls, nodes = _call(node, slot, trust)
        yield from (set(inspect.signature(cls).parameters) - nodes.keys()) & set(siblings)


def _sizes(cls: type, given: Mapping[str, Any], network: ast.expr) -> dict[str, Any]:
    """The size of a component's network: of an untied copy of the component, which knows how many outputs it takes."""
    shape = given.get("event_shape", (given.get("latent"),))
    if isinstance(getattr(cls, "num_outputs", None), property):
        outputs = _construct(cls, {**given, "net": nn.Identity()}).num_outputs
    elif hasattr(cls, "num_params"):
        outputs = cls.num_params * math.prod(shape)
    else:
        return {}
    return {"out_features": outputs, "out_shape": (outputs // math.prod(shape[1:]), *shape[1:])}


def _value(node: ast.expr, name: str, slot: str, known: dict[str, Any], trust: bool) -> Any:
    """The value of the argument `name` of something in `slot`."""
    slot = name if name in _SLOTS else slot
    if isinstance(node, ast.Call):
        return _build(node, slot, known, trust)
    if isinstance(node, ast.Dict):
        keys = [_value(key, name, slot, known, trust) for key in node.keys if key is not None]
        return dict(zip(keys, (_value(value, name, slot, known, trust) for value in node.values), strict=True))
    if isinstance(node, ast.Name | ast.Attribute) and name in _SLOTS:  # a class without arguments
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
    missing: list[str] = []
    for module in candidates:
        try:
            found = getattr(_import(module), last, None)
        except ModuleNotFoundError as error:
            if error.name and not module.startswith(error.name):  # the module is there, one that it imports is not
                raise
            missing.append(module)
            continue
        if isinstance(found, type) and issubclass(found, base) and not inspect.isabstract(found):
            return found
    if path and not trust and len(candidates) == 1:
        raise ValueError(f"{name}: a class outside pyro_vae is imported only with trust=True (--trust)")
    why = f" (found no module {missing[0]})" if missing == list(candidates) else ""
    raise ValueError(f"{slot}: unknown name {name!r}{why}; there is {', '.join(names(slot))}")


def names(slot: str) -> list[str]:
    """The names that a slot's expressions know without a module in front.

    Example:
        >>> names("anneal")
        ['Constant', 'ControlVAE', 'Cosine', 'Cyclical', 'Linear', 'Sigmoid']
    """
    modules, base, _ = _SLOTS[slot]
    found = set()
    for module in map(_import, modules):
        public = getattr(module, "__all__", [name for name in vars(module) if not name.startswith("_")])
        for name in public:
            value = getattr(module, name)
            if isinstance(value, type) and issubclass(value, base) and value is not base:
                found |= {name} if not inspect.isabstract(value) else set()
    return sorted(found)


def _import(name: str) -> ModuleType:
    if name.split(".")[0] == "zuko":
        import_zuko()  # whose import is to change nothing
    return importlib.import_module(name)
