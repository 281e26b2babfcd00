"""Where draws go, chunk by chunk: into memory, a NetCDF file or a Zarr store."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["WRITERS", "Memory", "Variables", "tree"]

Variables = dict[str, tuple[tuple[str, ...], np.ndarray, dict[str, str]]]
"""Variables and coordinates of a group by name: dimensions, values, attributes."""


def tree(groups: Mapping[str, Variables], attributes: Mapping[str, Any]) -> xr.DataTree:
    """A tree of groups.

    Example:
        >>> tree({"posterior": {"m": (("draw",), np.zeros(3), {})}}, {}).posterior.m.shape
        (3,)
    """
    import xarray as xr

    datasets = {name: xr.Dataset(variables) for name, variables in groups.items()}
    return xr.DataTree.from_dict({"/": xr.Dataset(attrs=dict(attributes)), **datasets})


class Memory:
    """Chunks side by side in arrays that are allocated once, so that none is held twice.

    Args:
        num_data: Number of data to make room for.

    Example:
        >>> memory = Memory(3)
        >>> for i in range(3):
        ...     memory.take({"observed_data": {"x": (("datum",), np.array([i]), {})}}, slice(i, i + 1))
        >>> memory.groups()["observed_data"]["x"][1]
        array([0, 1, 2])
    """

    def __init__(self, num_data: int):
        self.num_data, self.stop = num_data, 0
        self._groups: dict[str, Variables] = {}

    def take(self, groups: Mapping[str, Variables], rows: slice) -> None:
        """Copy a chunk to its rows."""
        if not self._groups:
            self._groups = {name: self._allocated(variables) for name, variables in groups.items()}
        for group, variables in groups.items():
            for name, (dims, values, _) in variables.items():
                if "datum" in dims:
                    self._groups[group][name][1][_index(dims, rows)] = values
        self.stop = rows.stop

    def groups(self) -> dict[str, Variables]:
        """All groups, of the rows that came (a loader may leave some out)."""
        rows = slice(self.stop)
        return {
            group: {
                name: (dims, values[_index(dims, rows)], attrs) for name, (dims, values, attrs) in variables.items()
            }
            for group, variables in self._groups.items()
        }

    def _allocated(self, variables: Variables) -> Variables:
        return {
            name: (dims, np.empty(self._shape(dims, values), values.dtype) if "datum" in dims else values, attributes)
            for name, (dims, values, attributes) in variables.items()
        }

    def _shape(self, dims: tuple[str, ...], values: np.ndarray) -> list[int]:
        return [self.num_data if dim == "datum" else size for dim, size in zip(dims, values.shape, strict=True)]


class _NetCDF:
    """A NetCDF file that grows along `datum`."""

    def __init__(self, path: Path, attributes: Mapping[str, Any]):
        self.path = path
        tree({}, attributes).to_netcdf(path, engine="h5netcdf")

    def take(self, groups: Mapping[str, Variables], rows: slice) -> None:
        """Write a chunk to its rows."""
        if rows.start == 0:
            for group, dataset in tree(groups, {}).children.items():
                unlimited = ["datum"] if "datum" in dataset.dims else []
                dataset.to_dataset().to_netcdf(
                    self.path, mode="a", group=group, engine="h5netcdf", unlimited_dims=unlimited
                )
        else:
            self._append(groups, rows)

    def _append(self, groups: Mapping[str, Variables], rows: slice) -> None:
        """What xarray cannot do with NetCDF."""
        import h5netcdf  # type: ignore[import-untyped]

        with h5netcdf.File(self.path, "a") as file:
            for group, variables in groups.items():
                grown = {name: part for name, part in variables.items() if "datum" in part[0]}
                if grown:
                    file[group].resize_dimension("datum", rows.stop)
                for name, (dims, values, _) in grown.items():
                    text = values.dtype.kind == "U"
                    file[group].variables[name][_index(dims, rows)] = values.astype(object) if text else values

    def close(self) -> None:
        """Nothing is left to do."""


class _Zarr:
    """A Zarr store that grows along `datum`, with a chunk of its own for each that comes.

    Its format is 2: that has a specification for text, and all readers know it.
    """

    def __init__(self, path: Path, attributes: Mapping[str, Any]):
        self.path = path
        self.options: dict[str, Any] = {"zarr_format": 2, "consolidated": False}
        tree({}, attributes).to_dataset().to_zarr(path, mode="w", **self.options)

    def take(self, groups: Mapping[str, Variables], rows: slice) -> None:
        """Write a chunk to its rows."""
        for group, node in tree(groups, {}).children.items():
            dataset = node.to_dataset()
            if rows.start == 0:
                encoding = {name: {"chunks": variable.shape} for name, variable in dataset.data_vars.items()}
                dataset.to_zarr(self.path, group=group, mode="a", encoding=encoding, **self.options)
            elif "datum" in dataset.dims:
                fixed = [name for name, variable in dataset.variables.items() if "datum" not in variable.dims]
                dataset = dataset.drop_vars(fixed)
                dataset.to_zarr(self.path, group=group, mode="a", append_dim="datum", **self.options)

    def close(self) -> None:
        """Gather what describes the arrays, so that readers find it at once."""
        import zarr

        zarr.consolidate_metadata(self.path, zarr_format=2)


WRITERS: dict[str, Any] = {".nc": _NetCDF, ".zarr": _Zarr}


def _index(dims: tuple[str, ...], rows: slice) -> tuple[slice, ...]:
    return tuple(rows if dim == "datum" else slice(None) for dim in dims)
