"""What is measured in a process of its own: imports, a first epoch and its memory, first figures.

    python -m contestants.children imports pyro pyro_vae

prints a JSON list of numbers.
"""

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

CLEAR_PEAK = "5"  # what proc(5) wants in clear_refs, to reset the peak of the resident set


def child(name, *arguments, **environment):
    """The numbers that a function of this file gives in a new process, and the seconds that the process took."""
    folder = Path(__file__).parents[1]
    paths = [str(folder), str(folder.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **environment}
    command = [sys.executable, "-m", "contestants.children", name, *map(str, arguments)]
    start = time.perf_counter()
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return [*json.loads(done.stdout.splitlines()[-1]), time.perf_counter() - start]


def imports(*modules):
    """Seconds of importing each, one after the other."""
    seconds = []
    for module in modules:
        start = time.perf_counter()
        importlib.import_module(module)
        seconds.append(time.perf_counter() - start)
    return seconds


def epoch(num_data, compiled):
    """Seconds of a `fit` of one epoch, and the peak of its memory above what was there, in MiB (NaN but on Linux)."""
    import pyro_vae

    from .with_pyro_vae import program
    from .work import Work, images

    x, vae = images(int(num_data)), program(Work(128))
    before = _resident("VmRSS")
    _clear_peak()
    start = time.perf_counter()
    pyro_vae.fit(vae, x, epochs=1, compile=compiled == "True", device="cpu", progress=False)
    seconds = time.perf_counter() - start
    return seconds, _resident("VmHWM") - before


def figures():
    """Seconds of the first figures: a training curve and a grid of images, their libraries' import included."""
    import pandas as pd

    from pyro_vae import plots

    from .work import PIXELS, images

    steps = range(1, 6)
    history = pd.DataFrame({"epoch": steps, "step": steps, "beta": 1.0, "loss": 1.0, "elbo": -1.0, "rate": 0.5})
    history = history.assign(distortion=0.5, valid_elbo=-1.0, seconds=1.0)
    start = time.perf_counter()
    plots.training_curve(history).canvas.draw()
    plots.image_grid(images(64).float().div(255).reshape(-1, 1, PIXELS, PIXELS)).canvas.draw()
    return (time.perf_counter() - start,)


def _clear_peak():
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text(CLEAR_PEAK)


def _resident(field):
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(field)), float("nan"))


if __name__ == "__main__":
    function, *given = sys.argv[1:]
    print(json.dumps(list({"imports": imports, "epoch": epoch, "figures": figures}[function](*given))))
