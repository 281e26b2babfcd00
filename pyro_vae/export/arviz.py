"""`to_arviz`: any fitted program to an xarray `DataTree` in the schema of ArviZ."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro_vae.export.chunks import Chunks
from pyro_vae.export.stores import WRITERS, Memory, tree
from pyro_vae.files import replacing
from pyro_vae.programs import Program

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["to_arviz", "write_arviz"]


def to_arviz(
    program: Program,
    x: Any,
    *,
    num_samples: int = 500,
    num_prior_samples: int | None = None,
    labels: Any = None,
    coords: Mapping[str, Any] | None = None,
    chunk: int | None = None,
    reweight: str | None = None,
    seed: int = 0,
    progress: bool = True,
    config: Mapping[str, Any] | str | None = None,
) -> xr.DataTree:
    r"""Draws of a program's latents and data as a tree in the schema of ArviZ, with a group for each kind.

    .. math:: z_{sn} \sim q(z \mid x_n), \qquad \tilde x_{sn} \sim p(x \mid z_{sn}), \qquad
              \log w_{sn} = \log p(x_n, z_{sn}) - \log q(z_{sn} \mid x_n)

    ========================  ======================================================================================
    group                     holds
    ========================  ======================================================================================
    `posterior`               latents from the guide, by site; global ones have no dimension `datum`
    `posterior_predictive`    data drawn from the model at these latents, the data themselves withheld
    `log_likelihood`          log p(x given z) at these latents in nats, by observed site
    `sample_stats`            `log_weights` in nats; of each datum `khat`, and `ess` in draws
    `prior`                   latents from the model alone, the global ones too
    `prior_predictive`        data drawn from the model at these
    `observed_data`           the data; of a site that observes something else than x (of which nothing is drawn), that
    `constant_data`           `label`, and what else the program takes beside x
    ========================  ======================================================================================

    Dimensions are `chain` (of one), `draw`, `datum`, and those of a value: `latent` of a vector at site "z"; `channel`,
    `height` and `width` of images; `column` of tables; `<name>_dim_0`, ... of all else. Sites "x.<part>" are
    variables of their own. Floats keep the program's dtype, log-densities are float64, and discrete data are integers,
    by which ArviZ knows them.

    Data are taken in chunks: beside the tree, memory follows the chunk (and `write_arviz` needs no more). Draws depend
    on the seed and on the chunk. Global latents are drawn once, with the first chunk, and shared by all data;
    log-likelihoods and weights are given these.

    Args:
        program: Any program that keeps its local sites in one plate named "data".
        x: Tensor, array, table, `Dataset` or `DataLoader`.
        num_samples: Number `S` of draws for each datum.
        num_prior_samples: Draws from the prior for each datum; None for as many, 0 to leave these groups out.
        labels: One a datum, for `constant_data`; None for the `y` of data in memory, an `InMemory` or a pair `(x, y)`,
            if the program does not take it. What else a `Dataset` or `DataLoader` holds is not looked at.
        coords: Coordinates by dimension, in place of numbers from 0 and of the names of a table's columns.
        chunk: Number of data at a time; None for as many as keep draws of x within 2^22 values.
        reweight: "psis" to resample each datum's draws, with replacement, by their Pareto-smoothed importance weights.
            The draws are then the posterior's and no more the guide's, as far as `khat` (below 0.7) allows.
        seed: Seed of the draws.
        progress: Whether to show a progress bar past two seconds.
        config: What made the program, such as a run's configuration, to be kept in the attributes.

    Returns:
        A `DataTree` of the groups above, with versions, program, seed, options and `config` (YAML) as attributes.

    Raises:
        ValueError: If a number is not positive, the data do not suit the program, labels or coordinates do not suit the
            data (or come with a `DataLoader` that shuffles, or leaves some out), names of sites are those of dimensions
            or of each other, global latents would have to be reweighted, or weights that are all 0 or not numbers.

    Reference:
        Kumar, Carroll, Hartikainen and Martin, 2019. ArviZ, a unified library for exploratory analysis of Bayesian
        models in Python. Vehtari, Simpson, Gelman, Yao and Gabry, 2024. Pareto smoothed importance sampling.

    Example:
        >>> import pyro_vae
        >>> import torch
        >>> tree = to_arviz(pyro_vae.build((1, 8, 8), latent=2), torch.ones(3, 1, 8, 8), num_samples=50)
        >>> dict(tree.posterior.z.sizes)
        {'chain': 1, 'draw': 50, 'datum': 3, 'latent': 2}
        >>> tree.posterior_predictive.x.dims
        ('chain', 'draw', 'datum', 'channel', 'height', 'width')
    """
    chunks = Chunks(
        program,
        x,
        num_samples=num_samples,
        num_prior_samples=num_prior_samples,
        labels=labels,
        coords=coords,
        chunk=chunk,
        reweight=reweight,
        seed=seed,
        config=config,
    )
    memory = Memory(chunks.num_data)
    chunks.each(memory.take, progress)
    return tree(memory.groups(), chunks.attributes)


def write_arviz(
    program: Program,
    x: Any,
    path: str | os.PathLike,
    *,
    num_samples: int = 500,
    num_prior_samples: int | None = None,
    labels: Any = None,
    coords: Mapping[str, Any] | None = None,
    chunk: int | None = None,
    reweight: str | None = None,
    seed: int = 0,
    progress: bool = True,
    config: Mapping[str, Any] | str | None = None,
) -> Path:
    """Write the tree of `to_arviz` to disk chunk by chunk, so that memory follows the chunk and not the data.

    What is written stands beside its place until it is whole. `xarray.open_datatree(path)` reads it, piece by piece as
    it is asked for; `arviz.from_netcdf` gives the legacy `InferenceData`.

    Args:
        program: Any program that keeps its local sites in one plate named "data".
        x: Tensor, array, table, `Dataset` or `DataLoader`.
        path: Where to write: a NetCDF file (`.nc`) or a Zarr store (`.zarr`). What is there is replaced.
        num_samples: As all that follow, an argument of `to_arviz`.
        num_prior_samples: See there.
        labels: See there.
        coords: See there.
        chunk: See there.
        reweight: See there.
        seed: See there.
        progress: See there.
        config: See there.

    Returns:
        The path.

    Raises:
        ValueError: If the path ends otherwise, is a folder and no Zarr store, or a file where a store is to be; if
            labels or coordinates are such as the format does not hold (times, say); or as `to_arviz` does.

    Reference:
        Kumar, Carroll, Hartikainen and Martin, 2019. ArviZ, a unified library for exploratory analysis of Bayesian
        models in Python.

    Example:
        >>> import pyro_vae
        >>> import tempfile, torch, xarray
        >>> vae, path = pyro_vae.build((8, 8), latent=2), Path(tempfile.mkdtemp()) / "posterior.nc"
        >>> with xarray.open_datatree(write_arviz(vae, torch.ones(3, 8, 8), path, num_samples=50)) as tree:
        ...     tree.posterior.z.shape
        (1, 50, 3, 2)
    """
    path = Path(path)
    _check_path(path)
    chunks = Chunks(
        program,
        x,
        num_samples=num_samples,
        num_prior_samples=num_prior_samples,
        labels=labels,
        coords=coords,
        chunk=chunk,
        reweight=reweight,
        seed=seed,
        config=config,
    )
    _check_times(path, chunks)
    with replacing(path) as temporary:
        writer = WRITERS[path.suffix](temporary, chunks.attributes)
        chunks.each(writer.take, progress)
        writer.close()
    return path


def _check_times(path: Path, chunks: Chunks) -> None:
    for name, values in (("labels", chunks.labels), ("coords['datum']", chunks.coords.get("datum"))):
        if path.suffix == ".nc" and values is not None and values.dtype.kind in "mM":
            raise ValueError(
                f"{name}: expected numbers or text in NetCDF, got {values.dtype}; take a .zarr store, or text "
                "(.astype(str))"
            )


def _check_path(path: Path) -> None:
    parents = [parent for parent in path.parents if parent.exists() and not parent.is_dir()]
    if parents or (path.suffix == ".zarr" and path.exists() and not path.is_dir()):
        raise ValueError(
            f"path: expected a place for a folder or file, got the file {str((*parents, path)[0])!r} there"
        )
    if path.suffix not in WRITERS:
        raise ValueError(f"path: expected one that ends in {' or '.join(WRITERS)}, got {str(path)!r}")
    if path.suffix == ".zarr" and find_spec("zarr") is None:
        raise ValueError("path: expected the package zarr for a .zarr store, got none; pip install 'pyro-vae[zarr]'")
    is_store = any((path / name).is_file() for name in (".zgroup", "zarr.json"))
    if path.is_dir() and not (path.suffix == ".zarr" and (is_store or not any(path.iterdir()))):
        raise ValueError(f"path: expected a place for a file, or a Zarr store to replace, got the folder {str(path)!r}")
