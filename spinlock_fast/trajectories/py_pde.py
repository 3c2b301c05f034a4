"""Files of py-pde's `FileStorage` (Zwicker 2020): one trajectory each."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from spinlock_fast.data.input_files import open_file
from spinlock_fast.errors import DataError
from spinlock_fast.messages import printable
from spinlock_fast.trajectories.options import Options
from spinlock_fast.trajectories.samples import SampleShape, even_step, read_values, space_axes, to_array

_NOT_PARAMETERS = ("controller", "data_length", "field_attributes", "package_version", "solver")
_RANKS = {"ScalarField": 0, "VectorField": 1, "Tensor2Field": 2}


@dataclass(frozen=True)
class PdeFile:
    """The one sample of a file; see `samples.SampleFile`."""

    path: Path
    shape: SampleShape
    parameters: Mapping[str, NDArray[np.float64]]
    samples: int = 1

    def read(self, start: int) -> Iterator[NDArray[np.floating]]:
        """The sample."""
        with open_file(self.path) as file:
            values = read_values(file["data"])
        d = self.shape.grid.dimensions
        values = values.reshape(self.shape.steps, len(self.shape.channels), *values.shape[-d:])
        yield to_array(values.transpose(0, 1, *range(d + 1, 1, -1))[None])


def is_py_pde(file: h5py.File) -> bool:
    """Whether a file has this layout."""
    return "field_attributes" in file.attrs and {"data", "times"} <= set(file)


def open_py_pde(paths: Sequence[Path], options: Options) -> tuple[list[PdeFile], list[str]]:
    """The samples of files of py-pde, and notes.

    Raises:
        DataError: a file lacks a part of the layout, its grid is not Cartesian, or states are not evenly spaced.
    """
    return [_open(path, options) for path in paths], []


def _open(path: Path, options: Options) -> PdeFile:
    with open_file(path) as file:
        try:
            attributes = json.loads(file.attrs["field_attributes"])
            fields = _fields(attributes)
            grid_info = json.loads(fields[0]["grid"])
            if grid_info["class"] not in ("CartesianGrid", "UnitGrid"):
                raise DataError(f"{path}: {grid_info['class']} is not supported, only Cartesian grids")
            data = file["data"]
            if data.dtype.kind not in "fiub":
                raise DataError(f"{path}: data: expected real numbers, got {data.dtype}")
            extents = [int(n) for n in grid_info["shape"]]
            bounds = grid_info.get("bounds") or [[0.0, float(n)] for n in extents]
            d = len(extents)
            spacing = [(high - low) / n for (low, high), n in zip(bounds, extents, strict=True)]
            periodic = grid_info.get("periodic", [False] * d)
            periodic = [periodic] * d if isinstance(periodic, bool) else periodic
            grid = options.grid(extents[::-1], path, spacing[::-1], periodic[::-1])
            channels = _channels(fields, list(reversed(space_axes(d))))
            step = options.time_step or even_step(file["times"][()], "times", path)
            shape = SampleShape(1, data.shape[0], channels, grid, step)
            if data.size != data.shape[0] * len(channels) * grid.points:
                raise DataError(f"{path}: data has shape {list(data.shape)}, which does not fit its fields and grid")
            return PdeFile(path, shape, _parameters(file))
        except (KeyError, ValueError, TypeError, IndexError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{path}: not a file of py-pde: {' '.join(str(error).split())}") from None


def _fields(attributes: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Attributes of each field; values are JSON once more."""
    if json.loads(attributes["class"]) != "FieldCollection":
        return [dict(attributes)]
    fields: list[dict[str, Any]] = json.loads(attributes["fields"])
    return fields


def _channels(fields: Sequence[Mapping[str, Any]], axes: Sequence[str]) -> tuple[str, ...]:
    channels: list[str] = []
    for i, field in enumerate(fields):
        rank = _RANKS[json.loads(field["class"])]
        label = json.loads(field.get("label", "null"))
        name = printable(label or (f"field_{i}" if len(fields) > 1 else "field"))
        parts = [name]
        for _ in range(rank):
            parts = [f"{part}_{axis}" for part in parts for axis in axes]
        channels += parts
    return tuple(channels)


def _parameters(file: h5py.File) -> dict[str, NDArray[np.float64]]:
    """Numbers of the storage's `info`."""
    found = {}
    for name, text in file.attrs.items():
        if name in _NOT_PARAMETERS:
            continue
        try:
            value = json.loads(text) if isinstance(text, str) else text
        except ValueError:
            continue
        if isinstance(value, (bool, int, float)):
            found[printable(name)] = np.array([float(value)])
    return found
