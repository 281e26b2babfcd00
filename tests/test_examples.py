"""Every example runs, in a small form; one that is not listed fails."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples"
EXAMPLES = {
    "first_vae.py": ["--epochs", "2"],
    "benchmarks/step.py": ["--batch-size", "16", "--hidden", "8", "--latent", "2", "--steps", "2", "--rounds", "2"],
}


def test_every_example_is_listed():
    assert {str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*.py")} == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name, tmp_path):
    command = [sys.executable, "-W", "error::UserWarning:__main__", FOLDER / name, *EXAMPLES[name]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if name == "first_vae.py":
        assert len(list((tmp_path / "first_vae").glob("*.png"))) == 4
