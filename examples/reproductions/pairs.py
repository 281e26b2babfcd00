"""Which prior, posterior and likelihood train together: every pair of them, on scikit-learn's data, in float32.

Of the triples as many are trained as it takes for every two components that fit to have met. Writes a table, one row a
triple: what became of it, or why it was refused.

python examples/reproductions/pairs.py --out docs/pairs.csv
"""

import argparse
import csv
import itertools
from collections import defaultdict
from pathlib import Path

import pandas as pd
import torch
from pyro.infer import Trace_ELBO
from rich.progress import track
from sklearn.datasets import load_diabetes, load_digits, load_wine
from torch import nn

import pyro_vae
from pyro_vae import data, expressions
from pyro_vae.networks import Standardized
from pyro_vae.training import steps

OPTIONS = {  # in place of a bare name()
    "Autoregressive": "Autoregressive(channels=4, blocks=1, kernel_size=3)",
    "Binomial": "Binomial(total_count=16)",
    "Categorical": "Categorical(num_classes=17)",
    "DiscretizedLogistic": "DiscretizedLogistic(bins=17)",
    "DiscretizedLogisticMixture": "DiscretizedLogisticMixture(components=3, bins=17)",
    "Gaussian": "Gaussian(scale='global')",
    "Heterogeneous": (
        "Heterogeneous(parts={'age': Poisson(), 'sex': Categorical(num_classes=2), ('bmi', 'bp'): Gamma(), "
        "'target': Gaussian()})"
    ),
    "OneHotCategorical": "OneHotCategorical(classes=3)",
    "RelaxedOneHotCategorical": "RelaxedOneHotCategorical(classes=3)",
    "SemiAmortized": "SemiAmortized(base=DiagonalNormal(), steps=2)",
    "VampPrior": "VampPrior(components=10)",
}
FIELDS = ("prior", "posterior", "likelihood", "result", "reason")


def datasets():
    """Real data for each likelihood: digits as counts, classes, bits, grey values; a table of positive numbers."""
    counts = torch.as_tensor(load_digits().images, dtype=torch.float32)[:, None]
    grey, wine = counts / 16, torch.as_tensor(load_wine().data, dtype=torch.float32)
    wine /= wine.mean(0)  # columns in units of their mean, which differ a thousandfold
    frame = load_diabetes(scaled=False, as_frame=True).frame[["age", "sex", "bmi", "bp", "target"]]
    frame["sex"] -= 1
    suited = {
        "Autoregressive": grey.round(),
        "Bernoulli": grey.round(),
        "Beta": data.InMemory(grey, dequantize=17),
        "Gamma": wine,
        "LogNormal": wine,
        "Heterogeneous": frame,
    }
    whole_numbers = ("Binomial", "Categorical", "NegativeBinomial", "Poisson")
    suited |= dict.fromkeys((*whole_numbers, "ZeroInflatedNegativeBinomial", "ZeroInflatedPoisson"), counts)
    return {name: suited.get(name, grey) for name in expressions.names("likelihood")}


def build(prior, posterior, likelihood, x):
    """The program of three components."""
    table = isinstance(x, pd.DataFrame)  # whose columns differ in scale
    standardized = Standardized.of(nn.Identity(), torch.as_tensor(x.to_numpy())) if table else None
    text = {name: OPTIONS.get(name, f"{name}()") for name in (prior, posterior, likelihood)}
    return pyro_vae.build(
        data.as_source(x).event_shape,
        latent=6,
        prior=text[prior],
        posterior=text[posterior],
        likelihood=text[likelihood],
        network="Standardized(net=MLP(hidden=[16])), MLP(hidden=[16])" if table else "MLP(hidden=[16])",
        size=len(x),
        standardize=(standardized.loc, standardized.scale) if standardized else None,
    )


def train(program, x, num_steps):
    """Train for some steps; whether the ELBO rose. A loss or weight that is not finite raises."""
    epochs = -(-num_steps * 32 // len(x))
    taken = steps(program, x, estimator=Trace_ELBO(), epochs=epochs, batch_size=32, lr=1e-3, seed=0)
    elbos = torch.tensor([step.elbo for step in itertools.islice(taken, num_steps)])
    return bool(elbos[-num_steps // 10 :].mean() > elbos[: num_steps // 10].mean())


def triples(names):
    """A few triples of components in which every two that fit occur together; and the pairs that are refused."""
    x = datasets()["Bernoulli"]
    refused, fitting = {}, []
    for prior, posterior in itertools.product(names["prior"], names["posterior"]):
        try:
            build(prior, posterior, "Bernoulli", x)
            fitting.append((prior, posterior))
        except ValueError as error:
            refused[prior, posterior] = str(error)
    chosen, met = [], defaultdict(set)
    for likelihood in names["likelihood"]:
        for prior, posterior in fitting:
            if prior not in met[likelihood, "prior"] or posterior not in met[likelihood, "posterior"]:
                met[likelihood, "prior"].add(prior)
                met[likelihood, "posterior"].add(posterior)
                chosen.append((prior, posterior, likelihood))
        fitting = fitting[5:] + fitting[:5]  # so that each likelihood begins with other pairs
    covered = {pair[:2] for pair in chosen}
    chosen += [(*pair, "Bernoulli") for pair in fitting if pair not in covered]
    return chosen, refused


def result(prior, posterior, likelihood, x, num_steps):
    """One row of the table."""
    torch.manual_seed(0)
    row = {"prior": prior, "posterior": posterior, "likelihood": likelihood, "reason": ""}
    try:
        program = build(prior, posterior, likelihood, x)
    except ValueError as error:
        return row | {"result": "refused", "reason": str(error)}
    try:
        rose = train(program, x, num_steps)
    except FloatingPointError as error:
        return row | {"result": "failed", "reason": str(error)}
    return row | ({"result": "trained"} if rose else {"result": "failed", "reason": "the ELBO did not rise"})


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("pairs.csv"))
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--first", type=int, help="train only so many triples")
    arguments = parser.parse_args()
    chosen, refused = triples({slot: expressions.names(slot) for slot in ("prior", "posterior", "likelihood")})
    suited = datasets()
    rows = [
        {"prior": prior, "posterior": posterior, "likelihood": "any", "result": "refused", "reason": reason}
        for (prior, posterior), reason in refused.items()
    ]
    for names in track(chosen[: arguments.first], "triples"):
        rows.append(result(*names, suited[names[2]], arguments.steps))
        if rows[-1]["result"] == "failed":
            print(*rows[-1].values(), sep=" | ", flush=True)
    with arguments.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    counts = {what: sum(row["result"] == what for row in rows) for what in ("trained", "refused", "failed")}
    print(", ".join(f"{count} {what}" for what, count in counts.items()))


if __name__ == "__main__":
    main()
