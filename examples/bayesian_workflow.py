"""The Bayesian workflow on scikit-learn's digits: from what the prior predicts to a decision between four programs.

Each of the 64 values of a digit counts the black pixels, 0 to 16, in a block of 4 by 4 of the scanned bitmap. A
binomial likelihood is the natural first guess, and a standard normal the natural first prior. Checks say what is wrong
with them, and the evidence of held-out digits decides between two likelihoods and two priors.

python examples/bayesian_workflow.py --out runs/bayesian-workflow
"""

import argparse
from pathlib import Path

import torch

from pyro_vae import (
    VAE,
    comparison,
    data,
    diagnostics,
    fit,
    likelihoods,
    networks,
    plots,
    posteriors,
    priors,
    schedules,
)
from pyro_vae.export import write_arviz

LATENT = 8
LIKELIHOODS = {
    "binomial": lambda net: likelihoods.Binomial(net, (64,), total_count=16),
    "categorical": lambda net: likelihoods.Categorical(net, (64,), num_classes=17),
}
PRIORS = {
    "standard normal": lambda: priors.StandardNormal(LATENT),
    "mixture": lambda: priors.GaussianMixture(LATENT, components=10),
}
STATISTICS = {  # of a data set of shape (N, 64)
    "share of zeros": lambda x: (x == 0).double().mean(),
    "share of full blocks": lambda x: (x == 16).double().mean(),
    "mean": lambda x: x.double().mean(),
    "roughness": lambda x: x.double().diff(dim=-1).abs().mean(),  # between neighbours in a row
    "spread of totals": lambda x: x.sum(-1).double().std(),
}


def load():
    """Digits as counts 0 to 16, of shape (N, 64): for training, validation and testing, and labels of the last."""
    train, valid, test = data.load("digits")
    return *((16 * part.x).round().flatten(1) for part in (train, valid, test)), test.y


def build(likelihood, prior, seed=0):
    """A VAE of a likelihood and a prior, by their names, with equal networks."""
    torch.manual_seed(seed)
    outputs = {"binomial": 64, "categorical": 64 * 17}[likelihood]
    return VAE(
        prior=PRIORS[prior](),
        likelihood=LIKELIHOODS[likelihood](networks.MLP(LATENT, outputs, hidden=(256,))),
        posterior=posteriors.DiagonalNormal(networks.MLP(64, 2 * LATENT, hidden=(256,)), LATENT),
    )


def train(vae, x, valid, epochs, progress=False):
    """Fit a program; returns its history."""
    options = {"batch_size": 64, "lr": 1e-3, "lr_schedule": "one-cycle", "start_at_mean": True}
    return fit(vae, x, valid=valid, anneal=schedules.Linear(0.2), epochs=epochs, progress=progress, **options).history


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/bayesian-workflow"))
    parser.add_argument("--epochs", type=int, default=80)
    parser.add_argument("--test", type=int, default=359, help="test digits")
    parser.add_argument("--num-samples", type=int, default=300, help="replicated data sets, and draws for each digit")
    parser.add_argument("--compared", type=int, default=40, help="test digits by whose evidence programs are compared")
    parser.add_argument("--num-temperatures", type=int, default=300, help="steps of the annealed chains for these")
    parser.add_argument("--checks", nargs="*", help="names of checks of the inference; by default all")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    x, valid, test, labels = load()
    test, labels = test[: arguments.test], labels[: arguments.test]

    def check(vae, title, from_prior=False):
        """One predictive check, said and drawn."""
        replicates = {"num_samples": arguments.num_samples, "from_prior": from_prior}
        found = diagnostics.predictive_checks(vae, test, STATISTICS, **replicates)
        print(f"{title}: {found.verdict}")
        plots.predictive_checks(found).savefig(arguments.out / f"{title.replace(', ', '-').replace(' ', '-')}.png")

    check(build("binomial", "standard normal"), "prior predictive, before fitting", from_prior=True)
    programs = {}
    for likelihood in LIKELIHOODS:
        for prior in PRIORS:
            vae = programs[f"{likelihood}, {prior}"] = build(likelihood, prior)
            train(vae, x, valid, arguments.epochs, progress=True)
            check(vae, f"posterior predictive, {likelihood}, {prior}")

    annealed = {"method": "ais", "num_temperatures": arguments.num_temperatures}
    models = comparison.models(programs, test[: arguments.compared], **annealed)
    print(models.table[["elpd", "elpd_diff", "dse", "mc_dse"]])
    print(models.verdict)
    plots.models(models).savefig(arguments.out / "models.png")

    best = programs[models.table.index[0]]
    for name, verdict in diagnostics.diagnose(best, test, only=arguments.checks).verdicts.items():
        print(f"{name} {verdict}")
    path = write_arviz(best, test, arguments.out / "posterior.nc", num_samples=arguments.num_samples, labels=labels)
    print(f"draws for ArviZ: {path}")


if __name__ == "__main__":
    main()
