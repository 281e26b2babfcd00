"""A first VAE: handwritten digits, KL annealing, evaluation, and figures of what it learned.

python examples/first_vae.py --out first_vae
"""

import argparse
from pathlib import Path

import torch
from pyro.infer import Trace_ELBO

from pyro_vae import VAE, data, evaluation, fit, likelihoods, networks, plots, posteriors, priors, schedules


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("first_vae"), help="folder for the figures")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    train, valid, test = data.load("digits", binarize="dynamic")
    vae = VAE(
        prior=priors.StandardNormal(8),
        likelihood=likelihoods.Bernoulli(networks.MLP(8, 64, hidden=(128,)), (1, 8, 8)),
        posterior=posteriors.DiagonalNormal(networks.MLP(64, 2 * 8, hidden=(128,)), 8),
    )
    fitted = fit(
        vae,
        train,
        valid=valid,
        estimator=Trace_ELBO(),
        anneal=schedules.Linear(0.1),
        epochs=arguments.epochs,
        lr=3e-3,
        lr_schedule="cosine",
        start_at_mean=True,
        seed=0,
    )
    print(fitted.history.tail(3).round(2).to_string(index=False))

    summary = evaluation.summarize(vae, test, num_particles=1000)
    print(
        f"NLL {-summary.log_likelihood.mean():.2f}, ELBO {summary.elbo.mean():.2f}, rate {summary.rate.mean():.2f}, ",
        end="",
    )
    print(
        f"distortion {summary.distortion.mean():.2f} nats per datum; {evaluation.active_units(vae, test)} active units"
    )

    arguments.out.mkdir(parents=True, exist_ok=True)
    means, _ = evaluation.sample(vae, 64, test.event_shape, seed=0)
    originals, _ = test[torch.arange(64)]
    plots.training_curve(fitted.history).savefig(arguments.out / "training.png")
    plots.image_grid(means).savefig(arguments.out / "samples.png")
    plots.reconstructions(originals, evaluation.reconstruct(vae, originals)).savefig(
        arguments.out / "reconstructions.png"
    )
    plots.latent_space(evaluation.posterior_means(vae, test), test.y).savefig(arguments.out / "latent_space.png")


if __name__ == "__main__":
    main()
