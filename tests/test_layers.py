"""Each file imports only from those above it in the table of docs/design.md."""

import ast
from pathlib import Path

import pytest

import pyro_vae

ORDER = [
    "files",
    "networks",
    "distributions",
    "priors",
    "likelihoods",
    "posteriors",
    "programs",
    "handlers",
    "schedules",
    "estimators",
    "expressions",
    "catalogue",
    "compilation",
    "data",
    "evaluation",
    "diagnostics",
    "export",
    "comparison",
    "runs",
    "training",
    "plots",
    "cli",
    "__main__",
]
FOLDER = Path(pyro_vae.__file__).parent


def imported(source: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    parts = [name.split(".") for name in found if name.split(".")[0] == "pyro_vae"]
    return {part[1] for part in parts if len(part) > 1}


def layer(path: Path) -> str:
    """The layer of a file: its name, or that of the folder that a long file has become."""
    return path.relative_to(FOLDER).parts[0].removesuffix(".py")


def test_every_file_has_its_place():
    assert {layer(path) for path in FOLDER.rglob("*.py")} == {*ORDER, "__init__"}


@pytest.mark.parametrize("name", ORDER)
def test_imports_point_upwards(name):
    below = set(ORDER[ORDER.index(name) :])
    for path in FOLDER.rglob("*.py"):
        if layer(path) == name:
            own = {name} if path.parent != FOLDER else set()  # files of a folder may import one another
            assert not imported(path.read_text()) & (below - own), path


def test_the_check_sees_an_import():
    assert imported("from pyro_vae import cli\nimport pyro_vae.data\nfrom pyro_vae.runs import load") >= {
        "cli",
        "data",
        "runs",
    }


def test_import_changes_nothing_global(tmp_path):
    import subprocess
    import sys

    script = """
import random, warnings
import matplotlib, numpy, pyro, torch
def state():
    return (torch.get_default_dtype(), torch.get_rng_state().tolist(), numpy.random.get_state()[1].tolist(),
            random.getstate(), matplotlib.rcParams["backend"], pyro.settings.get(), list(pyro.get_param_store()),
            torch.is_grad_enabled(), warnings.filters[:], torch.distributions.Distribution._validate_args)
before = state()
import pyro_vae, sys
assert state() == before
heavy = {"lightning_fabric", "arviz", "arviz_base", "arviz_stats", "arviz_plots", "zarr", "xarray", "scipy.stats"}
heavy = (heavy | {"sklearn", "matplotlib.pyplot", "torchvision", "pandas"}) & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run(
        [sys.executable, "-c", script], check=True, cwd=tmp_path, env={"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    )
