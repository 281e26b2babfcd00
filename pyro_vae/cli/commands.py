"""The commands of `pyro-vae`."""

from __future__ import annotations

import itertools
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
from pyro_vae.cli.configuration import DATA
from pyro_vae.data import InMemory, OnDisk, Splits
from pyro_vae.files import replacing
from pyro_vae.likelihoods import Bernoulli
from pyro_vae.networks import Standardized
from pyro_vae.programs import Program
from pyro_vae.training import processes
from pyro_vae.training.options import fabric

app = typer.Typer(
    help=pyro_vae.__doc__,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _option(text: str, *names: str) -> Any:
    return typer.Option(*names, help=text)


Run = Annotated[Path, typer.Argument(help="Run directory.")]
Device = Annotated[str, _option("auto, cpu, cuda, cuda:1 or mps.")]
Trust = Annotated[bool, _option("Import classes outside pyro_vae that a file names; that runs their code.", "--trust")]
Debug = Annotated[bool, _option("Show the traceback of an error.", "--debug")]
NumParticles = Annotated[int, _option("Particles a datum of the log-likelihood.")]


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


@app.command()
def fit(
    data: Annotated[
        str, _option("digits, mnist, fashion_mnist, or a .npy, .npz, .csv, .parquet or .zarr file.")
    ] = "digits",
    data_root: Annotated[str | None, _option("Folder of torchvision's data sets.")] = None,
    binarize: Annotated[
        str | None, _option("dynamic, static, threshold or none. By default dynamic, for grey data under Bernoulli.")
    ] = None,
    dequantize: Annotated[
        int | None, _option("Number of grey levels, such as 256, that are made continuous by uniform noise.")
    ] = None,
    labels: Annotated[str | None, _option("Column or array that holds labels.")] = None,
    valid: Annotated[float | None, _option("Data held out for validation: a fraction or a count.")] = None,
    test: Annotated[float | None, _option("Data held out for testing: a fraction or a count.")] = None,
    data_seed: Annotated[int, _option("Seed of splits, binarization and noise.")] = 0,
    in_memory: Annotated[
        bool | None,
        _option("Read a .npy or .zarr file into memory. [default: where it takes a quarter of the memory at most]"),
    ] = None,
    latent: Annotated[int | None, _option("Latent dimensions. [default: 20]", "--latent")] = None,
    network: Annotated[str | None, _option("Network of encoder and decoder. [default: MLP()]")] = None,
    prior: Annotated[str | None, _option("Prior. [default: StandardNormal()]")] = None,
    likelihood: Annotated[str | None, _option("Likelihood. [default: Bernoulli()]")] = None,
    posterior: Annotated[str | None, _option("Posterior. [default: DiagonalNormal()]")] = None,
    program: Annotated[str | None, _option("The whole program, in place of the five above.")] = None,
    estimator: Annotated[str, _option("Estimator, of pyro_vae.estimators or pyro.infer.")] = "Trace_ELBO()",
    anneal: Annotated[str | None, _option("Schedule of beta, such as Linear(0.1).")] = None,
    epochs: Annotated[int, _option("Passes over the data.")] = 100,
    batch_size: Annotated[int, _option("Data in a step.")] = 128,
    lr: Annotated[float, _option("Learning rate; the highest one of a schedule.")] = 1e-3,
    optimizer: Annotated[str, _option("Optimizer of torch.optim.")] = "Adam()",
    lr_schedule: Annotated[str | None, _option("cosine or one-cycle.")] = None,
    device: Device = "auto",
    precision: Annotated[str, _option("32-true, bf16-mixed, 64-true, ...")] = "32-true",
    devices: Annotated[int, _option("Processes on each machine, each with a device.")] = 1,
    num_nodes: Annotated[int, _option("Machines.")] = 1,
    strategy: Annotated[str, _option("auto or ddp.")] = "auto",
    seed: Annotated[int, _option("Seed of weights, order and noise.")] = 0,
    start_at_mean: Annotated[
        bool | None,
        _option("Set the output bias from the data's mean first. [default: where the likelihood can]"),
    ] = None,
    num_workers: Annotated[int, _option("Threads that read a file that stays on disk (one at least).")] = 0,
    compile: Annotated[bool | None, _option("Compile the training step, or do not. [default: where it pays]")] = None,
    out: Annotated[
        Path | None, _option("Run directory. [default: the first free of runs/DATA, runs/DATA-2, ...]")
    ] = None,
    resume: Annotated[bool, _option("Go on with the run in --out.", "--resume")] = False,
    overwrite: Annotated[bool, _option("Replace the run in --out.", "--overwrite")] = False,
    num_particles: NumParticles = 5000,
    config: Annotated[
        Path | None, _option("A run's config.yaml to repeat; options beside it win, but for the parts of its program.")
    ] = None,
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """Fit a variational autoencoder, evaluate it on the test data, and write a run directory."""
    from lightning_fabric import seed_everything

    if resume and out is None:
        raise ValueError("--resume: expected the run directory with --out, got none")
    default = Path("runs") / Path(data).stem
    run = out or (default if overwrite else _free(default))
    runs.check_free(run, resume, overwrite)
    if num_particles < 1:
        raise ValueError(f"--num-particles: expected a positive number, got {num_particles}")
    first = processes.rank(fabric(device, precision, devices, num_nodes, strategy)) == 0
    if not first:
        output.be_silent()
    trust = trust or not (config or resume)  # what the user typed is trusted, what a file says is not
    parts: Any = {
        "latent": latent,
        "network": network,
        "prior": prior,
        "likelihood": likelihood,
        "posterior": posterior,
    }
    chosen = {name: value for name, value in parts.items() if value is not None}
    if program and chosen:
        raise ValueError(
            f"expected --program (which a configuration names) or its parts, got --{next(iter(chosen))} too"
        )
    held: Any = {"labels": labels, "valid": valid, "test": test}
    asked: Any = {"root": data_root, "dequantize": dequantize, "seed": data_seed, "in_memory": in_memory, **held}
    splits = pyro_vae.data.load(data, binarize=binarize or "none", **asked)

    # Written out and read back, so that the file of this run builds the very same weights again.
    program = program or expressions.write(_build(splits.train, chosen, trust), "program")
    seed_everything(seed, verbose=False)
    built = expressions.parse(program, "program", trust=trust)
    likelihood_of = getattr(built, "likelihood", None)
    bernoulli = isinstance(getattr(likelihood_of, "pixel_likelihood", likelihood_of), Bernoulli)
    if binarize is None and dequantize is None and bernoulli and splits.train.grey:
        output.say("grey values are binarized dynamically for the Bernoulli likelihood (--binarize none keeps them)")
        splits = pyro_vae.data.load(data, binarize="dynamic", **asked)
    output.say(f"{data}: {_sizes(splits)}")

    fitted = _fit(
        built,
        splits.train,
        valid=splits.valid,
        estimator=expressions.parse(estimator, "estimator", trust=trust),
        anneal=None if anneal is None else expressions.parse(anneal, "anneal", trust=trust),
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        optimizer=expressions.parse(optimizer, "optimizer", trust=trust),
        lr_schedule=lr_schedule,
        device=device,
        precision=precision,
        devices=devices,
        num_nodes=num_nodes,
        strategy=strategy,
        seed=seed,
        start_at_mean=_can_start_at_mean(built) if start_at_mean is None else start_at_mean,
        num_workers=num_workers,
        compile="auto" if compile is None else compile,
        out=run,
        resume=resume,
        overwrite=overwrite,
    )
    if not first:
        return
    output.record_columns(run, splits.train)
    output.evaluate(run, built, splits.test, num_particles)
    output.write_figures(run, built, splits.test, fitted.history)
    output.say(f"run directory: {run}")


def _build(train: InMemory | OnDisk, chosen: dict[str, Any], trust: bool) -> nn.Module:
    """The program of the chosen parts. A table's columns differ in scale, and are standardized for the encoder."""
    standardize = None
    if train.columns is not None:
        standardized = Standardized.of(nn.Identity(), pyro_vae.data.to_float(train.x))
        standardize = standardized.loc, standardized.scale
        chosen = {"network": "Standardized(net=MLP()), MLP()"} | chosen
    return expressions.build(train.event_shape, **chosen, size=len(train), standardize=standardize, trust=trust)


def _fit(program: Program, train: InMemory | OnDisk, *, out: Path, **options: Any) -> pyro_vae.training.Fitted:
    try:
        return pyro_vae.fit(program, train, out=out, **options)
    except KeyboardInterrupt as interruption:
        if processes.told_elsewhere(interruption):
            raise typer.Exit(130) from None
        print(f"\npyro-vae: interrupted; go on with: pyro-vae fit --resume --out {out}", file=sys.stderr)
        raise typer.Exit(130) from None


@app.command()
def evaluate(
    run: Run,
    num_particles: NumParticles = 5000,
    data: Annotated[str | None, _option("Other data than the run's, whose figures are then only printed.")] = None,
    data_root: Annotated[str | None, _option("Folder of torchvision's data sets.")] = None,
    seed: Annotated[int, _option("Seed of the particles.")] = 0,
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
    n: Annotated[int, _option("Number of samples.", "--n")] = 64,
    out: Annotated[
        Path, _option("A picture (.png, .pdf, .svg) of means, or an array (.npy) or table (.csv) of draws.")
    ] = Path("samples.png"),
    seed: Annotated[int, _option("Seed of the samples.")] = 0,
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
    batch_size: Annotated[int, _option("Test data, the first ones, that are the batch.")] = 100,
    repeats: Annotated[int, _option("Losses and gradients of each estimator.")] = 64,
    reference_particles: Annotated[int, _option("Particles a datum of the reference log-evidence.")] = 5000,
    data: Annotated[str | None, _option("Other data than the run's.")] = None,
    data_root: Annotated[str | None, _option("Folder of torchvision's data sets.")] = None,
    seed: Annotated[int, _option("Seed of all draws.")] = 0,
    device: Device = "auto",
    out: Annotated[
        Path | None,
        _option("A figure (.png, .pdf, .svg), table (.csv) or data set (.nc). [default: RUN/figures/estimators.png]"),
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
        Path | None, _option("A NetCDF file (.nc) or Zarr store (.zarr). [default: RUN/posterior.nc]")
    ] = None,
    num_samples: Annotated[int, _option("Draws for each datum.")] = 500,
    num_data: Annotated[int | None, _option("Test data, the first ones. [default: all]")] = None,
    chunk: Annotated[int | None, _option("Data at a time. [default: what keeps memory low]")] = None,
    reweight: Annotated[
        str | None, _option("psis, to resample draws by their Pareto-smoothed importance weights.")
    ] = None,
    data: Annotated[str | None, _option("Other data than the run's.")] = None,
    data_root: Annotated[str | None, _option("Folder of torchvision's data sets.")] = None,
    seed: Annotated[int, _option("Seed of all draws.")] = 0,
    device: Device = "auto",
    overwrite: Annotated[bool, _option("Replace what --out names.", "--overwrite")] = False,
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
        list[str] | None, _option(f"A check to run, of {', '.join(diagnostics.CHECKS)}; may be given several times.")
    ] = None,
    num_data: Annotated[int, _option("Test data, the first ones; checks that are dear take fewer.")] = 1000,
    strict: Annotated[bool, _option("Exit with 1 if a check does not hold.", "--strict")] = False,
    data: Annotated[str | None, _option("Other data than the run's, whose page is then only printed.")] = None,
    data_root: Annotated[str | None, _option("Folder of torchvision's data sets.")] = None,
    seed: Annotated[int, _option("Seed of all draws.")] = 0,
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
    asked |= {"data": data} if data else {}
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


def _can_start_at_mean(program: Program) -> bool:
    likelihood = getattr(program, "likelihood", None)
    return hasattr(likelihood, "start_at") and hasattr(getattr(likelihood, "net", None), "output_bias")


def _free(path: Path) -> Path:
    names = itertools.chain([path], (path.with_name(f"{path.name}-{i}") for i in itertools.count(2)))
    return next(name for name in names if not name.exists())


def _sizes(splits: Splits) -> str:
    parts = {"train": splits.train, "valid": splits.valid, "test": splits.test}
    return ", ".join(f"{len(part):,} {name}" for name, part in parts.items() if part is not None)
