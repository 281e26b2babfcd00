"""The command `pyro-vae`: fit a program to a data set, evaluate it, draw from it."""

from __future__ import annotations

import itertools
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

import pyro_vae
from pyro_vae import evaluation, expressions, plots, runs
from pyro_vae.data import InMemory, Splits
from pyro_vae.likelihoods import Bernoulli
from pyro_vae.programs import Program

app = typer.Typer(
    help=pyro_vae.__doc__,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

_COMPONENTS = ("latent", "network", "prior", "likelihood", "posterior")
_DATA = ("data", "data_root", "binarize", "dequantize", "labels", "valid", "test", "data_seed")
_FIT = ("program", "estimator", "anneal", "epochs", "batch_size", "lr", "optimizer", "lr_schedule", "device")
_CONFIGURED = (*_DATA, *_FIT, "precision", "seed", "start_at_mean", "recorded")


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
    data: Annotated[str, _option("digits, mnist, fashion_mnist, or a .npy, .npz, .csv or .parquet file.")] = "digits",
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
    seed: Annotated[int, _option("Seed of weights, order and noise.")] = 0,
    start_at_mean: Annotated[
        bool | None,
        _option("Set the output bias from the data's mean first. [default: where the likelihood can]"),
    ] = None,
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
    from lightning.fabric import seed_everything

    if resume and out is None:
        raise ValueError("--resume: expected the run directory with --out, got none")
    default = Path("runs") / Path(data).stem
    run = out or (default if overwrite else _free(default))
    runs.check_free(run, resume, overwrite)
    if num_particles < 1:
        raise ValueError(f"--num-particles: expected a positive number, got {num_particles}")
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
    asked: Any = {"root": data_root, "dequantize": dequantize, "seed": data_seed, **held}
    splits = pyro_vae.data.load(data, binarize=binarize or "none", **asked)

    # Written out and read back, so that the file of this run builds the very same weights again.
    program = program or expressions.write(
        expressions.build(splits.train.event_shape, **chosen, trust=trust), "program"
    )
    seed_everything(seed, verbose=False)
    built = expressions.parse(program, "program", trust=trust)
    bernoulli = isinstance(getattr(built, "likelihood", None), Bernoulli)
    if binarize is None and dequantize is None and bernoulli and splits.train.grey:
        _say("grey values are binarized dynamically for the Bernoulli likelihood (--binarize none keeps them)")
        splits = pyro_vae.data.load(data, binarize="dynamic", **asked)
    _say(f"{data}: {_sizes(splits)}")

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
        seed=seed,
        start_at_mean=hasattr(getattr(built, "likelihood", None), "start_at")
        if start_at_mean is None
        else start_at_mean,
        out=run,
        resume=resume,
        overwrite=overwrite,
    )
    _record_columns(run, splits.train)
    _evaluate(run, built, splits.test, num_particles)
    _figures(run, built, splits.test, fitted.history)
    _say(f"run directory: {run}")


def _fit(program: Program, train: InMemory, *, out: Path, **options: Any) -> pyro_vae.training.Fitted:
    try:
        return pyro_vae.fit(program, train, out=out, **options)
    except KeyboardInterrupt:
        print(f"\npyro-vae: interrupted; go on with: pyro-vae fit --resume --out {out}", file=sys.stderr)
        raise typer.Exit(130) from None


def _record_columns(run: Path, data: InMemory) -> None:
    """Add to a run's configuration what its columns were, so that `sample` can write tables."""
    if data.columns is not None:
        config = runs.read_config(run)
        categories = {name: list(values) for name, values in data.categories.items()}
        config["recorded"] |= {"columns": list(data.columns), "categories": categories}
        runs.write_config(run, config)


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
    _evaluate(run, program, test, num_particles, seed, write=data is None)


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
    suffixes = (".png", ".pdf", ".svg", ".npy", ".csv")
    if out.suffix not in suffixes:
        raise ValueError(f"--out: expected a name that ends in {', '.join(suffixes)}; got {out}")
    program = _on(device, pyro_vae.load(run, trust=trust))
    recorded = runs.read_config(run).get("recorded", {})
    if out.suffix == ".csv" and not recorded.get("columns"):
        raise ValueError(f"--out: expected a run whose data were a table to write {out}, got one without columns")
    means, draws = evaluation.sample(program, n, tuple(recorded.get("event_shape", ())), seed=seed)
    with runs.replacing(out) as temporary:
        if out.suffix == ".npy":
            import numpy as np

            np.save(temporary, draws.numpy())
        elif out.suffix == ".csv":
            pyro_vae.data.decode(draws, recorded["columns"], recorded["categories"]).to_csv(temporary, index=False)
        else:
            plots.image_grid(means, columns=math.ceil(math.sqrt(n))).savefig(temporary)
    _say(f"{n} samples: {out}")


def main(arguments: list[str] | None = None) -> None:
    """Run the command; errors that the user can mend are one line on stderr and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    sys.path.append(str(Path.cwd()))  # where the user's own components are
    arguments = arguments or ["--help"]
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            sys.exit(app(_expanded(arguments), prog_name="pyro-vae", standalone_mode=False))
        except Exception as error:
            if "--debug" in arguments:
                raise
            usage = getattr(error, "format_message", None)  # what typer raises for wrong usage
            lines = (usage() if usage else str(error)).splitlines() or [""]
            expected = usage or isinstance(error, ValueError | OSError | FloatingPointError)
            kind = "" if expected else f"{type(error).__name__} (--debug shows where): "
            print(f"pyro-vae: error: {kind}{' '.join(lines[0].split())}", file=sys.stderr)
            sys.exit(2)


def _expanded(arguments: list[str]) -> list[str]:
    """The arguments of `fit` with those of a configuration file put in front, where later ones win over them."""
    if arguments[:1] != ["fit"]:
        return arguments
    file = _value_of("--config", arguments)
    if file is None and "--resume" in arguments:
        file = _value_of("--out", arguments)
    if file is None:
        return arguments
    config = runs.read_config(file)
    if unknown := sorted(set(map(str, config)) - set(_CONFIGURED)):
        raise ValueError(f"{file}: unknown keys {', '.join(unknown)}; expected {', '.join(_CONFIGURED)}")
    if config.get("data") is None and _value_of("--data", arguments) is None:
        raise ValueError(f"{file} does not name the run's data; name them with --data")
    config.pop("recorded", None)
    given = [_flag(name.replace("_", "-"), value) for name, value in config.items() if value is not None]
    return ["fit", *given, *arguments[1:]]


def _flag(name: str, value: Any) -> str:
    return f"--{'' if value else 'no-'}{name}" if isinstance(value, bool) else f"--{name}={value}"


def _value_of(option: str, arguments: list[str]) -> str | None:
    for argument, following in itertools.zip_longest(arguments, arguments[1:]):
        if argument == option:
            return following
        if argument.startswith(f"{option}="):
            return argument.partition("=")[2]
    return None


def _load(run: Path, data: str | None, root: str | None, device: str, trust: bool) -> tuple[nn.Module, InMemory]:
    program = pyro_vae.load(run, trust=trust)
    config = runs.read_config(run)
    asked: Any = {name.removeprefix("data_"): config.get(name) for name in _DATA}
    asked["seed"] = asked["seed"] or 0
    asked |= {"data": data} if data else {}
    asked |= {"root": root} if root else {}
    if asked["data"] is None:
        raise ValueError(f"{run} was fitted to data that its configuration does not name; name some with --data")
    return _on(device, program), pyro_vae.data.load(**asked).test


def _on(device: str, program: Program) -> nn.Module:
    from lightning.fabric import Fabric

    accelerator, _, index = device.partition(":")
    return program.to(Fabric(accelerator=accelerator, devices=[int(index)] if index else 1).device)


def _evaluate(
    run: Path, program: Program, test: InMemory, num_particles: int, seed: int = 0, write: bool = True
) -> None:
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


def _figures(run: Path, program: Program, test: InMemory, history: Any) -> None:
    few, many = (test.select(slice(n)) for n in (64, 5000))
    reconstructed = evaluation.reconstruct(program, few)
    figures = {
        "training": plots.training_curve(history),
        "reconstructions": plots.reconstructions(pyro_vae.data.to_float(few.x), reconstructed),
        "latent_space": plots.latent_space(evaluation.posterior_means(program, many), many.y),
    }
    if evaluation.takes_x_alone(program):
        figures["samples"] = plots.image_grid(evaluation.sample(program, 64, test.event_shape, seed=0)[0])
    for name, figure in figures.items():
        with runs.replacing(run / runs.FIGURES / f"{name}.png") as temporary:
            figure.savefig(temporary)


@contextmanager
def _progress(title: str) -> Iterator[Callable[[float], None]]:
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=1.0)
        yield lambda share: bar.advance(task, share)


def _free(path: Path) -> Path:
    names = itertools.chain([path], (path.with_name(f"{path.name}-{i}") for i in itertools.count(2)))
    return next(name for name in names if not name.exists())


def _sizes(splits: Splits) -> str:
    parts = {"train": splits.train, "valid": splits.valid, "test": splits.test}
    return ", ".join(f"{len(part):,} {name}" for name, part in parts.items() if part is not None)


def _say(text: str) -> None:
    print(f"pyro-vae: {text}", flush=True)


def _show_warning(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    if issubclass(category, UserWarning):
        print(f"pyro-vae: warning: {message}", file=sys.stderr)
