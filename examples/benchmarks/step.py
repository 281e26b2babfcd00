"""What a training step costs beside a hand-written one: the same network, data and optimizer, side by side.

    python examples/benchmarks/step.py --batch-size 256

Contestants take turns in one process; each figure is the median over rounds of the mean step of a round. The data are
images of MNIST's shape, in memory as uint8, drawn at random: their values do not change what a step costs.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F

import pyro_vae
from pyro_vae.training import steps


def batches(x, batch_size):
    while True:
        for rows in torch.randperm(len(x)).split(batch_size):
            if len(rows) == batch_size:
                yield x[rows].float().div_(255)


def network(latent, hidden):
    encoder = nn.Sequential(nn.Linear(784, hidden), nn.ReLU(), nn.Linear(hidden, 2 * latent))
    decoder = nn.Sequential(nn.Linear(latent, hidden), nn.ReLU(), nn.Linear(hidden, 784))
    return encoder, decoder


def by_hand(x, batch_size, latent, hidden, **options):
    """The textbook's loop, as a person would write it in PyTorch."""
    encoder, decoder = network(latent, hidden)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-3, **options)
    for batch in batches(x, batch_size):
        mu, log_variance = encoder(batch).chunk(2, -1)
        z = mu + torch.randn_like(mu) * torch.exp(0.5 * log_variance)
        bce = F.binary_cross_entropy_with_logits(decoder(z), batch, reduction="sum")
        kl = -0.5 * torch.sum(1 + log_variance - mu**2 - log_variance.exp())
        loss = (bce + kl) / batch_size
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


def by_svi(x, batch_size, latent, hidden):
    """Pyro's own loop on our program."""
    vae = build(latent, hidden)
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), loss=Trace_ELBO())
    for batch in batches(x, batch_size):
        yield svi.step(batch) / batch_size


def by_us(x, batch_size, latent, hidden):
    data = x[: len(x) // batch_size * batch_size]
    yield from steps(build(latent, hidden), data, epochs=10**6, batch_size=batch_size, device="cpu")


def build(latent, hidden):
    return pyro_vae.build((784,), latent=latent, network=f"MLP(hidden=[{hidden}])")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--latent", type=int, default=20)
    parser.add_argument("--hidden", type=int, default=400)
    parser.add_argument("--steps", type=int, default=30, help="steps in a round")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    x = (torch.rand(20_000, 784) < 0.13).to(torch.uint8) * 255
    problem = (x, arguments.batch_size, arguments.latent, arguments.hidden)
    contestants = {
        "hand-written": by_hand(*problem),
        "hand-written, fused Adam": by_hand(*problem, fused=True),
        "pyro_vae": by_us(*problem),
        "pyro.infer.SVI": by_svi(*problem),
    }
    for contestant in contestants.values():  # warm-up
        for _ in range(5):
            next(contestant)
    milliseconds = {name: [] for name in contestants}
    for _ in range(arguments.rounds):
        for name, contestant in contestants.items():
            start = time.perf_counter()
            for _ in range(arguments.steps):
                next(contestant)
            milliseconds[name].append((time.perf_counter() - start) / arguments.steps * 1e3)

    medians = {name: statistics.median(times) for name, times in milliseconds.items()}
    table = Table(title=f"784-{arguments.hidden}-{arguments.latent}, batch {arguments.batch_size}, milliseconds a step")
    for column in ("", "median", "least", "ratio to hand-written", "to fused"):
        table.add_column(column, justify="left" if not column else "right")
    for name, times in milliseconds.items():
        ratios = [f"{medians[name] / medians[base]:.2f}" for base in ("hand-written", "hand-written, fused Adam")]
        table.add_row(name, f"{medians[name]:.2f}", f"{min(times):.2f}", *ratios)
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps({"arguments": vars(arguments), "milliseconds": milliseconds}, default=str))
    pyro.clear_param_store()


if __name__ == "__main__":
    main()
