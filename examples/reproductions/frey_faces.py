"""Likelihoods of grey images on the Frey faces, split at random: bits per dimension over seeds.

python examples/reproductions/frey_faces.py --data data/frey_faces/frey_faces.npz --out runs/frey-faces
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

CONTESTANTS = {  # name: (likelihood, whether it is a density, of dequantized images)
    "Gaussian, optimal scale": ("Gaussian(scale='optimal')", True),
    "Beta": ("Beta()", True),
    "discretized logistic": ("DiscretizedLogistic(bins=256)", False),
    "mixture of 5": ("DiscretizedLogisticMixture(components=5, bins=256)", False),
}


def run(name, seed, arguments):
    """Train and evaluate one contestant, and write what came out."""
    likelihood, density = CONTESTANTS[name]
    bins = 256 if density else None
    train, _, test = data.load(arguments.data, dequantize=bins, valid=0, test=400, seed=seed)
    torch.manual_seed(seed)
    network = f"MLP(hidden={list(arguments.hidden)})"
    vae = pyro_vae.build(train.event_shape, arguments.latent, likelihood=likelihood, network=network)
    started = time.perf_counter()
    fit(
        vae,
        train,
        anneal=schedules.Linear(0.1),
        epochs=arguments.epochs,
        batch_size=100,
        lr=arguments.lr,
        lr_schedule="one-cycle",
        start_at_mean=True,
        seed=seed,
    )
    trained = time.perf_counter()
    summary = evaluation.summarize(vae, test, arguments.num_particles)
    bits = evaluation.bits_per_dimension(summary.log_likelihood, test.event_shape, bins)
    result = {
        "name": name,
        "seed": seed,
        "bits_per_dimension": bits.mean().item(),
        "rate": summary.rate.mean().item(),
        "active_units": evaluation.active_units(vae, test),
        "training_seconds": trained - started,
    }
    means, _ = evaluation.sample(vae, 64, test.event_shape, seed=0)
    plots.image_grid(means).savefig(arguments.out / file_name(name, seed, "png"))
    (arguments.out / file_name(name, seed, "json")).write_text(json.dumps(result, indent=2))


def file_name(name, seed, suffix):
    """The name of a contestant's file."""
    return f"{name} {seed}.{suffix}".replace(",", "").replace(" ", "-")


def show(out):
    """The table of all results in `out`: means and ranges over seeds."""
    results = [json.loads(path.read_text()) for path in sorted(out.glob("*.json"))]
    table = Table(title="Frey faces, 400 test images")
    for column in ("likelihood", "seeds", "bits per dimension", "rate (nats)", "active units", "minutes of training"):
        table.add_column(column, justify="right")
    for name in CONTESTANTS:
        own = [r for r in results if r["name"] == name]
        if own:
            bits = torch.tensor([r["bits_per_dimension"] for r in own])
            table.add_row(
                name,
                str(len(own)),
                f"{bits.mean():.3f} ({bits.min():.3f} to {bits.max():.3f})",
                f"{sum(r['rate'] for r in own) / len(own):.1f}",
                f"{sum(r['active_units'] for r in own) / len(own):.0f}",
                f"{sum(r['training_seconds'] for r in own) / len(own) / 60:.1f}",
            )
    Console(width=120).print(table)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="the file frey_faces.npz")
    parser.add_argument("--out", type=Path, default=Path("runs/frey-faces"))
    parser.add_argument("--only", nargs="*", default=list(CONTESTANTS), help="names of contestants")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--latent", type=int, default=20)
    parser.add_argument("--hidden", type=int, nargs="*", default=[300, 300])
    parser.add_argument("--num-particles", type=int, default=500)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for seed in range(arguments.seeds):
        for name in arguments.only:
            if not (arguments.out / file_name(name, seed, "json")).exists():
                print(f"{name}, seed {seed}", flush=True)
                run(name, seed, arguments)
    show(arguments.out)


if __name__ == "__main__":
    main()
