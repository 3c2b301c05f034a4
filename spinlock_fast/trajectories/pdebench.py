"""PDEBench (Takamoto et al. 2022): arrays with coordinates, or a group for each sample."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from spinlock_fast.data.input_files import open_file
from spinlock_fast.errors import ConfigError, DataError
from spinlock_fast.messages import printable
from spinlock_fast.trajectories.options import Options
from spinlock_fast.trajectories.samples import (
    SampleShape,
    even_step,
    numeric_attributes,
    read_values,
    stream_rows,
    to_array,
)

_COORDINATES = {"x": "x-coordinate", "y": "y-coordinate", "z": "z-coordinate", "t": "t-coordinate"}
_AXES = ("x", "y", "z")  # of the arrays, after time
_GROUP = re.compile(r"\d+$")
# Numbers with a name in a file name: "1D_Advection_Sols_beta0.4.hdf5", "..._Nu0.01_Rho2.0.hdf5"
_IN_NAME = re.compile(r"(?:^|_)([A-Za-z]+)(-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)(?=_|\.h|$)")


@dataclass(frozen=True)
class BenchFile:
    """The samples of one file; see `samples.SampleFile`."""

    path: Path
    samples: int
    shape: SampleShape
    parameters: Mapping[str, NDArray[np.float64]]
    variables: Sequence[str]  # datasets of all samples [N, T, X(, Y, Z)(, components)]
    groups: Sequence[str]  # or one group a sample, each with `data` [T, X(, Y, Z), C]
    memory_budget: int

    def read(self, start: int) -> Iterator[NDArray[np.floating]]:
        """Samples from number `start` on."""
        if self.groups:
            with open_file(self.path) as file:
                for name in self.groups[start:]:
                    yield self._sample([read_values(file[name]["data"])])
        else:
            for row in stream_rows(self.path, list(self.variables), start, self.memory_budget):
                yield self._sample([to_array(row[name]) for name in self.variables])

    def _sample(self, arrays: Sequence[NDArray[Any]]) -> NDArray[np.floating]:
        d = self.shape.grid.dimensions
        parts = []
        for array in arrays:
            full = array if array.ndim == d + 2 else array[..., None]  # [T, X(, Y, Z), C]
            parts.append(full.transpose(0, d + 1, *range(d, 0, -1)))  # [T, C, (Z, Y,) X]
        return to_array(np.concatenate(parts, 1)[None])


def is_pdebench(file: h5py.File) -> bool:
    """Whether a file has one of these layouts."""
    return bool(_sample_groups(file)) or "x-coordinate" in file or {"velocity", "t"} <= set(file)


def open_pdebench(paths: Sequence[Path], options: Options) -> tuple[list[BenchFile], list[str]]:
    """The samples of files of PDEBench, and notes.

    Raises:
        ConfigError: a field that was asked for does not exist.
        DataError: a file lacks a part of the layout, or its grid is not uniform.
    """
    notes = [] if options.periodic is not None else ["boundaries are not in the files: taken as periodic (--periodic)"]
    return [_open(path, options) for path in paths], notes


def _open(path: Path, options: Options) -> BenchFile:
    with open_file(path) as file:
        try:
            groups = _sample_groups(file)
            return _of_groups(path, file, groups, options) if groups else _of_arrays(path, file, options)
        except (KeyError, ValueError, TypeError, IndexError) as error:
            if isinstance(error, DataError | ConfigError):
                raise
            raise DataError(f"{path}: not in the layout of PDEBench: {' '.join(str(error).split())}") from None


def _sample_groups(file: h5py.File) -> list[str]:
    names = [name for name in file if _GROUP.match(name) and isinstance(file.get(name), h5py.Group)]
    return sorted((name for name in names if "data" in file[name]), key=int)


def _of_groups(path: Path, file: h5py.File, groups: Sequence[str], options: Options) -> BenchFile:
    first = file[groups[0]]
    shape = first["data"].shape
    d = len(shape) - 2
    for name in groups:
        if file[name]["data"].shape != shape:
            raise DataError(f"{path}: {name} has shape {list(file[name]['data'].shape)}, {groups[0]} has {list(shape)}")
    axes = _AXES[:d]
    coordinates = first.get("grid", {})
    spacing = [_step(coordinates, axis, axis, path) for axis in reversed(axes)]
    step = options.time_step or _step(coordinates, "t", "time", path)
    grid = options.grid([shape[1 + _AXES.index(axis)] for axis in reversed(axes)], path, spacing)
    found = SampleShape(1, shape[0], options.channel_names(shape[-1], path), grid, step)
    values = [{**_in_name(path), **numeric_attributes(file), **numeric_attributes(file[name])} for name in groups]
    names = [name for name in values[0] if all(name in value for value in values)]
    parameters = {name: np.array([value[name] for value in values]) for name in names}
    return BenchFile(path, len(groups), found, parameters, (), tuple(groups), options.memory_budget)


def _of_arrays(path: Path, file: h5py.File, options: Options) -> BenchFile:
    known = {*_COORDINATES.values(), "t", "force", "particles" if "velocity" in file else ""}
    names = [n for n in file if isinstance(file[n], h5py.Dataset) and n not in known and file[n].ndim >= 3]
    if options.fields is not None:
        every = [name for name in file if isinstance(file[name], h5py.Dataset)]
        if missing := [name for name in options.fields if name not in every]:
            raise ConfigError(f"--fields: {path} has no field {missing[0]!r}; it has {', '.join(every)}")
        names = list(options.fields)
    if not names:
        raise DataError(f"{path}: no array [N, T, X, ...] was found")
    d = 2 if "velocity" in file else sum(_COORDINATES[axis] in file for axis in _AXES)
    shape = file[names[0]].shape
    if d == 0 or len(shape) < 2 + d:
        raise DataError(f"{path}: {names[0]} has shape {list(shape)}, expected [N, T, X, ...] with its coordinates")
    if different := [name for name in names if file[name].shape[: 2 + d] != shape[: 2 + d]]:
        raise DataError(f"{path}: {different[0]} has shape {list(file[different[0]].shape)}, {names[0]} {list(shape)}")
    axes = _AXES[:d]
    coordinates = {axis: file[_COORDINATES[axis]][()] for axis in (*axes, "t") if _COORDINATES[axis] in file}
    if "t" in file:
        coordinates["t"] = np.asarray(file["t"][()]).reshape(-1, file["t"].shape[-1])[0]
    spacing = [_step(coordinates, axis, axis, path) for axis in reversed(axes)]
    grid = options.grid([shape[2 + _AXES.index(axis)] for axis in reversed(axes)], path, spacing)
    step = options.time_step or _step(coordinates, "t", "time", path)
    channels: list[str] = []
    for name in names:
        width = file[name].shape[2 + d] if file[name].ndim > 2 + d else 1
        shown = printable(name)
        channels += [shown] if width == 1 else [f"{shown}_{axis}" for axis in axes[:width]]
    samples = shape[0]
    given = {**_in_name(path), **numeric_attributes(file)}
    parameters = {name: np.full(samples, value) for name, value in given.items()}
    found = SampleShape(1, shape[1], tuple(channels), grid, step)
    return BenchFile(path, samples, found, parameters, tuple(names), (), options.memory_budget)


def _step(coordinates: Mapping[str, Any], axis: str, what: str, path: Path) -> float:
    return even_step(np.asarray(coordinates[axis]), what, path) if axis in coordinates else 1.0


def _in_name(path: Path) -> dict[str, float]:
    """Parameters that the name of a file carries."""
    return {printable(name): float(value) for name, value in _IN_NAME.findall(path.name)}
