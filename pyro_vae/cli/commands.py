"""The commands of `pyro-vae`."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

import pyro_vae
from pyro_vae import diagnostics, evaluation, expressions, plots, runs
from pyro_vae.cli import diagnosis as page
from pyro_vae.cli import output
from pyro_vae.cli.arguments import NUM_PARTICLES, Debug, Device, NumParticles, Run, Trust, option
from pyro_vae.cli.configuration import DATA
from pyro_vae.cli.fitting import fit
from pyro_vae.data import InMemory, OnDisk
from pyro_vae.files import replacing
from pyro_vae.training.options import fabric

app = typer.Typer(
    help=pyro_vae.__doc__,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"pyro-vae {pyro_vae.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None: ...


app.command()(fit)


@app.command()
def evaluate(
    run: Run,
    num_particles: NumParticles = NUM_PARTICLES,
    data: Annotated[str | None, option("Other data than the run's, whose figures are then only printed.")] = None,
    data_root: Annotated[str | None, option("Folder of torchvision's data sets.")] = None,
    seed: Annotated[int, option("Seed of the particles.")] = 0,
    device: Device = "auto",
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """Evaluate a run on its test data."""
    if num_particles < 1:
        raise ValueError(f"--num-particles: expected a positive number, got {num_particles}")
    program, test = _load(run, data, data_root, device, trust)
    output.evaluate(run, program, test, num_particles, seed, write=data is None)


@app.command()
def sample(
    run: Run,
    n: Annotated[int, option("Number of samples.", "--n")] = 64,
    out: Annotated[
        Path, option("A picture (.png, .pdf, .svg) of means, or an array (.npy) or table (.csv) of draws.")
    ] = Path("samples.png"),
    seed: Annotated[int, option("Seed of the samples.")] = 0,
    device: Device = "auto",
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """Draw data from a run's model."""
    output.check_suffix(out, (".png", ".pdf", ".svg", ".npy", ".csv"))
    program = pyro_vae.load(run, trust=trust).to(fabric(device).device)
    recorded = runs.read_config(run).get("recorded", {})
    if out.suffix == ".csv" and not recorded.get("columns"):
        raise ValueError(f"--out: expected a run whose data were a table to write {out}, got one without columns")
    means, draws = evaluation.sample(program, n, tuple(recorded.get("event_shape", ())), seed=seed)
    with replacing(out) as temporary:
        if out.suffix == ".npy":
            import numpy as np

            np.save(temporary, draws.numpy())
        elif out.suffix == ".csv":
            pyro_vae.data.decode(draws, recorded["columns"], recorded["categories"]).to_csv(temporary, index=False)
        else:
            plots.image_grid(means, columns=math.ceil(math.sqrt(n))).savefig(temporary)
    output.say(f"{n} samples: {out}")


@app.command("compare-estimators")
def compare_estimators(
    run: Run,
    estimators: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="estimator",
            help=f"Such as 'IWAE(num_particles=8)'. By default {', '.join(output.DIFFERENTIABLE)}; where draws of the "
            f"posterior are not differentiable, {', '.join(output.OTHERS)}.",
            show_default=False,
        ),
    ] = None,
    batch_size: Annotated[int, option("Test data, the first ones, that are the batch.")] = 100,
    repeats: Annotated[int, option("Losses and gradients of each estimator.")] = 64,
    reference_particles: Annotated[int, option("Particles a datum of the reference log-evidence.")] = 5000,
    data: Annotated[str | None, option("Other data than the run's.")] = None,
    data_root: Annotated[str | None, option("Folder of torchvision's data sets.")] = None,
    seed: Annotated[int, option("Seed of all draws.")] = 0,
    device: Device = "auto",
    out: Annotated[
        Path | None,
        option("A figure (.png, .pdf, .svg), table (.csv) or data set (.nc). [default: RUN/figures/estimators.png]"),
    ] = None,
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """Compare estimators on a run's test data: bound, gap, gradient noise, time and memory."""
    out = out or run / runs.FIGURES / "estimators.png"
    output.check_suffix(out, (".png", ".pdf", ".svg", ".csv", ".nc"))
    program, test = _load(run, data, data_root, device, trust)
    batches = pyro_vae.data.Batches(test, program, min(batch_size, len(test)))
    pyro_vae.data.check(program, batches)
    batch = next(batches.epoch(0))
    texts = estimators or output.default_estimators(program, batch)
    if len(set(texts)) < len(texts):
        raise ValueError(f"expected different estimators, got {max(texts, key=texts.count)} more than once")
    chosen = {text: expressions.parse(text, "estimator") for text in texts}
    found = pyro_vae.estimators.compare(
        program, batch, chosen, repeats=repeats, reference_particles=reference_particles, seed=seed
    )
    output.write_comparison(out, found)
    output.say(f"comparison: {out}")


@app.command()
def export(
    run: Run,
    out: Annotated[
        Path | None, option("A NetCDF file (.nc) or Zarr store (.zarr). [default: RUN/posterior.nc]")
    ] = None,
    num_samples: Annotated[int, option("Draws for each datum.")] = 500,
    num_data: Annotated[int | None, option("Test data, the first ones. [default: all]")] = None,
    chunk: Annotated[int | None, option("Data at a time. [default: what keeps memory low]")] = None,
    reweight: Annotated[
        str | None, option("psis, to resample draws by their Pareto-smoothed importance weights.")
    ] = None,
    data: Annotated[str | None, option("Other data than the run's.")] = None,
    data_root: Annotated[str | None, option("Folder of torchvision's data sets.")] = None,
    seed: Annotated[int, option("Seed of all draws.")] = 0,
    device: Device = "auto",
    overwrite: Annotated[bool, option("Replace what --out names.", "--overwrite")] = False,
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """Write draws of latents and data, given a run's test data, in the schema of ArviZ."""
    if data and out is None:
        raise ValueError("--out: expected a name for draws given other data than the run's, got none")
    out = out or run / runs.POSTERIOR
    output.check_suffix(out, (".nc", ".zarr"))
    if out.exists() and not overwrite:
        raise ValueError(f"{out} exists: replace it (--overwrite) or name another (--out)")
    program, test = _load(run, data, data_root, device, trust)
    some = _first(test, num_data)
    config = runs.read_config(run)
    path = pyro_vae.export.write_arviz(
        program,
        some,
        out,
        num_samples=num_samples,
        chunk=chunk,
        reweight=reweight,
        seed=seed,
        config={"run": config, "given": {"data": data or f"test data of {config['data']}", "num_data": len(some)}},
    )
    output.say(f"draws: {path}; read them with xarray.open_datatree({str(path)!r})")


@app.command()
def diagnose(
    run: Run,
    only: Annotated[
        list[str] | None, option(f"A check to run, of {', '.join(diagnostics.CHECKS)}; may be given several times.")
    ] = None,
    num_data: Annotated[int, option("Test data, the first ones; checks that are dear take fewer.")] = 1000,
    strict: Annotated[bool, option("Exit with 1 if a check does not hold.", "--strict")] = False,
    data: Annotated[str | None, option("Other data than the run's, whose page is then only printed.")] = None,
    data_root: Annotated[str | None, option("Folder of torchvision's data sets.")] = None,
    seed: Annotated[int, option("Seed of all draws.")] = 0,
    device: Device = "auto",
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """Ask whether the inference of a run worked: what holds, what does not, what to try."""
    program, test = _load(run, data, data_root, device, trust)
    some = _first(test, num_data)
    results: dict[str, Any] = {}
    interrupted = False
    try:
        for name, result in diagnostics.run_checks(program, some, only=only or None, seed=seed):
            results[name] = result
            said = f"{name} {str(result.verdict).partition(':')[0]}"  # at once, as the next check may take minutes
            print(f"pyro-vae: {len(results)} of {len(only or diagnostics.CHECKS)}: {said}", file=sys.stderr)
    except KeyboardInterrupt:  # what is done is shown
        interrupted = True
    diagnosis = diagnostics.Diagnosis(results)
    page.print_page(diagnosis, len(some))
    if data is None:
        page.write(run, diagnosis, len(some), seed)
        output.say(f"figures and numbers: {run / runs.FIGURES}, {run / runs.DIAGNOSTICS}")
    if interrupted:
        print("pyro-vae: interrupted; the checks that are missing did not run", file=sys.stderr)
        raise typer.Exit(130)
    if strict and diagnosis.failed:
        raise typer.Exit(1)


@app.command()
def components(debug: Debug = False) -> None:
    """List the priors, likelihoods, posteriors and networks, with their arguments."""
    output.list_components()


def _load(
    run: Path, data: str | None, root: str | None, device: str, trust: bool
) -> tuple[nn.Module, InMemory | OnDisk]:
    program = pyro_vae.load(run, trust=trust)
    config = runs.read_config(run)
    asked: Any = {name.removeprefix("data_"): config.get(name) for name in DATA}
    asked["seed"] = asked["seed"] or 0
    asked |= {"data": data, "in_memory": None} if data else {}  # which is said of the run's own
    asked |= {"root": root} if root else {}
    if asked["data"] is None:
        raise ValueError(f"{run} was fitted to data that its configuration does not name; name some with --data")
    test = pyro_vae.data.load(**asked).test
    known = (config.get("recorded") or {}).get("categories") or {}
    if other := [name for name, values in test.categories.items() if list(values) != known.get(name, list(values))]:
        name = other[0]
        raise ValueError(
            f"{asked['data']}: expected the categories {known[name]} in {name}, got {list(test.categories[name])}"
        )
    return program.to(fabric(device).device), test


def _first(test: InMemory | OnDisk, num_data: int | None) -> InMemory | OnDisk:
    if num_data is not None and num_data < 1:
        raise ValueError(f"--num-data: expected a positive number, got {num_data}")
    return test if num_data is None else test.select(slice(num_data)).loaded()
