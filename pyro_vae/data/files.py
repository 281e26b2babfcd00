"""Where data come from: scikit-learn, torchvision, and files."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.data.tables import is_table, with_categories

__all__ = ["read_digits", "read_file", "read_torchvision"]

TORCHVISION = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST"}
SUFFIXES = (".npy", ".npz", ".csv", ".parquet", ".zarr")
MEMORY_SHARE = 0.25  # of the machine's memory: a file of more stays on disk, as its splits are another copy


def read_digits() -> tuple[Tensor, Tensor]:
    """Images and labels of scikit-learn's handwritten digits.

    Example:
        >>> read_digits()[0].shape
        torch.Size([1797, 1, 8, 8])
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return torch.as_tensor(bunch.images, dtype=torch.float32)[:, None] / 16, torch.as_tensor(bunch.target)


def read_torchvision(name: str, root: Path, train: bool) -> tuple[Tensor, Tensor]:
    """Images and labels of one of torchvision's data sets, downloaded to `root` when missing.

    Raises:
        ValueError: If it is neither there nor can be downloaded.
    """
    from torchvision import datasets

    cls = getattr(datasets, TORCHVISION[name])
    try:
        try:
            loaded = cls(root, train=train, download=False)
        except RuntimeError:  # not there
            loaded = cls(root, train=train, download=True)
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        folder = root / cls.__name__ / "raw"
        for made in (folder, folder.parent, root):  # by the download; what holds anything stays
            with contextlib.suppress(OSError):
                made.rmdir()
        files = ", ".join(Path(file).stem for file, _ in cls.resources)
        raise ValueError(
            f"data: {name} is not in {folder} (files {files}) and could not be downloaded "
            f"({str(error).splitlines()[0]}); name the folder that holds {cls.__name__}/raw with root (--data-root)"
        ) from error
    return loaded.data[:, None], loaded.targets


def read_file(path: Path, labels: str | None, in_memory: bool | None = None) -> tuple[Any, Any]:
    """Data and labels (or None) of a file: an array, or a `DataFrame` whose text columns are categoricals.

    Arrays of `.npy` and `.zarr` that are not to be in memory, or are too large for it, are given as they are on disk.

    Args:
        path: The file.
        labels: Column, or array of an `.npz` file or a Zarr group, that holds labels.
        in_memory: Whether to read all of it; None does where it takes a quarter of the machine's memory at most.

    Raises:
        ValueError: If there is no such file, or it holds no data of this kind.
    """
    if not (path.is_dir() if path.suffix == ".zarr" else path.is_file()):
        raise ValueError(f"data: no such file: {path}")
    if in_memory is False and path.suffix not in (".npy", ".zarr"):
        raise ValueError(f"in_memory=False: expected a .npy or .zarr file, got {path.name}")
    try:
        if path.suffix == ".npy":
            on_disk = _stays(path.stat().st_size, in_memory)
            x, y = np.load(path, mmap_mode="r" if on_disk else None, allow_pickle=False), None
        elif path.suffix == ".zarr":
            x, y = _zarr(path, labels, in_memory)
        elif path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                x, y = _arrays(path, {name: file[name] for name in file.files}, labels)
        else:
            x, y = _table(path, labels)
    except ImportError as error:
        package, extra = ("zarr", "zarr") if path.suffix == ".zarr" else ("pyarrow", "parquet")
        raise ValueError(f"data: {path} needs {package}: pip install 'pyro-vae[{extra}]'") from error
    except (OSError, EOFError, KeyError, UnicodeDecodeError) as error:
        raise ValueError(f"data: {path} holds no array: {str(error).splitlines()[0]}") from error
    except ValueError as error:
        message = str(error).splitlines()[0]
        if message.startswith("data: "):
            raise
        message = "it is no NumPy file, or holds pickled objects" if "pickle" in message else message
        raise ValueError(f"data: {path} holds no array: {message}") from error
    if is_table(x):
        return x, y
    if x.ndim == 0 or x.dtype.kind not in "buif":
        raise ValueError(f"data: {path}: expected an array of numbers, got dtype {x.dtype} and shape {x.shape}")
    return (x[:, None] if x.ndim == 3 and isinstance(x, np.ndarray) else x), y


def _stays(size: int, in_memory: bool | None) -> bool:
    """Whether an array of so many bytes stays on disk."""
    if in_memory is not None:
        return not in_memory
    # Windows does not say, and Python without a further package neither.
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 2**34
    return size > MEMORY_SHARE * memory


def _zarr(path: Path, labels: str | None, in_memory: bool | None) -> tuple[Any, Any]:
    import zarr

    opened = zarr.open(path, mode="r")
    if isinstance(opened, zarr.Array):
        if labels:
            raise ValueError(f"data: {path}: expected an array {labels!r}, got a store of one array")
        x, y = opened, None
    else:
        x, y = _arrays(path, dict(opened.arrays()), labels)
    return (x, y) if _stays(x.nbytes, in_memory) else (x[...], None if y is None else y[...])


def _arrays(path: Path, arrays: dict[str, Any], labels: str | None) -> tuple[Any, Any]:
    """Data and labels (or None) of named arrays."""
    label_names = (labels,) if labels else ("y", "labels")
    if labels and labels not in arrays:
        raise ValueError(f"data: {path}: expected an array {labels!r}, got {', '.join(arrays)}")
    y = next((arrays.pop(name) for name in label_names if name in arrays), None)
    names: list[str] = [name for name in ("x", "images") if name in arrays] or list(arrays)
    if len(names) != 1:
        raise ValueError(
            f"data: {path}: expected one array, or one named x or images; got {', '.join(arrays) or 'none'}"
        )
    return arrays[names[0]], y


def _table(path: Path, labels: str | None) -> tuple[Any, Any]:
    import pandas as pd

    frame = pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)
    if path.suffix == ".csv" and all(_is_number(name) for name in frame.columns):  # the first row is data
        frame = pd.read_csv(path, header=None)
    if labels is not None and labels not in frame:
        raise ValueError(f"data: {path}: expected a column {labels!r}, got {', '.join(map(str, frame.columns))}")
    y = None if labels is None else _labels(frame.pop(labels))
    return with_categories(frame), y


def _labels(column: Any) -> np.ndarray:
    """Labels as numbers: numbers as they are (they may be more than names, an exposure for example), text as codes."""
    import pandas as pd

    return column.to_numpy() if pd.api.types.is_numeric_dtype(column) else pd.factorize(column, sort=True)[0]


def _is_number(text: Any) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
