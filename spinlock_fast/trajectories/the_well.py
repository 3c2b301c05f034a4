"""The Well: one HDF5 file for each parameter set and split (Ohana et al. 2024)."""

from __future__ import annotations

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
from spinlock_fast.trajectories.samples import SampleShape, even_step, read_values, space_axes, stream_rows, to_array

_GROUPS = ("t0_fields", "t1_fields", "t2_fields")  # scalars, vectors, tensors


@dataclass(frozen=True)
class _Field:
    """A field that changes in time."""

    path: str
    order: int  # 0 scalar, 1 vector, 2 tensor
    components: tuple[tuple[int, ...], ...]
    varies: tuple[bool, ...]  # along each space axis of the file
    per_sample: bool


@dataclass(frozen=True)
class WellFile:
    """The samples of one file; see `samples.SampleFile`."""

    path: Path
    samples: int
    shape: SampleShape
    parameters: Mapping[str, NDArray[np.float64]]
    fields: Sequence[_Field]
    axes: Sequence[str]  # of the file
    memory_budget: int

    def read(self, start: int) -> Iterator[NDArray[np.floating]]:
        """Samples from number `start` on."""
        common = [field for field in self.fields if not field.per_sample]
        fixed: dict[str, NDArray[Any]] = {}
        if common:
            with open_file(self.path) as file:
                fixed = {field.path: read_values(file[field.path]) for field in common}
        streamed = [field.path for field in self.fields if field.per_sample]
        rows: Iterator[Mapping[str, Any]] = (
            stream_rows(self.path, streamed, start, self.memory_budget)
            if streamed
            else iter([{}] * (self.samples - start))
        )
        for row in rows:
            yield self._sample({**fixed, **{path: to_array(values) for path, values in row.items()}})

    def _sample(self, values: Mapping[str, NDArray[Any]]) -> NDArray[np.floating]:
        own = list(self.axes)
        order = [own.index(axis) for axis in space_axes(len(own))]
        extents = [self.shape.grid.extents[space_axes(len(own)).index(axis)] for axis in own]
        channels = []
        for field in self.fields:
            array = values[field.path]  # [T, *space that varies, *components]
            present = iter(array.shape[1 : array.ndim - field.order])
            full = [next(present) if varies else 1 for varies in field.varies]
            array = array.reshape(array.shape[0], *full, *array.shape[array.ndim - field.order :])
            for component in field.components:
                place: tuple[Any, ...] = (..., *component)
                one = np.broadcast_to(array[place], (array.shape[0], *extents))
                channels.append(one.transpose(0, *(1 + axis for axis in order)))
        return to_array(np.stack(channels, 1)[None])  # [1, T, C, *space]


def is_well(file: h5py.File) -> bool:
    """Whether a file has this layout."""
    return "n_trajectories" in file.attrs and "dimensions" in file and any(group in file for group in _GROUPS)


def open_well(paths: Sequence[Path], options: Options) -> tuple[list[WellFile], list[str]]:
    """The samples of files of The Well, and notes on what was left out.

    Raises:
        ConfigError: a field that was asked for does not exist.
        DataError: a file lacks a part of the layout, or its grid is not uniform.
    """
    notes: list[str] = []
    return [_open(path, options, notes) for path in paths], list(dict.fromkeys(notes))


def _open(path: Path, options: Options, notes: list[str]) -> WellFile:
    with open_file(path) as file:
        try:
            return _read_header(path, file, options, notes)
        except (KeyError, ValueError, TypeError) as error:
            if isinstance(error, DataError | ConfigError):
                raise
            text = " ".join(str(error).split())
            raise DataError(f"{path}: not in the layout of The Well: {text}") from None


def _read_header(path: Path, file: h5py.File, options: Options, notes: list[str]) -> WellFile:
    samples = int(file.attrs["n_trajectories"])
    if str(_text(file.attrs.get("grid_type", "cartesian"))) != "cartesian":
        raise DataError(f"{path}: grid_type is {_text(file.attrs['grid_type'])!r}; descriptors need a cartesian grid")
    dimensions = file["dimensions"]
    axes = [_text(name) for name in dimensions.attrs["spatial_dims"]]
    if set(axes) != set(space_axes(len(axes))):
        axes = [dict(zip(axes, ("x", "y", "z"), strict=False))[axis] for axis in axes]
    names = [_text(name) for name in dimensions.attrs["spatial_dims"]]
    spacing = {axis: even_step(_first(dimensions[name]), name, path) for axis, name in zip(axes, names, strict=True)}
    time = _first(dimensions["time"])
    extents = {axis: int(_first(dimensions[name]).size) for axis, name in zip(axes, names, strict=True)}
    sizes = [extents[axis] for axis in axes]
    fields, channels = _fields(path, file, axes, (samples, int(time.size), sizes), options, notes)
    periodic = _periodic(file, dict(zip(names, axes, strict=True)))
    order = space_axes(len(axes))
    grid = options.grid(
        [extents[axis] for axis in order], path, [spacing[axis] for axis in order], [axis in periodic for axis in order]
    )
    steps = int(time.size)
    step = options.time_step or even_step(time, "time", path)
    shape = SampleShape(1, steps, tuple(channels), grid, step)
    return WellFile(path, samples, shape, _parameters(path, file, samples, notes), fields, axes, options.memory_budget)


def _fields(
    path: Path,
    file: h5py.File,
    axes: Sequence[str],
    sizes: tuple[int, int, Sequence[int]],
    options: Options,
    notes: list[str],
) -> tuple[list[_Field], list[str]]:
    """Fields that change in time, and the names of their channels; `sizes` are samples, steps and extents."""
    d, found, channels, every = len(axes), [], [], []
    for order, group in enumerate(_GROUPS):
        if group not in file:
            continue
        for name in map(_text, file[group].attrs["field_names"]):
            dataset = file[group][name]
            every.append(name)
            if options.fields is not None and name not in options.fields:
                continue
            if not dataset.attrs["time_varying"]:
                notes.append(f"{name} does not change in time: left out")
                continue
            components = _components(order, d, dataset)
            varies = tuple(bool(value) for value in dataset.attrs["dim_varying"])
            per_sample = bool(dataset.attrs["sample_varying"])
            samples, steps, extents = sizes
            varied = [n for n, is_varying in zip(extents, varies, strict=True) if is_varying]
            expected = (*[samples] * per_sample, steps, *varied, *[d] * order)
            if dataset.shape != expected:
                shown = f"{printable(name)} has shape {list(dataset.shape)}, expected {list(expected)}"
                raise DataError(f"{path}: {group}/{shown} by its header")
            found.append(_Field(f"{group}/{name}", order, components, varies, per_sample))
            letters = [axes[i] for i in range(d)]
            channels += [printable(name) + "".join(f"_{letters[i]}" for i in part) for part in components]
    for name in options.fields or ():
        if name not in every:
            raise ConfigError(f"--fields: {path} has no field {name!r}; it has {', '.join(every)}")
    if not found:
        raise DataError(f"{path}: no field that changes in time")
    return found, channels


def _components(order: int, d: int, dataset: h5py.Dataset) -> tuple[tuple[int, ...], ...]:
    """Independent components: of a symmetric tensor those on and above the diagonal."""
    if order == 0:
        return ((),)
    if order == 1:
        return tuple((i,) for i in range(d))
    symmetric, antisymmetric = (bool(dataset.attrs.get(name, False)) for name in ("symmetric", "antisymmetric"))
    least = 1 if antisymmetric else 0
    half = symmetric or antisymmetric
    return tuple((i, j) for i in range(d) for j in range(d) if not half or j >= i + least)


def _periodic(file: h5py.File, axes: Mapping[str, str]) -> set[str]:
    found: set[str] = set()
    for group in file.get("boundary_conditions", {}).values():
        if _text(group.attrs["bc_type"]).lower() == "periodic":
            found |= {axes[_text(name)] for name in group.attrs["associated_dims"] if _text(name) in axes}
    return found


def _parameters(path: Path, file: h5py.File, samples: int, notes: list[str]) -> dict[str, NDArray[np.float64]]:
    """`simulation_parameters`, and scalars that do not change in time."""
    found = {}
    for name in map(_text, file.attrs.get("simulation_parameters", ())):
        value = np.asarray(file.attrs.get(name, np.nan))
        if value.size == 1 and value.dtype.kind in "fiub":
            found[printable(name)] = np.full(samples, float(value.reshape(())))
        else:
            notes.append(f"parameter {printable(name)} is not a number: left out")
    scalars = file.get("scalars")
    for name in map(_text, scalars.attrs.get("field_names", ())) if scalars is not None else ():
        dataset = scalars[name]
        if dataset.attrs["time_varying"]:
            notes.append(f"scalar {printable(name)} changes in time: left out")
        else:
            values = np.asarray(dataset[()], np.float64).reshape(-1)
            if values.size not in (1, samples):
                raise DataError(f"{path}: scalar {printable(name)} has {values.size} values for {samples} trajectories")
            found[printable(name)] = np.broadcast_to(values, (samples,)).copy()
    return found


def _first(dataset: h5py.Dataset) -> NDArray[Any]:
    """Coordinates [n]; those of the first sample where each has its own."""
    values = np.asarray(dataset[()])
    return values.reshape(-1, values.shape[-1])[0] if values.ndim else values.reshape(1)


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
