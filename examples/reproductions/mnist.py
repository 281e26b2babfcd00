"""Priors and posteriors on dynamically binarized MNIST, with equal networks and budget: test NLL over seeds.

python examples/reproductions/mnist.py --data-root data --out runs/mnist-components
"""

import argparse
import json
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import pyro_vae
from pyro_vae import data, evaluation, fit, plots, schedules

CONTESTANTS = {  # name: (prior, posterior)
    "standard normal prior": ("StandardNormal()", "DiagonalNormal()"),
    "mixture prior": ("GaussianMixture(components=100)", "DiagonalNormal()"),
    "Vamp prior": ("VampPrior(components=500)", "DiagonalNormal()"),
    "flow prior": ("Flow()", "DiagonalNormal()"),
    "full posterior": ("StandardNormal()", "FullNormal()"),
    "flow posterior": ("StandardNormal()", "Flow()"),
}


def run(name, seed, splits, arguments, out):
    """Train and evaluate one contestant, and write what came out."""
    prior, posterior = CONTESTANTS[name]
    torch.manual_seed(seed)
    network = f"MLP(hidden={list(arguments.hidden)})"
    event_shape = splits.train.event_shape
    vae = pyro_vae.build(event_shape, arguments.latent, prior=prior, posterior=posterior, network=network)
    started = time.perf_counter()
    fit(
        vae,
        splits.train,
        anneal=schedules.Linear(0.1),
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        lr=arguments.lr,
        lr_schedule="one-cycle",
        start_at_mean=True,
        seed=seed,
    )
    trained = time.perf_counter()
    summary = evaluation.summarize(vae, splits.test.x[: arguments.test], arguments.num_particles)
    result = {
        "name": name,
        "seed": seed,
        "nll": -summary.log_likelihood.mean().item(),
        "elbo": summary.elbo.mean().item(),
        "rate": summary.rate.mean().item(),
        "active_units": evaluation.active_units(vae, splits.test),
        "training_seconds": trained - started,
        "evaluation_seconds": time.perf_counter() - trained,
    }
    means, _ = evaluation.sample(vae, 64, event_shape, seed=0)
    plots.image_grid(means).savefig(out / f"{name} {seed}.png".replace(" ", "-"))
    (out / f"{name} {seed}.json".replace(" ", "-")).write_text(json.dumps(result, indent=2))


def show(out):
    """The table of all results in `out`: means over seeds, and differences to the first contestant seed by seed."""
    results = [json.loads(path.read_text()) for path in sorted(out.glob("*.json"))]
    nll = {(r["name"], r["seed"]): r["nll"] for r in results}
    first = next(iter(CONTESTANTS))
    table = Table(title="test NLL, nats per datum")
    for column in ("", "seeds", "NLL", "less the first's", "ELBO", "active units", "minutes of training"):
        table.add_column(column, justify="right")
    for name in CONTESTANTS:
        own = [r for r in results if r["name"] == name]
        if own:
            less = [nll[name, r["seed"]] - nll[first, r["seed"]] for r in own if (first, r["seed"]) in nll]
            table.add_row(
                name,
                str(len(own)),
                spread([r["nll"] for r in own]),
                spread(less) if less else "",
                spread([r["elbo"] for r in own]),
                f"{sum(r['active_units'] for r in own) / len(own):.0f}",
                f"{sum(r['training_seconds'] for r in own) / len(own) / 60:.1f}",
            )
    Console(width=120).print(table)


def spread(values):
    """Mean and range."""
    values = torch.tensor(values)
    return f"{values.mean():.2f} ({values.min():.2f} to {values.max():.2f})"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-root", type=Path, help="folder that holds MNIST/raw")
    parser.add_argument("--out", type=Path, default=Path("runs/mnist-components"))
    parser.add_argument("--only", nargs="*", default=list(CONTESTANTS), help="names of contestants")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=200)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--latent", type=int, default=40)
    parser.add_argument("--hidden", type=int, nargs="*", default=[300, 300])
    parser.add_argument("--num-particles", type=int, default=500)
    parser.add_argument("--test", type=int, default=2000, help="test images to evaluate on")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    splits = data.load("mnist", root=arguments.data_root, binarize="dynamic")
    for seed in range(arguments.seeds):
        for name in arguments.only:
            if not (arguments.out / f"{name} {seed}.json".replace(" ", "-")).exists():
                print(f"{name}, seed {seed}", flush=True)
                run(name, seed, splits, arguments, arguments.out)
    show(arguments.out)


if __name__ == "__main__":
    main()
