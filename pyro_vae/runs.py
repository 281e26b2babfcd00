"""Run directories: configuration, weights, history and metrics on disk, each written whole or not at all."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from pyro_vae import expressions
from pyro_vae.files import replacing
from pyro_vae.programs import Program

__all__ = [
    "check_free",
    "clear",
    "load",
    "load_weights",
    "read_checkpoint",
    "read_config",
    "versions",
    "weights",
    "write_checkpoint",
    "write_config",
    "write_json",
]

CONFIG, MODEL, HISTORY, METRICS = "config.yaml", "model.safetensors", "history.csv", "metrics.json"
DIAGNOSTICS, POSTERIOR = "diagnostics.json", "posterior.nc"
CHECKPOINT = Path("checkpoint") / "last.safetensors"
FIGURES = "figures"


def check_free(out: Path, resume: bool = False, overwrite: bool = False) -> None:
    """Make sure that `out` can take a run: it is new, or a run that is to be resumed or overwritten.

    Raises:
        ValueError: If it may not.
    """
    if resume and overwrite:
        raise ValueError("expected one of resume and overwrite, got both")
    if resume:
        if not (out / CHECKPOINT).is_file():
            raise ValueError(f"{out}: expected a run with {CHECKPOINT} to resume, found none")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not overwrite:
            raise ValueError(f"{out} exists: resume it (--resume), overwrite it (--overwrite) or name another (--out)")
        if not (out / CONFIG).is_file() or "recorded" not in read_config(out):
            raise ValueError(f"{out} is no run directory (it has no {CONFIG} of ours), and is not overwritten")


def clear(out: Path) -> None:
    """Remove what a run has written to `out`, and nothing else."""
    for path in (CONFIG, MODEL, HISTORY, METRICS, DIAGNOSTICS, POSTERIOR, CHECKPOINT):
        (out / path).unlink(missing_ok=True)
    for path in (out / FIGURES).glob("*.png"):
        path.unlink()


def versions() -> dict[str, str]:
    """Versions that a run depends on.

    Example:
        >>> list(versions())
        ['python', 'pyro_vae', 'pyro-ppl', 'torch']
    """
    return {"python": platform.python_version(), "pyro_vae": version("pyro-vae")} | {
        name: version(name) for name in ("pyro-ppl", "torch")
    }


def write_config(out: Path, config: Mapping[str, Any]) -> None:
    """Write a run's configuration as YAML."""
    with replacing(out / CONFIG) as temporary:
        temporary.write_text(yaml.safe_dump(dict(config), sort_keys=False, width=10**6, allow_unicode=True))


def read_config(run: str | os.PathLike) -> dict[str, Any]:
    """Read a run's configuration, of the run directory or of the file itself.

    Raises:
        ValueError: If there is none, or it is no mapping.
    """
    path = Path(run)
    path = path / CONFIG if path.is_dir() else path
    try:
        config = yaml.safe_load(path.read_text())
    except OSError:
        raise ValueError(f"{run}: expected a run directory with {CONFIG}, found none") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is corrupt: {str(error).splitlines()[0]}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is corrupt: expected a mapping, got {type(config).__name__}")
    return config


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a mapping as JSON."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def weights(program: Program) -> dict[str, Tensor]:
    """The program's weights and buffers on the CPU; shared ones are copied, since safetensors has no aliases."""
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in program.state_dict().items()}


def write_checkpoint(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any] | None = None) -> None:
    """Write tensors, and plain data beside them, as one safetensors file."""
    with replacing(path) as temporary:
        # Not save_file, which gives a mode of its own to the file.
        temporary.write_bytes(save(dict(tensors), metadata={"pyro_vae": json.dumps(dict(meta or {}))}))


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors, and the plain data beside them, from a safetensors file. Nothing is unpickled.

    Raises:
        ValueError: If the file is missing, corrupt, or not of this project.
    """
    try:
        with safe_open(path, framework="pt") as file:
            meta = (file.metadata() or {}).get("pyro_vae")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is corrupt: {str(error).splitlines()[0]}") from error
    if meta is None:
        raise ValueError(f"{path} is not a checkpoint of pyro_vae")
    return tensors, json.loads(meta)


def load_weights(program: Program, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Copy weights into the program.

    Raises:
        ValueError: If they are another program's.
    """
    own = program.state_dict()
    for name in sorted(own.keys() ^ tensors.keys()):
        raise ValueError(f"{path} is another program's: {name} is {'missing' if name in own else 'unknown'}")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            expected, got = tuple(own[name].shape), tuple(tensor.shape)
            raise ValueError(f"{path} is another program's: expected {name} of shape {expected}, got {got}")
    program.load_state_dict(tensors)


def load(run: str | os.PathLike, *, trust: bool = False, program: Program | None = None) -> nn.Module:
    """Give back the program of a run directory, with its trained weights, in eval mode.

    Args:
        run: The run directory.
        trust: Whether classes outside `pyro_vae` that its configuration names may be imported, which runs their
            module's code.
        program: A program to take the weights, where the configuration cannot rebuild it.

    Raises:
        ValueError: If the directory is no run, its files are corrupt, or it needs `trust` or `program`.

    Example:
        >>> import pyro_vae, tempfile, torch
        >>> vae = pyro_vae.build((8, 8), latent=2)
        >>> run = tempfile.mkdtemp()
        >>> _ = pyro_vae.fit(vae, torch.ones(10, 8, 8), epochs=1, batch_size=5, out=run, progress=False)
        >>> type(pyro_vae.load(run)).__name__
        'VAE'
    """
    run = Path(run)
    config = read_config(run)
    if program is None:
        if not isinstance(config.get("program"), str) or config["program"].startswith("("):
            raise ValueError(
                f"{run}: its configuration cannot rebuild the program; give it with load(run, program=...)"
            )
        program = expressions.parse(config["program"], "program", trust=trust)
    path = run / MODEL
    if not path.is_file() and (run / CHECKPOINT).is_file():
        raise ValueError(f"{run} was interrupted and has no {MODEL} yet: resume it first (--resume)")
    tensors, _ = read_checkpoint(path)
    dtypes = [tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()]
    program.to(dtypes[0] if dtypes else None)
    load_weights(program, tensors, path)
    return program.eval()
