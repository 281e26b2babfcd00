"""An epoch over a file, beside one over data in memory: memory and time per datum.

    python examples/benchmarks/larger_than_memory.py --gigabytes 4

Writes images of MNIST's shape to a temporary folder, as a NumPy file and, where Zarr is installed, a Zarr store, and
trains an epoch over each in a process of its own; over the NumPy file also in blocks, as files that are too large for
the page cache are read. The data beside them are the first `--beside` of the same images in memory.

Memory is what the process holds of its own (RssAnon of Linux) above what it held before `fit`. Pages of a memory map
are the system's cache, which it takes back when it needs the memory; they are the second figure.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import pyro_vae

SHAPE = (28, 28)


def write(folder, gigabytes, chunk):
    """The files, a few thousand images at a time."""
    num_data = int(gigabytes * 2**30) // 784
    generator = np.random.default_rng(0)
    paths = {"memory map": folder / "images.npy"}
    arrays = [np.lib.format.open_memmap(paths["memory map"], "w+", "uint8", (num_data, *SHAPE))]
    if find_spec("zarr") is not None:
        import zarr

        paths["zarr"] = folder / "images.zarr"
        chunks = (min(chunk, num_data), *SHAPE)
        arrays.append(zarr.create_array(paths["zarr"], shape=arrays[0].shape, chunks=chunks, dtype="uint8"))
    for start in range(0, num_data, chunk):
        shape = (min(chunk, num_data - start), *SHAPE)
        ink, grey = generator.integers(256, size=(2, *shape), dtype="uint8")
        images = np.where(ink < 48, grey, np.uint8(0))
        for array in arrays:
            array[start : start + chunk] = images
    return paths


def resident(name):
    """MiB of the process, of its own (RssAnon) or of files (RssFile); NaN where the system does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(name)), float("nan"))


class Peak:
    """The most memory that the process has held above the start, looked at fifty times a second."""

    def __enter__(self):
        self.start = {name: resident(name) for name in ("RssAnon", "RssFile")}
        self.most = dict(self.start)
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        """Look, until it is over."""
        while not self.over.wait(0.02):
            for name in self.most:
                self.most[name] = max(self.most[name], resident(name))

    def __exit__(self, *error):
        self.over.set()
        self.thread.join()

    def above(self, name):
        """MiB above the start."""
        return self.most[name] - self.start[name]


def opened(kind, path, beside):
    """What `fit` is given."""
    if kind == "zarr":
        import zarr

        return zarr.open(path, mode="r")
    data = np.load(path, mmap_mode="r")
    if kind == "in memory":
        return np.array(data[:beside])
    return pyro_vae.data.OnDisk(data, window=2**26 // 784) if kind == "in blocks" else data


def epoch(kind, path, arguments):
    """An epoch, after a short one in which is started what has to be."""
    torch.manual_seed(0)
    network = f"MLP(hidden=[{arguments.hidden}])"
    vae = pyro_vae.build(SHAPE, latent=20, likelihood="Gaussian()", network=network)
    options = {"epochs": 1, "batch_size": arguments.batch_size, "progress": False, "seed": 0, "device": "cpu"}
    options["compile"] = False  # whose seconds would be of one contestant and not of another
    pyro_vae.fit(vae, torch.zeros(4 * arguments.batch_size, *SHAPE), **options)
    data = opened(kind, path, arguments.beside)
    with Peak() as peak:
        start = time.perf_counter()
        pyro_vae.fit(vae, data, num_workers=arguments.num_workers, **options)
        seconds = time.perf_counter() - start
    num_data = len(pyro_vae.data.as_source(data))
    figures = {"data": num_data, "microseconds a datum": seconds / num_data * 1e6}
    return figures | {"own MiB": peak.above("RssAnon"), "mapped MiB": peak.above("RssFile")}


def in_a_process(kind, path):
    """The figures of an epoch in a process that holds nothing of another's."""
    command = [sys.executable, __file__, *sys.argv[1:], "--only", kind, str(path)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size of the file")
    parser.add_argument("--beside", type=int, default=500_000, help="images in memory")
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=400)
    parser.add_argument("--num-workers", type=int, default=0)
    parser.add_argument("--chunk", type=int, default=1024, help="images in a chunk of Zarr")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--only", nargs=2, metavar=("KIND", "PATH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(epoch(arguments.only[0], Path(arguments.only[1]), arguments)))
        return

    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        paths = write(Path(folder), arguments.gigabytes, arguments.chunk)
        kinds = {"in memory": "memory map", "memory map": "memory map", "in blocks": "memory map", "zarr": "zarr"}
        figures = {kind: in_a_process(kind, paths[path]) for kind, path in kinds.items() if path in paths}
    table = Table(title=f"An epoch of 784-{arguments.hidden}-20, batch {arguments.batch_size}")
    for column in ("", *figures["in memory"]):
        table.add_column(column, justify="right" if column else "left")
    for kind, row in figures.items():
        table.add_row(kind, *(f"{value:,.1f}" if isinstance(value, float) else f"{value:,}" for value in row.values()))
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps({"arguments": vars(arguments), "figures": figures}, default=str))


if __name__ == "__main__":
    main()
