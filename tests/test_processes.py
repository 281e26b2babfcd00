"""Training in two processes, on the CPU."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import processes_script
import pytest
import torch

SCRIPT = Path(processes_script.__file__)


def start(*command, **options):
    """A process with its own session, so that all that it starts can be ended with it."""
    kept = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "MASTER_PORT")}
    environment = kept | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )


def ended(process, timeout=60):
    """Its exit code and what it has said; nothing that it has started is left behind."""
    try:
        out, errors = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out, errors


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What both processes of the script found, what it said, and its folder."""
    folder = tmp_path_factory.mktemp("two")
    given = processes_script.given(), processes_script.given_data()
    processes_script.fit_given(folder / "resumed", *given, 1, epochs=2)
    code, out, errors = ended(start(SCRIPT, folder, 2))
    assert code == 0, errors
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)], out + errors, folder


@pytest.fixture(scope="module")
def one(two, tmp_path_factory):
    """The same in this process, which resumes what two have begun."""
    folder = tmp_path_factory.mktemp("one")
    given = processes_script.given(), processes_script.given_data()
    processes_script.fit_given(folder / "resumed", *given, 1, epochs=2)
    return {name: processes_script.results(fitted) for name, fitted in processes_script.fit_all(folder, 1)}


@pytest.mark.parametrize("name", ["memory", "data set", "resumed"])
def test_two_processes_find_what_one_does(one, two, name):
    """Weights, running means and figures, where the noise comes with the data: no false alarms.

    The batches are ragged, and of the last one a process has nothing; the program has a global latent.
    """
    for rank in (0, 1):
        found = two[0][rank][0][name]
        assert found.keys() == one[name].keys()
        for key, expected in one[name].items():
            torch.testing.assert_close(found[key], expected, rtol=1e-10, atol=1e-10, equal_nan=True, msg=key)
