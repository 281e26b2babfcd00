"""Data in files that may be larger than memory: NumPy's memory maps and Zarr arrays."""

from __future__ import annotations

import itertools
import sys
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.data.sets import CELLS, InMemory, Served, as_tensor, check_grid, check_unit, to_float

__all__ = ["OnDisk", "is_on_disk"]

# What is shuffled at a time where a file is read in blocks: large enough to mix the blocks of many places, small
# enough to be held twice, once in use and once being read.
_WINDOW = 2**26  # bytes
_BLOCKS = 64  # in a window, of about 1 MiB, which a disk reads as fast as it reads at all
_WHOLE = 2**34  # bytes of a memory map that is shuffled whole, as the system's page cache mostly holds it
_PART = 2**20  # bytes that are read at once of such a one
_LOOKED_AT = 64  # data, from all over the file, that tell images of 0 and 1 from grey ones


class OnDisk(Served):
    r"""Data in a file, of which only the rows of a few batches are in memory at any time.

    They are served as those of `InMemory` are. What cannot be known without reading all of them raises when the part
    that holds it is read: NaN and infinity, values that cannot be binarized or dequantized, and grey levels of `uint8`
    where all of 64 data looked at are 0 and 1. What suits the file may still not suit a program: `Batches` that `check`
    was given test values and exposures as they are read.

    A memory map of up to 16 GiB is shuffled whole. A larger one, and a Zarr array of more than a window, is shuffled
    in blocks: blocks of neighbouring rows (whole chunks of Zarr, about 1 MiB) are put in a random order, and all rows
    are shuffled within each window of that order, of 64 MiB and at least four chunks. A file is then read once an
    epoch, in long stretches.

    Args:
        x: Memory map or Zarr array of shape `(N, *event_shape)`.
        y: Labels of length `N`, an array in memory or on disk, or None.
        binarize: None or "none", "dynamic", "static" or "threshold"; see `InMemory`.
        seed: Seed of the static binarization, which gives each datum noise of its own, whatever is read with it.
        source: Arguments of `load` that made it, for the record.
        dequantize: Number of grey levels, or None; see `InMemory`.
        event_shape: Shape of one datum where it is not that of the file.
        window: Data that are shuffled at a time; None for the above.

    Raises:
        ValueError: If there are no data, no numbers, labels of another length, or no data in a window.

    Reference:
        Steele, Lea and Flood, 2014. Fast splittable pseudorandom number generators (the noise of each datum).

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile(suffix=".npy") as file:
        ...     np.save(file.name, np.array([[0, 51], [255, 0]], dtype="uint8"))
        ...     OnDisk(np.load(file.name, mmap_mode="r"))[1]
        tensor([1., 0.])
    """

    def __init__(
        self,
        x: Any,
        y: Any = None,
        binarize: str | None = None,
        seed: int = 0,
        source: dict | None = None,
        dequantize: int | None = None,
        *,
        event_shape: tuple[int, ...] | None = None,
        window: int | None = None,
    ):
        super().__init__(binarize, dequantize, source)
        if window is not None and (not isinstance(window, Integral) or window < 1):
            raise ValueError(f"window: expected a whole number of data, 1 or more, got {window!r}")
        self.x, self.window = x, window
        self.y = y if y is None or is_on_disk(y) else as_tensor(y).numpy()
        self.noise_seed = seed if binarize == "static" else None
        self.rows: Tensor | None = None
        self.event_shape = tuple(x.shape[1:]) if event_shape is None else event_shape
        if 0 in x.shape or not x.shape:
            raise ValueError(f"data: expected at least one datum, got shape {tuple(x.shape)}")
        if x.dtype.kind not in "buif":
            raise ValueError(f"data: expected an array of numbers, got dtype {x.dtype}")
        if self.y is not None and self.y.shape[0] != x.shape[0]:
            raise ValueError(f"data: expected {x.shape[0]} labels, one a datum, got {self.y.shape[0]}")
        self._look()

    def _look(self) -> None:
        """Whether some of the data are 0 and 1 alone, and whether they are grey."""
        rows = np.unique(np.linspace(0, self.x.shape[0] - 1, _LOOKED_AT).astype(np.int64))
        some = as_tensor(_taken(self.x, rows))
        self.bits = some.dtype == torch.uint8 and int(some.max()) <= 1
        values = some.bool() if self.bits else to_float(some)
        unit = bool(((values >= 0) & (values <= 1)).all())
        inside = unit and bool(((values > 0) & (values < 1)).any())
        self.grey = self.binarize is None and (self.dequantize is not None or inside)

    def _datum(self) -> int:
        """Bytes of a datum."""
        return int(np.prod(self.x.shape[1:], dtype=np.int64)) * self.x.dtype.itemsize

    def __len__(self) -> int:
        return self.x.shape[0] if self.rows is None else len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        places = torch.as_tensor(range(len(self))[index]) if isinstance(index, int) else torch.arange(len(self))[index]
        served = self.serve(*self.read(places.reshape(-1)))
        served = served if places.ndim else tuple(tensor[0] for tensor in served)
        return served[0] if self.y is None else served

    def __getitems__(self, indices: list[int]) -> list[Any]:
        """What a `DataLoader` asks for."""
        served = self[torch.tensor(indices)]
        return list(served) if self.y is None else list(zip(*served, strict=True))

    def read(self, places: Tensor, num: int = 2) -> tuple[Tensor, ...]:
        """The data at these places, and their labels where `num` is more than 1, in the dtype that they are kept in.

        Raises:
            ValueError: If the data are not what all data must be.
        """
        rows = (places if self.rows is None else self.rows[places]).numpy()
        x = as_tensor(_taken(self.x, rows)).reshape(-1, *self.event_shape)
        kept = self._kept(x, rows)
        return (kept,) if self.y is None or num < 2 else (kept, as_tensor(_taken(self.y, rows)))

    def _kept(self, x: Tensor, rows: np.ndarray) -> Tensor:
        if x.is_floating_point() and not (finite := x.isfinite().reshape(len(x), -1).all(1)).all():
            raise ValueError(f"data: expected finite values, got NaN or infinity in datum {rows[~finite.numpy()][0]}")
        if self.bits:
            if x.max() > 1:
                raise ValueError(f"data: expected 0 and 1, as in {_LOOKED_AT} data looked at, got {int(x.max())}")
            x = x.bool()
        if self.dequantize is not None:
            check_grid(x, self.dequantize)
        if self.binarize is not None and x.dtype not in (torch.uint8, torch.bool):
            check_unit(x)
        if self.binarize == "threshold":
            return to_float(x) > 0.5
        return x if self.noise_seed is None else self._drawn_by_row(x, rows, self.noise_seed)

    def _drawn_by_row(self, x: Tensor, rows: np.ndarray, seed: int) -> Tensor:
        """Data with noise that is each row's own, so that it does not matter what else is read."""
        cells = _noise(rows, x[0].numel(), seed)
        if self.dequantize is not None:
            return self._dequantized(to_float(x), torch.from_numpy((cells % CELLS).astype(np.int64)).reshape(x.shape))
        uniform = torch.from_numpy((cells >> np.uint64(40)).astype(np.float32)).reshape(x.shape) / 2**24
        return uniform < to_float(x)

    def frozen(self, seed: int) -> OnDisk:
        """The same data with all that is random in them fixed by `seed`, so that two evaluations agree."""
        if not self.redrawn:
            return self
        return self._with(redrawn=False, noise_seed=seed, binarize=self.binarize and "static")

    def loaded(self) -> InMemory:
        """The same data in memory, for what is small enough.

        Raises:
            ValueError: If they are not what `InMemory` takes.
        """
        x, *y = self.read(torch.arange(len(self)))
        data = InMemory(x, y[0] if y else None, source=self.source)
        # x as well: whether bytes are 0 and 1 or grey levels was decided by the whole file.
        return data._with(x=x, binarize=self.binarize, dequantize=self.dequantize, redrawn=self.redrawn)

    def select(self, rows: Any) -> OnDisk:
        """The data of these rows, a slice or a tensor of indices, of which only the indices are kept."""
        return self._with(rows=(torch.arange(self.x.shape[0]) if self.rows is None else self.rows)[rows])

    def part(self, batch_size: int, shuffled: bool) -> int:
        """Data to read at once, whole batches of them."""
        size = _PART // self._datum()
        if shuffled and self._window() < len(self):
            size = self._window()
        elif chunk := self._chunk():
            size = max(size, len(self) if shuffled else chunk)
        return max(1, size // batch_size) * batch_size

    def order(self, generator: torch.Generator, batch_size: int) -> Tensor:
        """All places in a random order, that of blocks and within each window of them."""
        if self._window() >= len(self):
            return torch.randperm(len(self), generator=generator)
        block = -(-self._window() // _BLOCKS)
        if chunk := self._chunk():
            block = -(-block // chunk) * chunk
        rows = torch.arange(len(self)) if self.rows is None else self.rows
        blocks = torch.arange(len(self)).split((rows // block).unique_consecutive(return_counts=True)[1].tolist())
        mixed = torch.cat([blocks[i] for i in torch.randperm(len(blocks), generator=generator)])
        windows = mixed.split(self.part(batch_size, shuffled=True))
        return torch.cat([window[torch.randperm(len(window), generator=generator)] for window in windows])

    def _chunk(self) -> int:
        """Rows of a chunk, 0 of what is not chunked."""
        return self.x.chunks[0] if hasattr(self.x, "chunks") else 0

    def _window(self) -> int:
        if self.window is not None:
            return self.window
        if not self._chunk() and len(self) * self._datum() <= _WHOLE:
            return len(self)
        return max(_WINDOW // self._datum(), 4 * self._chunk(), 1)


def is_on_disk(x: Any) -> bool:
    """Whether `x` is a memory map or a Zarr array.

    Example:
        >>> is_on_disk(np.zeros((3, 2)))
        False
    """
    zarr = sys.modules.get("zarr")  # who has such an array has imported it, and nobody else should pay for that
    return isinstance(x, np.memmap) or (zarr is not None and isinstance(x, zarr.Array))


def _taken(array: Any, rows: np.ndarray) -> np.ndarray:
    """Rows of an array, in memory of their own."""
    if not hasattr(array, "chunks"):
        return np.asarray(np.take(array, rows, axis=0))
    order = rows.argsort(kind="stable")
    taken = _by_chunk(array, rows[order])
    return taken if (order[:-1] < order[1:]).all() else taken[order.argsort()]


def _by_chunk(array: Any, rows: np.ndarray) -> np.ndarray:
    """Rows of a chunked array, in rising order: of neighbouring chunks, 1 MiB at a time, the stretch that they span.

    That costs half of what Zarr's own indexing by rows does, which looks at each row.
    """
    taken = np.empty((len(rows), *array.shape[1:]), array.dtype)
    chunk = array.chunks[0]
    stretch = max(1, _PART // max(1, chunk * taken[:1].nbytes)) * chunk
    apart = (np.diff(rows // chunk, prepend=-2) > 1) | (np.diff(rows // stretch, prepend=-1) > 0)
    starts = np.flatnonzero(apart)
    for start, end in itertools.pairwise([*starts.tolist(), len(rows)]):
        first, last = int(rows[start]), int(rows[end - 1])
        taken[start:end] = array[first : last + 1][rows[start:end] - first]
    return taken


def _noise(rows: np.ndarray, size: int, seed: int) -> np.ndarray:
    """64 random bits for each value of each row, a function of row, place and seed alone (SplitMix64)."""
    start = np.random.SeedSequence(seed % 2**64).generate_state(1, np.uint64)  # torch's seeds may be below 0
    bits: np.ndarray = rows.astype(np.uint64)[:, None] * np.uint64(size) + np.arange(1, size + 1, dtype=np.uint64)
    bits = bits * np.uint64(0x9E3779B97F4A7C15) + start
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))
