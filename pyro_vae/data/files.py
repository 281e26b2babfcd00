"""Where data come from: scikit-learn, torchvision, and files."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.data.tables import is_table, with_categories

__all__ = ["read_digits", "read_file", "read_torchvision"]

TORCHVISION = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST"}
SUFFIXES = (".npy", ".npz", ".csv", ".parquet")


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


def read_file(path: Path, labels: str | None) -> tuple[Any, Any]:
    """Data and labels (or None) of a file: an array, or a `DataFrame` whose text columns are categoricals.

    Args:
        path: The file.
        labels: Column, or array of an `.npz` file, that holds labels.

    Raises:
        ValueError: If there is no such file, or it holds no data of this kind.
    """
    if not path.is_file():
        raise ValueError(f"data: no such file: {path}")
    try:
        if path.suffix == ".npy":
            x, y = np.load(path, allow_pickle=False), None
        elif path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                x, y = _arrays(path, {name: file[name] for name in file.files}, labels)
        else:
            x, y = _table(path, labels)
    except ImportError as error:
        raise ValueError(f"data: {path} needs pyarrow: pip install 'pyro-vae[parquet]'") from error
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
    x = np.asarray(x)
    if x.ndim == 0 or x.dtype.kind not in "buif":
        raise ValueError(f"data: {path}: expected an array of numbers, got dtype {x.dtype} and shape {x.shape}")
    return (x[:, None] if x.ndim == 3 else x), y


def _arrays(path: Path, arrays: dict[str, np.ndarray], labels: str | None) -> tuple[Any, Any]:
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
