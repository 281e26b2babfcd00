"""What `bf16-mixed` costs in nats: test log-likelihoods of MNIST after training in either precision, seed by seed.

    python examples/benchmarks/precision.py --data-root data

The same seed gives both the same start, order and noise. The network is 784-200-200-50 with tanh, the learning rate
goes up and down once (one-cycle), images are binarized anew in each epoch.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import pyro_vae
from pyro_vae import data, evaluation, fit

PRECISIONS = ("32-true", "bf16-mixed")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-root", type=Path, help="folder that holds MNIST/raw")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--train", type=int, default=60_000, help="training images")
    parser.add_argument("--test", type=int, default=10_000, help="test images")
    parser.add_argument("--particles", type=int, default=500, help="particles a test image")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()

    splits = data.load("mnist", arguments.data_root, binarize="dynamic")
    train, test = splits.train.select(slice(arguments.train)), splits.test.select(slice(arguments.test))
    nll = {precision: [] for precision in PRECISIONS}
    for seed in range(arguments.seeds):
        for precision in PRECISIONS:
            torch.manual_seed(seed)
            vae = pyro_vae.build((1, 28, 28), latent=50, network="MLP(hidden=[200, 200], activation='tanh')")
            options = {"epochs": arguments.epochs, "batch_size": 100, "lr": 2e-3, "lr_schedule": "one-cycle"}
            fit(vae, train, start_at_mean=True, seed=seed, precision=precision, compile=arguments.compile, **options)
            found = evaluation.log_likelihood(vae, test, arguments.particles, compile=arguments.compile)
            nll[precision].append(-found.mean().item())
            if arguments.json:
                arguments.json.write_text(json.dumps({"arguments": vars(arguments), "nll": nll}, default=str))

    table = Table(title=f"Test NLL in nats, {arguments.epochs} epochs, {arguments.particles} particles")
    for column in ("", *(f"seed {seed}" for seed in range(arguments.seeds)), "mean"):
        table.add_column(column, justify="left" if not column else "right")
    difference = [mixed - full for full, mixed in zip(*nll.values(), strict=True)]
    for name, values in {**nll, "difference": difference}.items():
        table.add_row(name, *(f"{value:.3f}" for value in (*values, statistics.fmean(values))))
    Console().print(table)


if __name__ == "__main__":
    main()
