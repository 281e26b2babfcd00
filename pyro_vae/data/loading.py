"""Data sets by name or file, as train, validation and test splits."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_vae.data.disk import OnDisk, is_on_disk
from pyro_vae.data.files import SUFFIXES, TORCHVISION, read_digits, read_file, read_torchvision
from pyro_vae.data.sets import InMemory, as_tensor, check_noise
from pyro_vae.data.tables import is_table

__all__ = ["Splits", "load"]


class Splits(NamedTuple):
    """Train, validation and test data; `valid` is None where none was held out."""

    train: InMemory | OnDisk
    valid: InMemory | OnDisk | None
    test: InMemory | OnDisk


def load(
    data: str | os.PathLike,
    root: str | os.PathLike | None = None,
    binarize: str | None = None,
    *,
    labels: str | None = None,
    valid: float | None = None,
    test: float | None = None,
    seed: int = 0,
    dequantize: int | None = None,
    in_memory: bool | None = None,
) -> Splits:
    """Load a data set by name, or a file, as train, validation and test splits.

    Names are `digits` (scikit-learn's 1,797 handwritten digits of 8 x 8), `mnist` and `fashion_mnist` (torchvision's,
    downloaded when missing). Files are `.npy` (an array), `.npz` (arrays `x` or `images` and perhaps `y` or `labels`;
    or one array of any name), `.csv` and `.parquet` (a table, whose text and categories become codes), and `.zarr` (an
    array, or a group like an `.npz` file). Images of shape `(N, height, width)` get a channel axis. What has no test
    split of its own is split at random, by `seed`.

    Args:
        data: Name or path.
        root: Folder that holds torchvision's data sets (default `~/.cache/pyro_vae`).
        binarize: None or "none", "dynamic", "static" or "threshold"; see `InMemory`. Validation and test data are then
            binarized once, by `seed`, so that two evaluations agree.
        labels: Column of a table, or array of an `.npz` file or Zarr group, that holds labels.
        valid: Data held out for validation, a fraction or a count (default 0.1; 0 where there is a test split).
        test: Data held out for testing where there is no test split, a fraction or a count (default 0.2).
        seed: Seed of the split, of the binarization and of the noise.
        dequantize: Number of grey levels, which noise makes continuous, or None; see `InMemory`. The noise of
            validation and test data is drawn once, by `seed`.
        in_memory: Whether a `.npy` or `.zarr` file is read into memory, or stays on disk, where the splits are `OnDisk`
            and hold indices, in the order of the file. None reads it where it takes a quarter of the machine's memory
            at most; which of the two it was is in the record, `source`, of each split.

    Raises:
        ValueError: For an unknown name, a file that holds no array, data that `InMemory` refuses, or what cannot stay
            on disk.

    Example:
        >>> [len(split) for split in load("digits")]
        [1258, 180, 359]
    """
    name = str(data)
    check_noise(binarize, dequantize)
    held: tuple[Any, Any] | None = None
    if in_memory is False and name in ("digits", *TORCHVISION):
        raise ValueError(f"in_memory=False: expected a .npy or .zarr file, got {name}")
    if name == "digits":
        x, y = read_digits()
    elif name in TORCHVISION:
        root = Path(root or Path.home() / ".cache" / "pyro_vae").expanduser()
        (x, y), held = read_torchvision(name, root, train=True), read_torchvision(name, root, train=False)
    elif name.endswith(SUFFIXES):
        x, y = read_file(Path(name), labels, in_memory)
        name = str(Path(name).resolve())
    else:
        known = ", ".join(("digits", *TORCHVISION))
        raise ValueError(f"data: expected one of {known}, or a file ending in {', '.join(SUFFIXES)}; got {name!r}")
    source = {
        "data": name,
        "data_root": str(root.resolve()) if isinstance(root, Path) else None,
        "binarize": binarize,
        "labels": labels,
        "valid": valid,
        "test": test,
        "data_seed": seed,
    }
    if dequantize is not None:
        source["dequantize"] = dequantize
    if name.endswith((".npy", ".zarr")):
        source["in_memory"] = not is_on_disk(x)  # splits and noise are drawn in another way
    return _split(x, y, held, binarize, dequantize, valid=valid, test=test, seed=seed, source=source)


def _split(
    x: Any,
    y: Any,
    held: tuple[Any, Any] | None,
    binarize: str | None = None,
    dequantize: int | None = None,
    *,
    valid: float | None = None,
    test: float | None = None,
    seed: int = 0,
    source: dict | None = None,
) -> Splits:
    stays = is_on_disk(x)
    if not stays:
        x, y = x if is_table(x) else as_tensor(x), None if y is None else as_tensor(y)
    num_data = x.shape[0]
    if num_data == 0:
        raise ValueError(f"data: expected at least one datum, got shape {tuple(x.shape)}")
    num_valid = _count("valid", (0.1 if held is None else 0) if valid is None else valid, num_data)
    num_test = _count("test", 0.2 if test is None else test, num_data) if held is None else 0
    if num_valid + num_test >= num_data or (held is None and num_test == 0):
        raise ValueError(
            f"data: expected train and test data, got {num_data} data with valid={num_valid}, test={num_test}"
        )
    order = torch.arange(num_data)
    if num_valid + num_test > 0:
        order = torch.randperm(num_data, generator=torch.Generator().manual_seed(seed))

    def made(x: Any, y: Any, stream: int) -> InMemory:
        return InMemory(x, y, binarize, seed + stream, source, dequantize)

    def part(rows: Tensor, stream: int) -> InMemory | OnDisk:
        if stays:
            event_shape = (1, *x.shape[1:]) if x.ndim == 3 else None
            some = OnDisk(x, y, binarize, seed + stream, source, dequantize, event_shape=event_shape)
            return some.select(rows.sort().values)  # neighbours in the file are read together
        taken = x.iloc[rows.numpy()] if is_table(x) else x[rows]
        return made(taken, None if y is None else y[rows], stream)

    train, valid_rows, test_rows = order.split([num_data - num_valid - num_test, num_valid, num_test])
    valid_data = part(valid_rows, 1).frozen(seed + 1) if num_valid else None
    test_data = part(test_rows, 2) if held is None else made(*held, 2)
    return Splits(part(train, 0), valid_data, test_data.frozen(seed + 2))


def _count(name: str, held_out: float, total: int) -> int:
    if held_out < 0 or held_out >= total:
        raise ValueError(f"{name}: expected a fraction in [0, 1) or a count below {total}, got {held_out}")
    return round(held_out * total) if held_out < 1 else int(held_out)
