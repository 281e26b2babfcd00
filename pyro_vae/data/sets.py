"""Data in memory: compact dtypes, tables, binarization, dequantization."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pyro_vae.data.tables import encode, is_table

__all__ = ["CELLS", "InMemory", "Served", "as_tensor", "check_grid", "check_noise", "check_unit", "to_float"]

BINARIZATIONS = ("dynamic", "static", "threshold", "none")
_PART = 4096  # data that are floats at a time, where all are gone through

# The noise of dequantization takes the midpoints of 2^14 cells. They are odd multiples of 2^-15, never 0 or 1, and
# their sum with a level below 2^9 has 24 binary digits, as many as float32 holds: nothing is rounded to 0 or 1, where
# a density on (0, 1) may be infinite. With torch.rand it would be, which gives 0 itself, and 255 and it may make 256.
CELLS = 2**14
_MAX_BINS = 2**9


class Served(Dataset, Sized):
    """Data of a compact dtype that are served as floats, with what is random in them drawn."""

    x: Any
    event_shape: Any
    columns: tuple[str, ...] | None = None
    categories: dict[str, tuple]

    def __init__(self, binarize: str | None, dequantize: int | None, source: dict | None):
        check_noise(binarize, dequantize)
        self.categories = {}
        self.binarize = None if binarize == "none" else binarize
        self.dequantize = dequantize
        self.redrawn = binarize == "dynamic" or dequantize is not None
        self.source = source

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self):,} data of shape {self.event_shape}, {self.x.dtype})"

    def serve(self, x: Tensor, *y: Tensor) -> tuple[Tensor, ...]:
        """Data of the kept dtype as they are served: as floats, with what is random in them drawn."""
        x = to_float(x)
        return (self._drawn(x) if self.redrawn else x, *y)

    def _drawn(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        if self.dequantize is None:
            return torch.bernoulli(x, generator=generator)
        return self._dequantized(x, torch.randint(CELLS, x.shape, generator=generator, device=x.device))

    def _dequantized(self, x: Tensor, cells: Tensor) -> Tensor:
        bins: Any = self.dequantize
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return ((x * (bins - 1)).round() + (cells.to(x.dtype) + 0.5) / CELLS) / bins

    def _with(self, **changed: Any) -> Any:
        """The same data with some attributes changed."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__, **changed)
        return other


class InMemory(Served):
    r"""Data in memory, kept in the compact dtype that it came in, and served as floats.

    `uint8` holds images and is served divided by 255, unless it is 0 and 1 alone; `bool` is served as 0 and 1; other
    dtypes keep their values. A table's numbers and booleans are served as they are, its text and categories as codes
    0, 1, ... With `dequantize`, grey levels are served as

    .. math:: y = \frac{i + u}{\text{bins}}, \quad u \sim \operatorname{Uniform}(0, 1).

    Args:
        x: Array or tensor of shape `(N, *event_shape)`, or a pandas `DataFrame` of `N` rows.
        y: Labels of length `N`, or None.
        binarize: None or "none"; "dynamic" (drawn anew each time a datum is served); "static" (drawn once from
            `seed`); or "threshold" (`x > 0.5`).
        seed: Seed of the static binarization.
        source: Arguments of `load` that made it, for the record.
        dequantize: Number `bins` of grey levels, 2 to 512, of data on the grid `i / (bins - 1)`; or None. The noise is
            drawn anew each time a datum is served, until `frozen`.

    Attributes:
        columns: Names of a table's columns, or None.
        categories: The values that the codes stand for, of each column of a table that has codes.
        redrawn: Whether values are drawn anew each time that they are served.

    Raises:
        ValueError: If there are no data, NaN or infinity, labels of another length, nothing in [0, 1] to binarize, or
            values off the grid to dequantize.

    Reference:
        Burda, Grosse and Salakhutdinov, 2016. Importance weighted autoencoders (dynamic binarization). Uria, Murray and
        Larochelle, 2013. RNADE: the real-valued neural autoregressive density-estimator; Theis, van den Oord and
        Bethge, 2016. A note on the evaluation of generative models (dequantization).

    Example:
        >>> InMemory(torch.tensor([[0, 255]], dtype=torch.uint8))[torch.tensor([0])]
        tensor([[0., 1.]])
    """

    def __init__(
        self,
        x: Any,
        y: Any = None,
        binarize: str | None = None,
        seed: int = 0,
        source: dict | None = None,
        dequantize: int | None = None,
    ):
        super().__init__(binarize, dequantize, source)
        if is_table(x):
            x, self.columns, self.categories = encode(x)
        self.x = as_tensor(x)
        if self.x.dtype == torch.uint8 and self.x.numel() > 0 and int(self.x.max()) <= 1:
            self.x = self.x.bool()  # 0 and 1 are what they say, and no image that is all but black
        self.y = None if y is None else as_tensor(y)
        if self.x.ndim == 0 or self.x.numel() == 0:
            raise ValueError(f"data: expected at least one datum, got shape {tuple(self.x.shape)}")
        if self.y is not None and len(self.y) != len(self.x):
            raise ValueError(f"data: expected {len(self.x)} labels, one a datum, got {len(self.y)}")
        if self.x.is_floating_point() and not self.x.isfinite().all():
            count = int((~self.x.isfinite()).sum())
            raise ValueError(f"data: expected finite values, got {count} NaN or infinite of {self.x.numel()}")
        if self.binarize is not None:
            self._binarize(seed)
        if dequantize is not None:
            for part in self.x.split(_PART):
                check_grid(part, dequantize)

    def _binarize(self, seed: int) -> None:
        check_unit(self.x)
        if self.binarize == "static":
            self.x = self._drawn_once(seed)
        elif self.binarize == "threshold":
            self.x = torch.cat([to_float(part) > 0.5 for part in self.x.split(_PART)])

    def _drawn_once(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        parts = (self._drawn(to_float(part.cpu()), generator) for part in self.x.split(_PART))
        drawn = torch.cat([part if self.binarize is None else part.bool() for part in parts])
        return drawn.to(self.x.device)

    def frozen(self, seed: int) -> InMemory:
        """The same data with all that is random in them drawn once, by `seed`, so that two evaluations agree.

        Example:
            >>> data = InMemory(torch.ones(3, 2), dequantize=256).frozen(seed=0)
            >>> torch.equal(data[:], data[:])
            True
        """
        if not self.redrawn:
            return self
        return self._with(x=self._drawn_once(seed), binarize=self.binarize and "static", redrawn=False)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: Any) -> Any:
        served = self.serve(*(tensor[index] for tensor in self.tensors))
        return served[0] if self.y is None else served

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The data as they are kept, and the labels, if there are any."""
        return (self.x,) if self.y is None else (self.x, self.y)

    def __getitems__(self, indices: list[int]) -> list[Any]:
        """What a `DataLoader` asks for."""
        return [self[i] for i in indices]

    @property
    def grey(self) -> bool:
        """Whether the values are in [0, 1] and not all at its ends."""
        if self.binarize is not None:
            return False
        if self.dequantize is not None:
            return True
        parts = [to_float(part) for part in self.x.split(_PART)]
        inside = all(bool(((part >= 0) & (part <= 1)).all()) for part in parts)
        return inside and any(bool(((part > 0) & (part < 1)).any()) for part in parts)

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one datum."""
        return tuple(self.x.shape[1:])

    def to(self, device: torch.device) -> InMemory:
        """The same data on a device."""
        return self._with(x=self.x.to(device), y=None if self.y is None else self.y.to(device))

    def loaded(self) -> InMemory:
        """The same data in memory, where these are."""
        return self

    def select(self, rows: Any) -> InMemory:
        """The data of these rows, a slice or a tensor of indices.

        Example:
            >>> len(InMemory(torch.zeros(10, 2)).select(slice(3)))
            3
        """
        return self._with(x=self.x[rows], y=None if self.y is None else self.y[rows])


def check_noise(binarize: str | None, dequantize: int | None) -> None:
    """Check what is asked of the data, before anything is loaded.

    Raises:
        ValueError: If the binarization is unknown, the number of grey levels is not in 2 to 512, or both are asked for.
    """
    if binarize is not None and binarize not in BINARIZATIONS:
        raise ValueError(f"binarize: expected one of {', '.join(BINARIZATIONS)}; got {binarize!r}")
    if dequantize is None:
        return
    if not 2 <= dequantize <= _MAX_BINS:
        raise ValueError(f"dequantize: expected 2 to {_MAX_BINS} grey levels, got {dequantize}")
    if binarize not in (None, "none"):
        raise ValueError(f"expected one of binarize and dequantize, got binarize={binarize!r}, dequantize={dequantize}")


def check_unit(x: Tensor) -> None:
    """Raise `ValueError` unless data to binarize are in [0, 1]."""
    low, high = to_float(x.min()).item(), to_float(x.max()).item()
    if low < 0 or high > 1:
        raise ValueError(f"binarize: expected values in [0, 1], got values from {low:g} to {high:g}")


def check_grid(x: Tensor, bins: int) -> None:
    """Raise `ValueError` unless data to dequantize are on the grid."""
    levels = to_float(x) * (bins - 1)
    off = (levels - levels.round().clamp(0, bins - 1)).abs() > 1e-3  # room for the rounding of i / (bins - 1)
    if off.any():
        value = to_float(x)[off][0].item()
        raise ValueError(f"dequantize: expected values on the grid i / {bins - 1} in [0, 1], got {value:g}")


def as_tensor(x: Any) -> Tensor:
    """A tensor or array of numbers as a tensor.

    Raises:
        ValueError: If it holds something else.

    Example:
        >>> as_tensor([[True, False]])
        tensor([[ True, False]])
    """
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
