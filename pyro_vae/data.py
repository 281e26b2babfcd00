"""Data as tensors and streams of batches: loading, splits, binarization, checks."""

from __future__ import annotations

import contextlib
import itertools
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import constraints
from torch.utils.data import DataLoader, Dataset

from pyro_vae.handlers import in_data_plate
from pyro_vae.programs import Program, num_inputs, placement, undisturbed

__all__ = ["Batches", "InMemory", "Splits", "as_source", "check", "load", "to_float"]

BINARIZATIONS = ("dynamic", "static", "threshold", "none")
_TORCHVISION = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST"}
_SUFFIXES = (".npy", ".npz", ".csv", ".parquet")


class InMemory(Dataset):
    """Data in memory, kept in the compact dtype that it came in, and served as floats.

    `uint8` holds images and is served divided by 255; `bool` is served as 0 and 1; other dtypes keep their values.

    Args:
        x: Array or tensor of shape `(N, *event_shape)`.
        y: Labels of length `N`, or None.
        binarize: None or "none"; "dynamic" (drawn anew each time a datum is served); "static" (drawn once from
            `seed`); or "threshold" (`x > 0.5`).
        seed: Seed of the static binarization.
        source: Arguments of `load` that made it, for the record.

    Raises:
        ValueError: If there are no data, NaN or infinity, labels of another length, or nothing in [0, 1] to binarize.

    Reference:
        Burda, Grosse and Salakhutdinov, 2016. Importance weighted autoencoders (dynamic binarization).

    Example:
        >>> InMemory(torch.tensor([[0, 255]], dtype=torch.uint8))[torch.tensor([0])]
        tensor([[0., 1.]])
    """

    def __init__(self, x: Any, y: Any = None, binarize: str | None = None, seed: int = 0, source: dict | None = None):
        self.x = _as_tensor(x)
        self.y = None if y is None else _as_tensor(y)
        self.binarize = None if binarize == "none" else binarize
        self.source = source
        if self.x.ndim == 0 or self.x.numel() == 0:
            raise ValueError(f"data: expected at least one datum, got shape {tuple(self.x.shape)}")
        if self.y is not None and len(self.y) != len(self.x):
            raise ValueError(f"data: expected {len(self.x)} labels, one a datum, got {len(self.y)}")
        if self.x.is_floating_point() and not self.x.isfinite().all():
            count = int((~self.x.isfinite()).sum())
            raise ValueError(f"data: expected finite values, got {count} NaN or infinite of {self.x.numel()}")
        if self.binarize is not None:
            self._binarize(self.binarize, seed)

    def _binarize(self, how: str, seed: int) -> None:
        if how not in BINARIZATIONS:
            raise ValueError(f"binarize: expected one of {', '.join(BINARIZATIONS)}; got {how!r}")
        low, high = to_float(self.x.min()).item(), to_float(self.x.max()).item()
        if low < 0 or high > 1:
            raise ValueError(f"binarize: expected values in [0, 1], got values from {low:g} to {high:g}")
        if how == "static":
            generator = torch.Generator().manual_seed(seed)
            self.x = torch.cat(
                [torch.bernoulli(to_float(part), generator=generator).bool() for part in self.x.split(4096)]
            )
        elif how == "threshold":
            self.x = torch.cat([to_float(part) > 0.5 for part in self.x.split(4096)])

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: Any) -> Any:
        x = to_float(self.x[index])
        if self.binarize == "dynamic":
            x = torch.bernoulli(x)
        return x if self.y is None else (x, self.y[index])

    def __getitems__(self, indices: list[int]) -> list[Any]:
        """What a `DataLoader` asks for."""
        return [self[i] for i in indices]

    @property
    def grey(self) -> bool:
        """Whether the values are in [0, 1] and not all at its ends."""
        if self.binarize == "dynamic":
            return False
        parts = [to_float(part) for part in self.x.split(4096)]
        inside = all(bool(((part >= 0) & (part <= 1)).all()) for part in parts)
        return inside and any(bool(((part > 0) & (part < 1)).any()) for part in parts)

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one datum."""
        return tuple(self.x.shape[1:])

    def to(self, device: torch.device) -> InMemory:
        """The same data on a device."""
        moved = object.__new__(InMemory)
        moved.__dict__.update(self.__dict__, x=self.x.to(device), y=None if self.y is None else self.y.to(device))
        return moved


class Splits(NamedTuple):
    """Train, validation and test data; `valid` is None where none was held out."""

    train: InMemory
    valid: InMemory | None
    test: InMemory


def load(
    data: str | os.PathLike,
    root: str | os.PathLike | None = None,
    binarize: str | None = None,
    *,
    labels: str | None = None,
    valid: float | None = None,
    test: float | None = None,
    seed: int = 0,
) -> Splits:
    """Load a data set by name, or a file, as train, validation and test splits.

    Names are `digits` (scikit-learn's 1,797 handwritten digits of 8 x 8), `mnist` and `fashion_mnist` (torchvision's,
    downloaded when missing). Files are `.npy` (an array), `.npz` (arrays `x` or `images` and perhaps `y` or `labels`;
    or one array of any name), `.csv` and `.parquet` (a table of numbers). Images of shape `(N, height, width)` get a
    channel axis. What has no test split of its own is split at random, by `seed`.

    Args:
        data: Name or path.
        root: Folder that holds torchvision's data sets (default `~/.cache/pyro_vae`).
        binarize: None or "none", "dynamic", "static" or "threshold"; see `InMemory`. Validation and test data are then
            binarized once, by `seed`, so that two evaluations agree.
        labels: Column of a table, or array of an `.npz` file, that holds labels.
        valid: Data held out for validation, a fraction or a count (default 0.1; 0 where there is a test split).
        test: Data held out for testing where there is no test split, a fraction or a count (default 0.2).
        seed: Seed of the split and of the binarization.

    Raises:
        ValueError: For an unknown name, a file that holds no array, or data that `InMemory` refuses.

    Example:
        >>> [len(split) for split in load("digits")]
        [1258, 180, 359]
    """
    name = str(data)
    if binarize is not None and binarize not in BINARIZATIONS:
        raise ValueError(f"binarize: expected one of {', '.join(BINARIZATIONS)}; got {binarize!r}")
    held: tuple[Any, Any] | None = None
    if name == "digits":
        x, y = _digits()
    elif name in _TORCHVISION:
        root = Path(root or Path.home() / ".cache" / "pyro_vae").expanduser()
        (x, y), held = _torchvision(name, root, train=True), _torchvision(name, root, train=False)
    elif name.endswith(_SUFFIXES):
        x, y = _file(Path(name), labels)
        name = str(Path(name).resolve())
    else:
        known = ", ".join(("digits", *_TORCHVISION))
        raise ValueError(f"data: expected one of {known}, or a file ending in {', '.join(_SUFFIXES)}; got {name!r}")
    source = {
        "data": name,
        "data_root": str(root.resolve()) if isinstance(root, Path) else None,
        "binarize": binarize,
        "labels": labels,
        "valid": valid,
        "test": test,
        "data_seed": seed,
    }
    return _split(x, y, held, binarize, valid, test, seed, source)


def _split(x, y, held, binarize, valid, test, seed, source) -> Splits:
    x, y = _as_tensor(x), None if y is None else _as_tensor(y)
    if len(x) == 0:
        raise ValueError(f"data: expected at least one datum, got shape {tuple(x.shape)}")
    num_valid = _count("valid", (0.1 if held is None else 0) if valid is None else valid, len(x))
    num_test = _count("test", 0.2 if test is None else test, len(x)) if held is None else 0
    if num_valid + num_test >= len(x) or (held is None and num_test == 0):
        raise ValueError(
            f"data: expected train and test data, got {len(x)} data with valid={num_valid}, test={num_test}"
        )
    order = torch.arange(len(x))
    if num_valid + num_test > 0:
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    parts = order.split([len(x) - num_valid - num_test, num_valid, num_test])

    fixed = "static" if binarize == "dynamic" else binarize

    def part(rows: Tensor, how: str | None, stream: int) -> InMemory:
        return InMemory(x[rows], None if y is None else y[rows], how, seed + stream, source)

    train = part(parts[0], binarize, 0)
    valid_data = part(parts[1], fixed, 1) if num_valid else None
    test_data = part(parts[2], fixed, 2) if held is None else InMemory(held[0], held[1], fixed, seed + 2, source)
    return Splits(train, valid_data, test_data)


def _count(name: str, held_out: float, total: int) -> int:
    if held_out < 0 or held_out >= total:
        raise ValueError(f"{name}: expected a fraction in [0, 1) or a count below {total}, got {held_out}")
    return round(held_out * total) if held_out < 1 else int(held_out)


def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return torch.as_tensor(bunch.images, dtype=torch.float32)[:, None] / 16, torch.as_tensor(bunch.target)


def _torchvision(name: str, root: Path, train: bool) -> tuple[Tensor, Tensor]:
    from torchvision import datasets

    cls = getattr(datasets, _TORCHVISION[name])
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


def _file(path: Path, labels: str | None) -> tuple[Any, Any]:
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
    y = None if labels is None else pd.factorize(frame.pop(labels), sort=True)[0]
    text = [str(name) for name, dtype in frame.dtypes.items() if not pd.api.types.is_numeric_dtype(dtype)]
    if text:
        hint = "" if labels else f" (--labels {text[0]} makes it the labels)"
        raise ValueError(f"data: {path}: expected columns of numbers, got text in {', '.join(text)}{hint}")
    return frame.to_numpy(dtype="float64", na_value=np.nan), y


def _is_number(text: Any) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _as_tensor(x: Any) -> Tensor:
    if isinstance(x, Tensor):
        return x.detach()
    array = np.asarray(x)
    if array.dtype.kind not in "buif":
        raise ValueError(f"data: expected an array of numbers, got dtype {array.dtype}")
    if array.dtype.kind == "u" and array.itemsize > 1:
        array = array.astype(np.int64)  # torch computes little in the wider unsigned dtypes
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("="))
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))


def to_float(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Data as floats of `dtype`: `uint8` is divided by 255, all else keeps its values.

    Without `dtype`, floats stay of theirs and the rest gets torch's default.

    Example:
        >>> to_float(torch.tensor([51], dtype=torch.uint8))
        tensor([0.2000])
    """
    dtype = dtype or (x.dtype if x.is_floating_point() else torch.get_default_dtype())
    return x.to(dtype).div_(255) if x.dtype == torch.uint8 else x.to(dtype)


def as_source(data: Any) -> Dataset | DataLoader:
    """A tensor, array, table, `(x, y)` pair, `Dataset` or `DataLoader` as something that batches are drawn from.

    Raises:
        ValueError: If it is something else.

    Example:
        >>> len(as_source(np.zeros((3, 2))))
        3
    """
    if isinstance(data, Dataset | DataLoader):
        return data
    if isinstance(data, Splits | str | dict):
        raise ValueError(f"data: expected a tensor, array, Dataset or DataLoader, got {type(data).__name__}")
    if isinstance(data, tuple) and len(data) == 2:
        return InMemory(*data)
    try:
        return InMemory(data)
    except TypeError:
        raise ValueError(f"data: expected a tensor, array, Dataset or DataLoader, got {type(data).__name__}") from None


class Batches:
    """Batches of data on the program's device, one epoch at a time, in an order that the seed and the epoch fix.

    Args:
        data: Anything that `as_source` takes. A `DataLoader` keeps its own batch size and order (and a run that was
            stopped within an epoch of one that shuffles goes on with another order).
        program: The program, which says how many tensors of a batch it takes, and their device and dtype.
        batch_size: Data in a batch; the last one of an epoch may be smaller.
        seed: Seed of the order; None keeps the order of the data.

    Raises:
        ValueError: If the batch size is not in [1, number of data], or the data have no length.

    Example:
        >>> import pyro_vae
        >>> batches = Batches(torch.zeros(10, 8, 8), pyro_vae.build((8, 8), latent=2), batch_size=4)
        >>> [len(x) for (x,) in batches.epoch(0)]
        [4, 4, 2]
    """

    def __init__(self, data: Any, program: Program, batch_size: int, seed: int | None = None):
        self.source: Any = as_source(data)
        self.device, self.dtype = placement(program)
        self.num_inputs = num_inputs(program)
        self.batch_size = batch_size
        self.seed = seed
        sized: Any = self.source.dataset if isinstance(self.source, DataLoader) else self.source
        try:
            self.num_data = len(sized)
        except TypeError:
            raise ValueError("data: expected a Dataset or DataLoader with a length, got one without") from None
        if self.num_data == 0:
            raise ValueError("data: expected at least one datum, got none")
        if not isinstance(self.source, DataLoader) and not 1 <= batch_size <= self.num_data:
            raise ValueError(f"batch size: expected 1 to {self.num_data} (the number of data), got {batch_size}")
        if isinstance(self.source, InMemory):
            self.source = self.source.to(self.device)

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self.source) if isinstance(self.source, DataLoader) else -(-self.num_data // self.batch_size)

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[tuple[Tensor, ...]]:
        """The batches of an epoch, without its first `skip`."""
        if isinstance(self.source, InMemory):
            for rows in self._order(epoch).to(self.device).split(self.batch_size)[skip:]:
                yield self._inputs(self.source[rows])
            return
        loader = self.source
        if not isinstance(loader, DataLoader):
            order, generator = (
                self._order(epoch).tolist(),
                torch.Generator(),
            )  # else it would draw from the global state
            loader = DataLoader(self.source, batch_size=self.batch_size, sampler=order, generator=generator)
        if skip == 0:
            yield from map(self._inputs, loader)
            return
        # What is skipped was drawn before the checkpoint, whose random state must not be touched again.
        with torch.random.fork_rng([]):
            rest = itertools.islice(loader, skip, None)
            batch = next(rest, None)
        while batch is not None:
            yield self._inputs(batch)
            batch = next(rest, None)

    def _order(self, epoch: int) -> Tensor:
        if self.seed is None:
            return torch.arange(self.num_data)
        state = np.random.SeedSequence((self.seed, epoch)).generate_state(1)
        return torch.randperm(self.num_data, generator=torch.Generator().manual_seed(int(state[0])))

    def _inputs(self, batch: Any) -> tuple[Tensor, ...]:
        items = batch if isinstance(batch, tuple | list) else (batch,)
        if not all(isinstance(item, Tensor) for item in items):
            raise ValueError(
                f"data: expected tensors in a batch, got {', '.join(type(item).__name__ for item in items)}"
            )
        x, *rest = (item.to(self.device, non_blocking=True) for item in items[: self.num_inputs])
        # Labels and other companions keep integer dtypes.
        return (to_float(x, self.dtype), *(r.to(self.dtype) if r.is_floating_point() else r for r in rest))


def check(program: Program, batches: Batches) -> None:
    """Check shapes and values of the data against the program, before anything is computed from them.

    Args:
        program: The program.
        batches: Its data. Data in memory are checked whole, a stream by its first batch.

    Raises:
        ValueError: If the event shape differs from the likelihood's, or values are outside its support.

    Warns:
        UserWarning: If grey values meet a Bernoulli likelihood.

    Example:
        >>> import pyro_vae
        >>> vae = pyro_vae.build((8, 8), latent=2)
        >>> check(vae, Batches(torch.zeros(10, 8, 9), vae, batch_size=10))
        Traceback (most recent call last):
        ...
        ValueError: x: expected data of event shape (8, 8), got (8, 9)
    """
    with undisturbed(program), pyro.validation_enabled(False):
        ordered = Batches(batches.source, program, batches.batch_size)
        first = next(ordered.epoch(0))
        expected = getattr(getattr(program, "likelihood", None), "event_shape", None)
        if expected is not None and tuple(first[0].shape[1:]) != tuple(expected):
            raise ValueError(f"x: expected data of event shape {tuple(expected)}, got {tuple(first[0].shape[1:])}")
        guide: Any = poutine.trace(program.guide).get_trace(*first)
        model: Any = poutine.trace(poutine.replay(program.model, trace=guide)).get_trace(*first)
        _check_plates(guide)
        _check_plates(model)
        sites = [s for s in model.nodes.values() if s["type"] == "sample" and s["is_observed"] and in_data_plate(s)]
        sites = [site for site in sites if not site["infer"].get("_deterministic")]
        if not sites:
            raise ValueError(
                f'expected an observed site in a plate named "data" at dim=-1, got {list(model.nodes)[1:-1]}'
            )
        for site in sites:
            wanted, got = tuple(site["fn"].batch_shape + site["fn"].event_shape), tuple(site["value"].shape)
            if wanted != got:
                raise ValueError(f"{site['name']}: expected data of shape {wanted}, got {got}")
            whole = isinstance(ordered.source, InMemory) and site["value"] is first[0]
            _check_support(site, ordered if whole else None)


def _check_plates(trace: Any) -> None:
    for site in trace.nodes.values():
        if site["type"] == "sample" and in_data_plate(site) and not site_is_subsample(site):
            dims = {frame.name: frame.dim for frame in site["cond_indep_stack"] if frame.vectorized}
            if dims != {"data": -1}:
                raise ValueError(f'{site["name"]}: expected the plate "data" at dim=-1 alone, got {dims}')


def _check_support(site: Any, batches: Batches | None) -> None:
    """Check a site's own value, or all the data that will come to stand there."""
    support = site["fn"].support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    base = site["fn"]
    while hasattr(base, "base_dist"):
        base = base.base_dist
    name, values, grey = type(base).__name__.removeprefix("Soft"), site["value"], False
    for x in [values] if batches is None else _all_of(batches, len(values)):
        if not support.check(x).all():
            low, high = x.min().item(), x.max().item()
            fit = [n for n in _CANDIDATES if getattr(pyro.distributions, n).support.check(x).all()]
            raise ValueError(
                f"{site['name']}: expected values in the support of the {name} likelihood ({support}), got values from "
                f"{low:g} to {high:g}; of pyro.distributions would fit: {', '.join(fit) or 'none'}"
            )
        grey = grey or (name == "Bernoulli" and not ((x == 0) | (x == 1)).all().item())
    if grey:
        warnings.warn(
            f"{site['name']}: grey values under a Bernoulli are a loss and no likelihood; binarize the data "
            '(data.load(..., binarize="dynamic")), or use a likelihood of pyro.distributions.ContinuousBernoulli',
            stacklevel=4,
        )


def _all_of(batches: Batches, size: int) -> Iterator[Tensor]:
    """All the data in parts of one size (supports may have bounds of the batch's shape); the last one laps over."""
    for start in range(0, batches.num_data, size):
        first = min(start, batches.num_data - size)
        rows = torch.arange(first, first + size, device=batches.device)
        yield batches._inputs(batches.source[rows])[0]


_CANDIDATES = ("Bernoulli", "ContinuousBernoulli", "Poisson", "LogNormal", "Normal")
