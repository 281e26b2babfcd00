"""The command `fit`."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Annotated, Any

import pyro
import typer
from torch import nn

import pyro_vae
from pyro_vae import expressions, runs
from pyro_vae.cli import output
from pyro_vae.cli.arguments import NUM_PARTICLES, Debug, Device, NumParticles, Trust, option
from pyro_vae.data import InMemory, OnDisk, Splits
from pyro_vae.likelihoods import Bernoulli
from pyro_vae.networks import Standardized
from pyro_vae.programs import Program
from pyro_vae.training import processes
from pyro_vae.training.options import checked_seed, fabric

__all__ = ["fit"]


def fit(
    data: Annotated[
        str, option("digits, mnist, fashion_mnist, or a .npy, .npz, .csv, .parquet or .zarr file.")
    ] = "digits",
    data_root: Annotated[str | None, option("Folder of torchvision's data sets.")] = None,
    binarize: Annotated[
        str | None, option("dynamic, static, threshold or none. By default dynamic, for grey data under Bernoulli.")
    ] = None,
    dequantize: Annotated[
        int | None, option("Number of grey levels, such as 256, that are made continuous by uniform noise.")
    ] = None,
    labels: Annotated[str | None, option("Column or array that holds labels.")] = None,
    valid: Annotated[float | None, option("Data held out for validation: a fraction or a count.")] = None,
    test: Annotated[float | None, option("Data held out for testing: a fraction or a count.")] = None,
    data_seed: Annotated[int, option("Seed of splits, binarization and noise.")] = 0,
    in_memory: Annotated[
        bool | None,
        option("Read a .npy or .zarr file into memory. [default: where it takes a quarter of the memory at most]"),
    ] = None,
    latent: Annotated[int | None, option("Latent dimensions. [default: 20]", "--latent")] = None,
    network: Annotated[str | None, option("Network of encoder and decoder. [default: MLP()]")] = None,
    prior: Annotated[str | None, option("Prior. [default: StandardNormal()]")] = None,
    likelihood: Annotated[str | None, option("Likelihood. [default: Bernoulli()]")] = None,
    posterior: Annotated[str | None, option("Posterior. [default: DiagonalNormal()]")] = None,
    program: Annotated[str | None, option("The whole program, in place of the five above.")] = None,
    estimator: Annotated[str, option("Estimator, of pyro_vae.estimators or pyro.infer.")] = "Trace_ELBO()",
    anneal: Annotated[str | None, option("Schedule of beta, such as Linear(0.1).")] = None,
    epochs: Annotated[int, option("Passes over the data.")] = 100,
    batch_size: Annotated[int, option("Data in a step.")] = 128,
    lr: Annotated[float, option("Learning rate; the highest one of a schedule.")] = 1e-3,
    optimizer: Annotated[str, option("Optimizer of torch.optim.")] = "Adam()",
    lr_schedule: Annotated[str | None, option("cosine or one-cycle.")] = None,
    device: Device = "auto",
    precision: Annotated[str, option("32-true, 64-true, bf16-mixed, or 16-mixed (on CUDA).")] = "32-true",
    devices: Annotated[int, option("Processes on each machine, each with a device.")] = 1,
    num_nodes: Annotated[int, option("Machines.")] = 1,
    strategy: Annotated[str, option("auto, ddp or fsdp.")] = "auto",
    seed: Annotated[int, option("Seed of weights, order and noise.")] = 0,
    start_at_mean: Annotated[
        bool | None,
        option("Set the output bias from the data's mean first. [default: where the likelihood can]"),
    ] = None,
    num_workers: Annotated[int, option("Threads that read a file that stays on disk (one at least).")] = 0,
    compile: Annotated[bool | None, option("Compile the training step, or do not. [default: where it pays]")] = None,
    out: Annotated[
        Path | None, option("Run directory. [default: the first free of runs/DATA, runs/DATA-2, ...]")
    ] = None,
    resume: Annotated[bool, option("Go on with the run in --out.", "--resume")] = False,
    overwrite: Annotated[bool, option("Replace the run in --out.", "--overwrite")] = False,
    num_particles: NumParticles = NUM_PARTICLES,
    config: Annotated[
        Path | None, option("A run's config.yaml to repeat; options beside it win, but for the parts of its program.")
    ] = None,
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """Fit a variational autoencoder, evaluate it on the test data, and write a run directory."""
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
    pyro.set_rng_seed(checked_seed(seed))
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
        go_on="" if num_particles == NUM_PARTICLES else f" --num-particles {num_particles}",
    )
    if not first:
        return
    try:
        output.record_columns(run, splits.train)
        output.evaluate(run, built, splits.test, num_particles)
        output.write_figures(run, built, splits.test, fitted.history)
    except KeyboardInterrupt:
        print(f"\npyro-vae: interrupted after training; go on with: pyro-vae evaluate {run}", file=sys.stderr)
        raise typer.Exit(130) from None
    output.say(f"run directory: {run}")


def _build(train: InMemory | OnDisk, chosen: dict[str, Any], trust: bool) -> nn.Module:
    """The program of the chosen parts. A table's columns differ in scale, and are standardized for the encoder."""
    standardize = None
    if train.columns is not None:
        standardized = Standardized.of(nn.Identity(), pyro_vae.data.to_float(train.x))
        standardize = standardized.loc, standardized.scale
        chosen = {"network": "Standardized(net=MLP()), MLP()"} | chosen
    return expressions.build(train.event_shape, **chosen, size=len(train), standardize=standardize, trust=trust)


def _fit(
    program: Program, train: InMemory | OnDisk, *, out: Path, go_on: str, **options: Any
) -> pyro_vae.training.Fitted:
    try:
        return pyro_vae.fit(program, train, out=out, **options)
    except KeyboardInterrupt as interruption:
        if processes.told_elsewhere(interruption):
            raise typer.Exit(130) from None
        print(f"\npyro-vae: interrupted; go on with: pyro-vae fit --resume --out {out}{go_on}", file=sys.stderr)
        raise typer.Exit(130) from None


def _can_start_at_mean(program: Program) -> bool:
    likelihood = getattr(program, "likelihood", None)
    return hasattr(likelihood, "start_at") and hasattr(getattr(likelihood, "net", None), "output_bias")


def _free(path: Path) -> Path:
    names = itertools.chain([path], (path.with_name(f"{path.name}-{i}") for i in itertools.count(2)))
    return next(name for name in names if not name.exists())


def _sizes(splits: Splits) -> str:
    parts = {"train": splits.train, "valid": splits.valid, "test": splits.test}
    return ", ".join(f"{len(part):,} {name}" for name, part in parts.items() if part is not None)
