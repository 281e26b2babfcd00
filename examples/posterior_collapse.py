"""Posterior collapse on scikit-learn's digits: a decoder that needs no latent, and five ways to train it.

The likelihood is autoregressive. Each pixel sees those before it, and the plain ELBO trains a model that says all with
them and next to nothing with the latent. Annealing, free bits and beta below 1 keep the latent in use. The test NLL is
importance-weighted, with beta = 1 and in nats per datum, whatever the loss that a program was trained with.

python examples/posterior_collapse.py --out runs/posterior-collapse
"""

import argparse
import json
import time
import warnings
from pathlib import Path

import torch
from matplotlib.figure import Figure

from pyro_vae import VAE, data, estimators, evaluation, fit, likelihoods, networks, posteriors, priors, schedules

CONTESTANTS = {  # name: what `fit` is told, beside the rest that is equal
    "plain ELBO": {},
    "`Linear(0.5)`": {"anneal": schedules.Linear(0.5)},
    "`Cyclical(4)`": {"anneal": schedules.Cyclical(4)},
    "`FreeBits(0.5)`": {"estimator": estimators.FreeBits(0.5)},
    "`Constant(0.5)`": {"anneal": schedules.Constant(0.5)},
}


def build(arguments):
    """A VAE with a PixelCNN for a decoder, whose receptive field is the whole image."""
    latent, channels = arguments.latent, arguments.channels
    return VAE(
        prior=priors.StandardNormal(latent),
        likelihood=likelihoods.Autoregressive(
            networks.MLP(latent, channels * 64, hidden=(128,)), (1, 8, 8), channels=channels, blocks=arguments.blocks
        ),
        posterior=posteriors.DiagonalNormal(networks.MLP((1, 8, 8), 2 * latent, hidden=(128,)), latent),
    )


def run(name, seed, splits, arguments):
    """Train and evaluate one contestant; returns what came out, and draws from p(x given z) at z of test digits."""
    torch.manual_seed(seed)
    vae = build(arguments)
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the run ends with beta")  # that is what is tried here
        history = fit(
            vae,
            splits.train,
            epochs=arguments.epochs,
            batch_size=64,
            lr=arguments.lr,
            seed=seed,
            progress=False,
            **CONTESTANTS[name],
        ).history
    seconds = time.perf_counter() - started
    summary = evaluation.summarize(vae, splits.test, arguments.num_particles)
    result = {
        "name": name,
        "seed": seed,
        "nll": -summary.log_likelihood.mean().item(),
        "standard_error": (summary.log_likelihood.std() / len(splits.test) ** 0.5).item(),
        "elbo": summary.elbo.mean().item(),
        "rate": summary.rate.mean().item(),
        "distortion": summary.distortion.mean().item(),
        "active_units": evaluation.active_units(vae, splits.test),
        "rates": history.rate.tolist(),
        "seconds": seconds,
    }
    with torch.no_grad():
        x = splits.test[torch.arange(arguments.digits)][0]
        return result, vae.likelihood(vae.posterior(x).sample()).sample()


def show(results):
    """The table, in Markdown: active units of each seed, means over seeds, and ranges."""
    columns = ("", "active units", "rate", "distortion", "ELBO", "NLL", "less the plain's, by seed", "seconds a run")
    plain = {result["seed"]: result["nll"] for result in results if result["name"] == "plain ELBO"}
    print("| " + " | ".join(columns) + " |")
    print("|---" * len(columns) + "|")
    for name in CONTESTANTS:
        own = [result for result in results if result["name"] == name]
        cells = [name, "/".join(str(result["active_units"]) for result in own)]
        cells += [spread([result[key] for result in own]) for key in ("rate", "distortion", "elbo", "nll")]
        cells.append(spread([result["nll"] - plain[result["seed"]] for result in own]))
        cells.append(f"{sum(result['seconds'] for result in own) / len(own):.0f}")
        print("| " + " | ".join(cells) + " |")


def spread(values):
    """Mean and range."""
    return f"{sum(values) / len(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def draw(results, draws, originals, path):
    """Rates over epochs, and what the latent of a digit says of it: the digit, and draws given its latent."""
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    rates, digits = figure.subplots(1, 2, width_ratios=(4, 5))
    for color, name in enumerate(CONTESTANTS):
        for result in (result for result in results if result["name"] == name):
            label = name.strip("`") if result["seed"] == 0 else None
            rates.plot(range(1, len(result["rates"]) + 1), result["rates"], color=f"C{color}", label=label, linewidth=1)
    highest = max(max(result["rates"]) for result in results)
    rates.set(xlabel="epoch", title="rate (nats per datum)", ylim=(0, 1.25 * highest))
    rates.grid(alpha=0.3)
    rates.legend(frameon=False, fontsize=8, ncols=3, loc="upper center")
    rows = {"test digits": originals, **draws}
    grid = torch.nn.functional.pad(torch.stack(list(rows.values()))[:, :, 0], (1, 1, 1, 1), value=0.5)
    digits.imshow(grid.transpose(1, 2).flatten(2).flatten(0, 1), cmap="gray", interpolation="nearest")
    digits.set_yticks([10 * row + 4.5 for row in range(len(rows))], [name.strip("`") for name in rows])
    digits.set(xticks=[], title="test digits, and draws of x given z from their posteriors")
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/posterior-collapse"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--latent", type=int, default=8)
    parser.add_argument("--channels", type=int, default=16, help="of the decoder's PixelCNN")
    parser.add_argument("--blocks", type=int, default=3, help="of the decoder's PixelCNN")
    parser.add_argument("--num-particles", type=int, default=200, help="particles in the test NLL")
    parser.add_argument("--digits", type=int, default=12, help="test digits in the figure")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    splits = data.load("digits", binarize="dynamic")
    results, draws = [], {}
    for seed in range(arguments.seeds):
        for name in CONTESTANTS:
            result, drawn = run(name, seed, splits, arguments)
            results.append(result)
            draws.setdefault(name, drawn)  # those of the first seed
            (arguments.out / "results.json").write_text(json.dumps(results, indent=2))
    draw(results, draws, splits.test[torch.arange(arguments.digits)][0], arguments.out / "posterior_collapse.png")
    show(results)


if __name__ == "__main__":
    main()
