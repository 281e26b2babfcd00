"""A run's configuration as arguments of the command."""

from __future__ import annotations

import itertools
from typing import Any

from pyro_vae import runs

__all__ = ["DATA", "expanded"]

DATA = ("data", "data_root", "binarize", "dequantize", "labels", "valid", "test", "data_seed", "in_memory")
_FIT = ("program", "estimator", "anneal", "epochs", "batch_size", "lr", "optimizer", "lr_schedule", "device")
_RUN = ("precision", "devices", "num_nodes", "strategy", "seed", "start_at_mean", "num_workers", "compile", "recorded")
_CONFIGURED = (*DATA, *_FIT, *_RUN)


def expanded(arguments: list[str]) -> list[str]:
    """The arguments of `fit` with those of a configuration file put in front, where later ones win over them."""
    if arguments[:1] != ["fit"]:
        return arguments
    file = _value_of("--config", arguments)
    if file is None and "--resume" in arguments:
        file = _value_of("--out", arguments)
    if file is None:
        return arguments
    config = runs.read_config(file)
    if unknown := sorted(set(map(str, config)) - set(_CONFIGURED)):
        raise ValueError(f"{file}: unknown keys {', '.join(unknown)}; expected {', '.join(_CONFIGURED)}")
    if config.get("data") is None and _value_of("--data", arguments) is None:
        raise ValueError(f"{file} does not name the run's data; name them with --data")
    config.pop("recorded", None)
    if config.get("compile") == "auto":  # the default, which no flag says
        del config["compile"]
    given = [_flag(name.replace("_", "-"), value) for name, value in config.items() if value is not None]
    return ["fit", *given, *arguments[1:]]


def _flag(name: str, value: Any) -> str:
    return f"--{'' if value else 'no-'}{name}" if isinstance(value, bool) else f"--{name}={value}"


def _value_of(option: str, arguments: list[str]) -> str | None:
    for argument, following in itertools.zip_longest(arguments, arguments[1:]):
        if argument == option:
            return following
        if argument.startswith(f"{option}="):
            return argument.partition("=")[2]
    return None
