"""What training and evaluation cost beside Pyro's SVI, a hand-written loop, NumPyro and Pythae.

    pip install '.[bench]'
    python examples/benchmarks/speed.py --json speed.json

runs everything, some half an hour on two cores: in each round every contestant takes one turn, each round another one
first, and figures are medians over the rounds. A contestant whose library is missing is left out, and said to be. The
machine should have nothing else to do, and its own processor: another process on the same core makes a thread wait for
the other at every layer. Parts:

    python examples/benchmarks/speed.py --only epoch iwae --rounds 7 --threads 2 --data-root data
    python examples/benchmarks/speed.py --only epoch --batch-sizes 128 --contestants pyro_vae "PyTorch by hand"
    python examples/benchmarks/speed.py --only import waits

| work | what is measured |
|---|---|
| epoch | an epoch of 784-400-50 over 60,000 images |
| bf16 | the same with `bf16-mixed`, in batches of 512, beside float32 |
| iwae | an epoch of the importance-weighted bound, K = 50, 784-200-200-50 |
| convolutional | an epoch with two convolutions of stride 2 each way, 32 and 64 channels |
| likelihood | `log_likelihood` of 1,000 images with 5,000 particles |
| scale | a datum's time in training, of 1,000 to 1,000,000 |
| memory | the peak of a `fit` above what the process held before |
| import | importing the package beyond Pyro |
| waits | where a first-time user waits |

All train the same network from PyTorch's own start by Adam, on images in memory as `uint8` (Pythae's as floats). The
loss of the last turn stands beside the times, and one that is not ours within 10 % is named below the table. NumPyro
reads the loss back once an epoch, the others at each step. A turn is a part of an epoch (`--steps`), on as many images,
and scaled to the whole. A ratio is that of our time to the contestant's: below 1, ours is the faster. The first turn,
in which things are compiled, is not counted, and stands in a column of its own.
"""

import argparse
import importlib
import json
import os
import tempfile
from pathlib import Path

import torch
from contestants.children import child
from contestants.measuring import Row, Table, alternate, disagreeing, machine, timed
from contestants.work import Work, images
from rich.console import Console

NUM_DATA = 60_000  # in an epoch
EVALUATED = 1_000
OURS, MIXED, EAGER = "pyro_vae", "pyro_vae, bf16-mixed", "pyro_vae, not compiled"
SVI, BY_HAND, NUMPYRO, PYTHAE = "pyro.infer.SVI", "PyTorch by hand", "NumPyro", "Pythae"
PRODUCTS = "matrix products alone"
CONTESTANTS = {  # module, function and options
    OURS: ("with_pyro_vae", "trainer", {"compile": True}),
    MIXED: ("with_pyro_vae", "trainer", {"compile": True, "precision": "bf16-mixed"}),
    EAGER: ("with_pyro_vae", "trainer", {"compile": False}),
    SVI: ("with_svi", "trainer", {}),
    BY_HAND: ("by_hand", "trainer", {}),
    NUMPYRO: ("with_numpyro", "trainer", {}),
    PYTHAE: ("with_pythae", "trainer", {}),
    PRODUCTS: ("by_hand", "products", {}),
}
AGAINST_SVI = {32: 0.45, 128: 0.55, 512: 0.65}
MLP = (OURS, EAGER, SVI, BY_HAND, NUMPYRO, PYTHAE, PRODUCTS)
console = Console()


def epochs(arguments):
    for batch_size in arguments.batch_sizes:
        targets = {BY_HAND: 0.95, NUMPYRO: 1.0}
        if batch_size in AGAINST_SVI:
            targets[SVI] = AGAINST_SVI[batch_size]
        title = f"Epoch of 784-400-50, batch {batch_size}"
        yield contest(arguments, title, Work(batch_size), MLP, targets, steps=468)


def mixed(arguments):
    title = "Epoch of 784-400-50, batch 512, bf16-mixed"
    yield contest(arguments, title, Work(512), (MIXED, OURS, NUMPYRO), {NUMPYRO: 0.5}, steps=117)


def importance_weighted(arguments):
    work = Work(100, hidden=(200, 200), activation="Tanh", particles=50)
    title = "Epoch of IWAE, K = 50, 784-200-200-50, batch 100"
    yield contest(arguments, title, work, (MIXED, OURS, BY_HAND, NUMPYRO), {NUMPYRO: 0.35}, steps=20)


def convolutional(arguments):
    work = Work(128, hidden=(32, 64), convolutional=True)
    title = "Epoch with convolutions, 32 and 64 channels, batch 128"
    contestants = (OURS, EAGER, BY_HAND, NUMPYRO, PYTHAE)
    yield contest(arguments, title, work, contestants, {NUMPYRO: 0.6, PYTHAE: 0.6}, steps=20)


def contest(arguments, title, work, contestants, targets, steps):
    """Contestants that train on a work; the first of them is compared with the others."""
    subject = contestants[0]
    steps = min(arguments.steps or steps, NUM_DATA // work.batch_size)
    x = images(steps * work.batch_size, arguments.data_root).reshape(-1, *work.event_shape)
    turns = {}
    for name in contestants:
        if arguments.contestants and name not in arguments.contestants:
            continue
        module, function, options = CONTESTANTS[name]
        torch.manual_seed(0)
        try:
            make = getattr(importlib.import_module(f"contestants.{module}"), function)
        except ImportError as error:
            console.print(f"{name} is left out: {error}")
            continue
        turns[name] = timed(make(work, x, **options))
    rows = alternate(turns, arguments.rounds, scale=NUM_DATA / len(x))
    compare(rows, subject, targets)
    return Table(title, "seconds", rows, note=f"{steps} steps a turn{agreement(rows, subject)}")


def compare(rows, subject, targets):
    """Ratios of the subject to the others, which are to be at most the targets."""
    ours = next((row for row in rows if row.name == subject), None)
    for row in rows:
        if ours is not None and row is not ours:
            ratio, target = ours.median / row.median, targets.get(row.name)
            row.compare(ratio, "" if target is None else f"{target:.2f}", None if target is None else ratio <= target)


def agreement(rows, subject):
    others = disagreeing(rows, subject)
    return f"; other losses than {subject}'s: {', '.join(others)}" if others else ""


def likelihood(arguments):
    from contestants import by_hand
    from contestants.with_pyro_vae import program

    from pyro_vae.evaluation import log_likelihood

    work, x, particles = Work(128), images(arguments.images, arguments.data_root), arguments.particles
    torch.manual_seed(0)
    vae = program(work)
    torch.manual_seed(0)
    turns = {
        OURS: timed(lambda: log_likelihood(vae, x, particles, progress=False, compile=True).mean().item()),
        BY_HAND: timed(by_hand.log_likelihood(work, x, particles)),
    }
    rows = alternate(turns, arguments.rounds, scale=EVALUATED / arguments.images)
    compare(rows, OURS, {BY_HAND: 0.4})
    title = f"log_likelihood of {EVALUATED:,} images, {particles:,} particles"
    yield Table(title, "seconds", rows, note=f"{arguments.images} images a turn{agreement(rows, OURS)}")


def scale(arguments):
    from contestants.with_pyro_vae import trainer

    work, x = Work(200, hidden=(100,), latent=10), images(max(arguments.sizes))
    turns = {}
    for size in arguments.sizes:
        run, repeats = trainer(work, x[:size], compile=True), arguments.visits // size
        turns[f"{size:,} data"] = timed(lambda run=run, repeats=repeats: [run() for _ in range(repeats)][-1])
    rows = alternate(turns, arguments.rounds, scale=1e6 / arguments.visits)
    for row in rows[1:]:
        ratio = row.median / rows[0].median
        row.compare(ratio, "0.90 to 1.10", 0.9 <= ratio <= 1.1)
    note = f"784-100-10, batch 200, {arguments.visits:,} data a turn; the ratio is to the first row"
    yield Table("A datum's time in training", "microseconds", rows, note)


def memory(arguments):
    rows = []
    for size in arguments.sizes:
        above = [child("epoch", size, True)[1] for _ in range(arguments.memory_rounds)]
        row, limit = Row(f"{size:,} data", above), size * 784 / 2**20 + 300
        row.compare(None, f"{limit:.0f}", row.median <= limit)
        rows.append(row)
    note = "compiling included; the target is the data in their own dtype + 300 MiB"
    yield Table("Peak of a fit above what the process held before", "MiB", rows, note)


def imported(arguments):
    times = [child("imports", "pyro", "pyro_vae") for _ in range(arguments.rounds)]
    beyond = Row("import pyro_vae beyond that", [seconds[1] for seconds in times])
    beyond.compare(None, "0.30", beyond.median <= 0.3)
    rows = [Row("import pyro", [seconds[0] for seconds in times]), beyond]
    yield Table("Import", "seconds", rows, note="of modules, in a new process each time")


def waits(arguments):
    size = min(NUM_DATA, max(arguments.sizes))
    with tempfile.TemporaryDirectory() as warm:
        turns = {
            "import pyro": lambda: child("imports", "pyro")[0],
            "import pyro_vae": lambda: child("imports", "pyro_vae")[0],
            "the command's --help, as a process": lambda: child("imports", "pyro_vae.cli")[-1],
            "first epoch, not compiled": lambda: child("epoch", size, False)[0],
            "first epoch, compiled anew": lambda: _compiled_anew(size),
            "first epoch, compiled before": lambda: child("epoch", size, True, TORCHINDUCTOR_CACHE_DIR=warm)[0],
            "first figures": lambda: child("figures")[0],
        }
        turns["first epoch, compiled before"]()
        turns = {name: lambda turn=turn: (turn(), float("nan")) for name, turn in turns.items()}
        rows = alternate(turns, arguments.rounds, warm_up=False)
    note = f"epochs of {size:,} images, 784-400-50, batch 128, within `fit`"
    yield Table("Where a first-time user waits", "seconds", rows, note)


def _compiled_anew(size):
    with tempfile.TemporaryDirectory() as empty:
        return child("epoch", size, True, TORCHINDUCTOR_CACHE_DIR=empty)[0]


WORKS = {
    "epoch": epochs,
    "bf16": mixed,
    "iwae": importance_weighted,
    "convolutional": convolutional,
    "likelihood": likelihood,
    "scale": scale,
    "memory": memory,
    "import": imported,
    "waits": waits,
}


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=WORKS, default=list(WORKS), metavar="WORK", help=", ".join(WORKS))
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, metavar="NAME", help="; ".join(CONTESTANTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="steps in a turn (default: those of a second or so)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=list(AGAINST_SVI), help="of the work epoch")
    parser.add_argument("--images", type=int, default=EVALUATED, help="images in a turn of the work likelihood")
    parser.add_argument("--particles", type=int, default=5000)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 100_000, 1_000_000], help="of data sets")
    parser.add_argument("--visits", type=int, default=1_000_000, help="data in a turn of the work scale")
    parser.add_argument("--memory-rounds", type=int, default=1, help="memory does not vary as times do")
    parser.add_argument("--threads", type=int, help="processors that may be used (default: all)")
    parser.add_argument("--data-root", type=Path, help="folder of MNIST; without it, images are drawn")
    parser.add_argument("--json", type=Path, help="file for the figures")
    return parser.parse_args()


def limit_threads(threads):
    """What JAX and the processes started go by is the set of processors; PyTorch's own threads are told."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)


def main():
    arguments = parse()
    if arguments.threads:
        limit_threads(arguments.threads)
    report = {"arguments": vars(arguments), "machine": machine(), "tables": []}
    for work in arguments.only:
        for table in WORKS[work](arguments):
            console.print(table.printed())
            report["tables"].append({"work": work, **table.record()})
            if arguments.json:  # after each, so that what was measured is there if a later one fails
                arguments.json.write_text(json.dumps(report, default=str, indent=1))


if __name__ == "__main__":
    main()
