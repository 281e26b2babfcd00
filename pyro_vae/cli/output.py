"""What the command writes and shows: metrics, tables, figures, progress."""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro import poutine
from pyro.poutine.util import prune_subsample_sites

import pyro_vae
from pyro_vae import evaluation, plots, runs
from pyro_vae.catalogue import KINDS, entries
from pyro_vae.data import InMemory, OnDisk
from pyro_vae.files import replacing
from pyro_vae.programs import Program, undisturbed

if TYPE_CHECKING:
    import xarray as xr

__all__ = [
    "be_silent",
    "check_suffix",
    "default_estimators",
    "evaluate",
    "list_components",
    "record_columns",
    "say",
    "write_comparison",
    "write_figures",
]

# What there is to compare, for posteriors whose draws are differentiable, and for others.
DIFFERENTIABLE = ("Trace_ELBO()", "StickingTheLanding()", "IWAE(8)", "DReG(8)")
OTHERS = (
    "Trace_ELBO()",
    "Reinforce(8)",
    "VIMCO(8)",
    "ReweightedWakeSleep(8)",
)


def evaluate(
    run: Path, program: Program, test: InMemory | OnDisk, num_particles: int, seed: int = 0, write: bool = True
) -> None:
    """Evaluate a program on test data; write the metrics, and show them."""
    with _progress(f"evaluation, {num_particles} particles") as advance:
        summary = evaluation.summarize(program, test, num_particles, seed=seed, advance=advance)
    nll = -summary.log_likelihood
    metrics = {
        "test_nll": nll.mean().item(),
        "test_nll_se": (nll.std() / math.sqrt(len(nll))).item(),
        "test_elbo": summary.elbo.mean().item(),
        "rate": summary.rate.mean().item(),
        "distortion": summary.distortion.mean().item(),
        "active_units": evaluation.active_units(program, test),
        "num_particles": num_particles,
    }
    bins = getattr(getattr(program, "likelihood", None), "bins", None)
    if bins is not None or test.dequantize is not None:
        bits = evaluation.bits_per_dimension(-nll, test.event_shape, test.dequantize)
        metrics["test_bits_per_dimension"] = bits.mean().item()
    if write:
        runs.write_json(run / runs.METRICS, metrics)
    _table(metrics, len(test))
    if summary.rate.mean() < 0.1:
        say("the rate is near 0: the latents say nothing of the data; train longer, or anneal (--anneal 'Linear(0.5)')")


def _table(metrics: dict[str, Any], num_data: int) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{num_data:,} test data, nats per datum")
    cells = {"NLL": f"{metrics['test_nll']:.2f} ± {metrics['test_nll_se']:.2f}"}
    if "test_bits_per_dimension" in metrics:
        cells["bits/dim"] = f"{metrics['test_bits_per_dimension']:.3f}"
    for column, name in (("ELBO", "test_elbo"), ("rate", "rate"), ("distortion", "distortion")):
        cells[column] = f"{metrics[name]:.2f}"
    cells["active units"] = str(metrics["active_units"])
    for column in cells:
        table.add_column(column, justify="right")
    table.add_row(*cells.values())
    Console().print(table)


def write_figures(run: Path, program: Program, test: InMemory | OnDisk, history: Any) -> None:
    """Write the figures of a run."""
    few, many = (test.select(slice(n)).loaded() for n in (64, 5000))
    reconstructed = evaluation.reconstruct(program, few)
    figures = {
        "training": plots.training_curve(history),
        "reconstructions": plots.reconstructions(pyro_vae.data.to_float(few.x), reconstructed),
        "latent_space": plots.latent_space(evaluation.posterior_means(program, many), many.y),
    }
    if evaluation.takes_x_alone(program):
        figures["samples"] = plots.image_grid(evaluation.sample(program, 64, test.event_shape, seed=0)[0])
    for name, figure in figures.items():
        with replacing(run / runs.FIGURES / f"{name}.png") as temporary:
            figure.savefig(temporary)


def default_estimators(program: Program, batch: tuple[Any, ...]) -> tuple[str, ...]:
    """Estimators that a program can do with."""
    with undisturbed(program):
        trace = prune_subsample_sites(poutine.trace(program.guide).get_trace(*batch))
    return OTHERS if trace.nonreparam_stochastic_nodes else DIFFERENTIABLE


def write_comparison(out: Path, comparison: xr.Dataset) -> None:
    """Write a comparison of estimators, as what the name of the file says."""
    with replacing(out) as temporary:
        if out.suffix == ".nc":
            comparison.to_netcdf(temporary)
        elif out.suffix == ".csv":
            frame = comparison.drop_dims("part").to_dataframe()
            for name in ("gradient_variance", "gradient_snr"):
                for part in comparison.part.values:
                    frame[f"{name}_{part}"] = comparison[name].sel(part=part).values
            frame.to_csv(temporary)
        else:
            plots.estimators(comparison).savefig(temporary)


def check_suffix(out: Path, suffixes: tuple[str, ...]) -> None:
    """Make sure that a file's name says what it is to hold."""
    if out.suffix not in suffixes:
        raise ValueError(f"--out: expected a name that ends in {', '.join(suffixes)}; got {out}")


@contextmanager
def _progress(title: str) -> Iterator[Callable[[float], None]]:
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=1.0)
        yield lambda share: bar.advance(task, share)


def record_columns(run: Path, data: InMemory | OnDisk) -> None:
    """Add to a run's configuration what its columns were, so that `sample` can write tables."""
    if data.columns is not None:
        config = runs.read_config(run)
        categories = {name: list(values) for name, values in data.categories.items()}
        config["recorded"] |= {"columns": list(data.columns), "categories": categories}
        runs.write_config(run, config)


def list_components() -> None:
    """Print every component with its arguments, support and a line of description."""
    for slot, kind in KINDS.items():
        print(f"{kind}:")
        for entry in entries(slot):
            print(f"  {entry.name}({entry.arguments})")
            print(f"      {entry.summary}{f' Over {entry.support}.' if entry.support else ''}")
        print()


def be_silent() -> None:
    """Say nothing more but errors: this process is not the first of several, which says the same."""
    sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 (until the process ends)
    warnings.simplefilter("ignore")


def say(text: str) -> None:
    """Say a line to the user."""
    print(f"pyro-vae: {text}", flush=True)
