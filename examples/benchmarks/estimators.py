"""Estimators on dynamically binarized MNIST, 784-200-200-50 with tanh, for an equal time of training each.

The learning rate falls to zero along half a cosine of the time, so that each run ends settled, however many steps it
came to. The clock runs while batches are drawn and steps taken, and stands still while data are loaded and evaluated.
By `--clock process` it is processor time, which on a machine that others use is fairer than the wall's.

    python examples/benchmarks/estimators.py --data-root data --minutes 8 --json runs/estimators.json

One estimator at a time, in a process pinned to a core, and the table of all:

    taskset -c 0 python examples/benchmarks/estimators.py --data-root data --estimators "DReG(num_particles=5)" \
        --clock process --json runs/dreg.json
    python examples/benchmarks/estimators.py --table runs/*.json
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from torch.optim.lr_scheduler import LambdaLR

import pyro_vae
from pyro_vae import data, evaluation, expressions
from pyro_vae.training import Training

ESTIMATORS = (
    "Trace_ELBO()",
    "TraceMeanField_ELBO()",
    "StickingTheLanding()",
    "IWAE(num_particles=5)",
    "DReG(num_particles=5)",
)
CLOCKS = {"wall": time.perf_counter, "process": time.process_time}
COLUMNS = {  # of the table: how to write a result
    "estimator": lambda result: f"`{result['estimator']}`",
    "epochs": lambda result: f"{result['epochs']:.1f}",
    "test NLL": lambda result: f"{result['nll']:.2f} ± {result['standard_error']:.2f}",
    "ELBO": lambda result: f"{result['elbo']:.2f}",
    "rate": lambda result: f"{result['rate']:.2f}",
    "active units": lambda result: str(result["active_units"]),
    "ms a step": lambda result: f"{result['milliseconds']:.2f}",
}


def train(vae, train_data, estimator, arguments):
    """Train until the time is over; returns the steps, the epochs and the time in seconds."""
    seconds, clock = 60 * arguments.minutes, CLOCKS[arguments.clock]
    began = None  # with the first step: loading the optimizer and the like is no training

    def falling(_):
        share = 0.0 if began is None else min((clock() - began) / seconds, 1.0)
        return (1 + math.cos(math.pi * share)) / 2

    training = Training(
        vae,
        train_data,
        estimator=expressions.parse(estimator, "estimator"),
        epochs=10**6,
        batch_size=arguments.batch_size,
        lr=arguments.lr,
        lr_schedule=lambda optimizer: LambdaLR(optimizer, falling),
        device="cpu",
        seed=arguments.seed,
        start_at_mean=True,
    )
    began = clock()
    for _ in training:
        if clock() - began >= seconds:
            break
    training.check_finite()
    return training.step, training.step / len(training.batches), clock() - began


def run(estimator, splits, arguments):
    """Train and evaluate one contestant."""
    torch.manual_seed(arguments.seed)
    network = "MLP(hidden=[200, 200], activation='tanh')"
    vae = pyro_vae.build(splits.train.event_shape, arguments.latent, network=network)
    steps, epochs, seconds = train(vae, splits.train, estimator, arguments)
    test = splits.test.select(slice(arguments.test))
    summary = evaluation.summarize(vae, test, arguments.particles)
    log_likelihood = summary.log_likelihood
    return {
        "estimator": estimator,
        "seed": arguments.seed,
        "clock": arguments.clock,
        "minutes": arguments.minutes,
        "threads": arguments.threads,
        "batch_size": arguments.batch_size,
        "lr": arguments.lr,
        "steps": steps,
        "epochs": epochs,
        "milliseconds": 1e3 * seconds / steps,
        "test": len(test),
        "particles": arguments.particles,
        "nll": -log_likelihood.mean().item(),
        "standard_error": (log_likelihood.std() / len(test) ** 0.5).item(),
        "elbo": summary.elbo.mean().item(),
        "rate": summary.rate.mean().item(),
        "active_units": evaluation.active_units(vae, test),
    }


def show(results):
    """The table, in Markdown."""
    print("| " + " | ".join(COLUMNS) + " |")
    print("|---" * len(COLUMNS) + "|")
    order = {estimator: place for place, estimator in enumerate(ESTIMATORS)}
    for result in sorted(results, key=lambda result: (order.get(result["estimator"], len(order)), result["seed"])):
        print("| " + " | ".join(write(result) for write in COLUMNS.values()) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-root", type=Path, help="folder that holds MNIST/raw")
    parser.add_argument("--estimators", nargs="+", default=list(ESTIMATORS), help="expressions")
    parser.add_argument("--minutes", type=float, default=8.0, help="of training, for each estimator")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="process: processor time")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3, help="where it starts")
    parser.add_argument("--latent", type=int, default=50)
    parser.add_argument("--test", type=int, default=10_000, help="test images to evaluate on")
    parser.add_argument("--particles", type=int, default=1000, help="particles in the test NLL")
    parser.add_argument("--json", type=Path, help="file that results are appended to, a list")
    parser.add_argument("--table", type=Path, nargs="+", help="train nothing: the table of the results in these files")
    arguments = parser.parse_args()
    if arguments.table:
        show([result for path in arguments.table for result in json.loads(path.read_text())])
        return
    torch.set_num_threads(arguments.threads)
    splits = data.load("mnist", root=arguments.data_root, binarize="dynamic")
    results = []
    for estimator in arguments.estimators:
        results.append(run(estimator, splits, arguments))
        if arguments.json:
            before = json.loads(arguments.json.read_text()) if arguments.json.exists() else []
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps([*before, results[-1]], indent=2))
    show(results)


if __name__ == "__main__":
    main()
