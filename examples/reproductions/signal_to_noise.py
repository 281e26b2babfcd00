r"""Signal to noise of gradients against the number K of particles, on the Gaussian problem of Rainforth et al.

.. math:: z \sim N(\mu, I), \quad x \mid z \sim N(z, I), \quad q(z \mid x) = N(A x + b, \tfrac23 I)

in 20 dimensions and with 1,024 data, at parameters that normal noise of scale 0.01 has moved off their optimum. A
gradient is that of the mean over all data. Of each parameter the signal is the mean over repeated gradients, and the
noise their standard deviation; figures are root mean squares over the parameters of a kind. A straight line through the
logarithms has the slope in K: Rainforth et al. prove 1/2 for the model and -1/2 for the guide under IWAE.

Reference: Rainforth et al., 2018. Tighter variational bounds are not necessarily better. Tucker et al., 2019. Doubly
reparameterized gradient estimators for Monte Carlo objectives.

python examples/reproductions/signal_to_noise.py --out runs/signal-to-noise
"""

import argparse
import json
import math
import time
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from torch import nn

from pyro_vae.estimators import IWAE, MIWAE, PIWAE, DReG, StickingTheLanding
from pyro_vae.programs import declare_parameters

ESTIMATORS = {  # name: the estimator of K particles
    "IWAE(K)": IWAE,
    "DReG(K)": DReG,
    "StickingTheLanding(IWAE(K))": lambda particles: StickingTheLanding(bound=IWAE(particles)),
    "PIWAE(√K, √K)": lambda particles: PIWAE(math.isqrt(particles), math.isqrt(particles)),
    "MIWAE(K, 1), the ELBO": lambda particles: MIWAE(particles, 1),
}
KINDS = {"mu": "model, μ", "b": "guide, b", "A": "guide, A"}
# The K that slopes are fitted to. At few particles the model's gradient is that of a guide that is off its optimum, and
# at many the guide's under IWAE is lost in noise.
FITTED = {"mu": (64, math.inf), "b": (4, 256), "A": (4, 256)}
AT_ONCE = 2**18  # values of z in a pass, which caches still hold
GROUPS, STUDENT = 20, 2.093  # of gradients in the jackknife, and the 97.5 % quantile for 19 degrees of freedom


class Gaussian(nn.Module):
    """Copies of the problem side by side, so that one backward pass gives as many independent gradients."""

    def __init__(self, mu, matrix, b, copies):
        super().__init__()
        self.mu, self.A, self.b = (
            nn.Parameter(value.expand(copies, *value.shape).clone()) for value in (mu, matrix, b)
        )

    def model(self, x):
        """The joint density p(z) p(x given z), of a batch for each copy."""
        declare_parameters(self)
        mu = self.mu.repeat_interleave(len(x) // len(self.mu), 0)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(mu, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(self, x):
        """The guide q(z given x)."""
        declare_parameters(self)
        mean = x.unflatten(0, (len(self.A), -1)) @ self.A.mT + self.b[:, None]
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(mean.flatten(0, 1), math.sqrt(2 / 3)).to_event(1))


def problem(dimensions, num_data, noise):
    """Data, and parameters near those that are best for them: the mean of x, I / 2, and half of the mean."""
    x = torch.randn(dimensions) + math.sqrt(2) * torch.randn(num_data, dimensions)
    best = (x.mean(0), torch.eye(dimensions) / 2, x.mean(0) / 2)
    return x, [value + noise * torch.randn_like(value) for value in best]


def gradients(estimator, x, parameters, repeats):
    """Independent gradients of the mean over the data, a matrix of `repeats` rows for each kind of parameter."""
    rows = max(1, AT_ONCE // (x.shape[1] * estimator.num_particles))  # data in a pass, those of all copies together
    copies = min(repeats, max(1, rows // len(x)))
    found = {name: [] for name in KINDS}
    with pyro.validation_enabled(False):
        for first in range(0, repeats, copies):
            program = Gaussian(*parameters, min(copies, repeats - first))
            for part in x.split(rows):
                batch = part.repeat(len(program.mu), 1)
                (estimator.differentiable_loss(program.model, program.guide, batch) / len(x)).backward()
            for name in KINDS:
                found[name].append(getattr(program, name).grad.flatten(1).double())
    return {name: torch.cat(grads) for name, grads in found.items()}


def power(grads):
    """The square of signal to noise, mean over parameters: unbiased, for gradients that are close to normal."""
    number = len(grads)
    ratio = (grads.mean(0).square() / grads.var(0)).mean()
    return (number - 3) / (number - 1) * ratio - 1 / number


def powers(grads):
    """The power of all gradients, and those without one group each, which the jackknife needs."""
    parts = grads.tensor_split(GROUPS)
    left_out = [power(torch.cat([*parts[:i], *parts[i + 1 :]])) for i in range(GROUPS)]
    return torch.stack([power(grads), *left_out])


def slope(particles, powers, kind):
    """The slope of signal to noise with its 95 % interval: weighted least squares on logarithms, jackknifed."""
    least, most = FITTED[kind]
    used = [i for i, number in enumerate(particles) if least <= number <= most]
    if len(used) < 2 or any((powers[i] <= 0).any() for i in used):  # the signal is lost in the noise
        return {"slope": None, "error": None}
    x = torch.tensor([particles[i] for i in used]).double().log()
    y = torch.stack([powers[i] for i in used], -1).log() / 2
    weights = 1 / y[1:].var(0)
    centred = weights * (x - (weights * x).sum() / weights.sum())
    whole, *parts = (y * centred).sum(-1) / (x * centred).sum()
    error = math.sqrt((GROUPS - 1) * torch.stack(parts).var(correction=0))
    return {"slope": whole.item(), "error": STUDENT * error}


def draw(particles, measured, path):
    """Signal to noise against particles: a panel for each kind of parameter, a curve for each estimator."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    for axes, (kind, title) in zip(figure.subplots(1, 3), KINDS.items(), strict=True):
        rows = [row for row in measured if row["parameters"] == kind]
        for row in rows:
            ratios = [ratio or math.nan for ratio in row["signal_to_noise"]]  # none where it is lost in the noise
            axes.loglog(particles, ratios, marker="o", markersize=3, label=row["estimator"])
        start = rows[0]["signal_to_noise"][0]
        for exponent, style in ((0.5, "--"), (-0.5, ":")):
            line = [start * (number / particles[0]) ** exponent for number in particles]
            axes.loglog(particles, line, color="grey", linestyle=style, linewidth=1, label=f"slope {exponent:+g}")
        axes.set(title=title, xlabel="particles K")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("signal to noise")
    figure.axes[0].legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=100)


def measure(arguments):
    """Signal to noise and its slopes for each estimator and kind of parameter."""
    x, parameters = problem(arguments.dimensions, arguments.data, arguments.noise)
    measured = []
    for name, estimator in ESTIMATORS.items():
        started = time.perf_counter()
        found = {kind: [] for kind in KINDS}
        for particles in arguments.particles:
            repeats = max(GROUPS, min(arguments.repeats, arguments.budget // particles))
            for kind, grads in gradients(estimator(particles), x, parameters, repeats).items():
                found[kind].append(powers(grads))
        seconds = time.perf_counter() - started
        for kind, values in found.items():
            ratios = [max(value[0].item(), 0.0) ** 0.5 for value in values]
            row = {"estimator": name, "parameters": kind, "signal_to_noise": ratios, "seconds": seconds}
            measured.append(row | slope(arguments.particles, values, kind))
    return measured


def show(particles, measured):
    """The table of slopes, in Markdown."""
    print(f"| estimator | parameters | signal to noise, K = {particles[0]} | K = {particles[-1]} | slope |")
    print("|---|---|---|---|---|")
    for row in measured:
        first, *_, last = row["signal_to_noise"]
        interval = "none" if row["slope"] is None else f"{row['slope']:+.2f} ± {row['error']:.2f}"
        print(f"| {row['estimator']} | {KINDS[row['parameters']]} | {first:.3f} | {last:.3f} | {interval} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0].removeprefix("r"))
    parser.add_argument("--out", type=Path, default=Path("runs/signal-to-noise"))
    parser.add_argument("--particles", type=int, nargs="+", default=[1, 4, 16, 64, 256, 1024], help="squares")
    parser.add_argument("--repeats", type=int, default=512, help="most gradients for each number of particles")
    parser.add_argument("--budget", type=int, default=2**14, help="most particles a datum, all gradients together")
    parser.add_argument("--dimensions", type=int, default=20)
    parser.add_argument("--data", type=int, default=1024)
    parser.add_argument("--noise", type=float, default=0.01, help="scale of what moves parameters off their optimum")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    measured = measure(arguments)
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = {"arguments": vars(arguments) | {"out": str(arguments.out)}, "measured": measured}
    (arguments.out / "signal_to_noise.json").write_text(json.dumps(results, indent=2))
    draw(arguments.particles, measured, arguments.out / "signal_to_noise.png")
    show(arguments.particles, measured)


if __name__ == "__main__":
    main()
