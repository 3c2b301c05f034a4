"""Common interface of all layouts: samples of one shape with their parameters, read one after another."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spinlock_fast.data import HDF5Loader
from spinlock_fast.data.packing import read_packing
from spinlock_fast.descriptors.geometry import AXIS_NAMES, Grid
from spinlock_fast.errors import DataError
from spinlock_fast.messages import printable

_OF_STORAGE = ("scale_factor", "add_offset", "missing_value", "valid_min", "valid_max", "actual_range", "NAME", "CLASS")
_UNEVEN = 1e-3  # largest relative difference between steps of coordinates that count as even


@dataclass(frozen=True)
class SampleShape:
    """The shape of a sample [M, T, C, *space], space in the order z, y, x.

    Args:
        realizations: M.
        steps: T.
        channels: names of the channels.
        grid: extents, spacing, periodic axes.
        time_step: time between states.
    """

    realizations: int
    steps: int
    channels: tuple[str, ...]
    grid: Grid
    time_step: float

    def difference(self, other: SampleShape) -> str | None:
        """What differs from another shape, in words; None where nothing does."""
        pairs = [
            ("realizations", self.realizations, other.realizations),
            ("time steps", self.steps, other.steps),
            ("channels", list(self.channels), list(other.channels)),
            ("grid points", list(self.grid.extents), list(other.grid.extents)),
            ("periodic axes", list(self.grid.periodic), list(other.grid.periodic)),
        ]
        for what, mine, its in pairs:
            if mine != its:
                return f"{what} {mine}, not {its}"
        steps = [("time step", self.time_step, other.time_step)]
        steps += [("spacing", a, b) for a, b in zip(self.grid.spacing, other.grid.spacing, strict=True)]
        for what, a, b in steps:
            if not math.isclose(a, b, rel_tol=_UNEVEN):
                return f"{what} {a:g}, not {b:g}"
        return None


class SampleFile(Protocol):
    """The samples of one file."""

    path: Path
    samples: int
    shape: SampleShape
    parameters: Mapping[str, NDArray[np.float64]]
    """Parameters of the simulations: name -> [samples]."""

    def read(self, start: int) -> Iterator[NDArray[np.floating]]:
        """Samples from number `start` on, [M, T, C, *space] each."""


@dataclass(frozen=True)
class TrajectorySet:
    """Samples of one shape in any number of files.

    Args:
        layout: how the files are arranged, in words.
        files: in order.
        notes: what was assumed or left out, one line each.
        given: parameters [N] that the user named; they replace those of the files.
    """

    layout: str
    files: Sequence[SampleFile]
    notes: Sequence[str] = field(default=())
    given: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        first = self.files[0]
        for file in self.files[1:]:
            if difference := file.shape.difference(first.shape):
                raise DataError(f"{file.path}: {difference} as in {first.path}; all files need one shape")
            if missing := sorted(set(first.parameters) ^ set(file.parameters)):
                raise DataError(f"{file.path}: parameter {missing[0]!r} is not in every file ({first.path})")

    @property
    def shape(self) -> SampleShape:
        return self.files[0].shape

    @property
    def samples(self) -> int:
        """N."""
        return sum(file.samples for file in self.files)

    @property
    def parameters(self) -> dict[str, NDArray[np.float64]]:
        """Parameters of all samples: name -> [N]; by name, since the order of HDF5 attributes is not kept."""
        own = {
            name: np.concatenate([file.parameters[name] for file in self.files]) for name in self.files[0].parameters
        }
        both = {**own, **self.given}
        return {name: both[name] for name in sorted(both)}

    @property
    def origins(self) -> list[tuple[str, int]]:
        """File name and number within the file of every sample."""
        return [(str(file.path), i) for file in self.files for i in range(file.samples)]

    def read(self, start: int, stop: int) -> Iterator[NDArray[np.floating]]:
        """Samples start..stop-1, [M, T, C, *space] each."""
        first = 0
        for file in self.files:
            low, high = max(start - first, 0), min(stop - first, file.samples)
            if low < high:
                samples = file.read(low)
                for _ in range(low, high):
                    yield next(samples)
            first += file.samples


def stream_rows(path: Path, datasets: Sequence[str], start: int, memory_budget: int) -> Iterator[dict[str, Tensor]]:
    """Rows of datasets from number `start` on, decoded ahead by the native loader."""
    loader = HDF5Loader([path], list(datasets), batch_size=1, shuffle=False, memory_budget=memory_budget)
    if start:
        loader.load_state_dict({**loader.state_dict(), "batch": start})
    for batch in loader:
        yield {name: batch[name][0] for name in datasets}


def even_step(coordinates: NDArray[np.floating], what: str, path: Path) -> float:
    """The distance of neighbouring coordinates [n]; raises DataError where they are not evenly spaced."""
    values = np.asarray(coordinates, np.float64).ravel()
    if values.size < 2:
        return 1.0
    steps = np.diff(values)
    step = float(steps.mean())
    if not math.isfinite(step) or step == 0.0 or float(np.abs(steps - step).max()) > _UNEVEN * abs(step):
        raise DataError(f"{path}: {what} is not evenly spaced; descriptors need a uniform grid and time step")
    return abs(step)


def read_values(dataset: h5py.Dataset, place: Any = ()) -> NDArray[Any]:
    """Values of a dataset, unpacked by its attributes (CF conventions), as `HDF5Loader` does."""
    packing = read_packing(dataset)
    values: NDArray[Any] = dataset[place]
    return values if packing is None else packing(values)


def numeric_attributes(node: h5py.HLObject) -> dict[str, float]:
    """Attributes of a file, group or dataset that may be parameters of a simulation."""
    return parameters_among(node.attrs)


def parameters_among(attributes: Mapping[str, Any]) -> dict[str, float]:
    """Attributes that are single finite numbers, without those by which netCDF and its readers store arrays."""
    found = {}
    for name, value in attributes.items():
        array = np.asarray(value)
        if name not in _OF_STORAGE and not name.startswith("_") and array.size == 1 and array.dtype.kind in "fiub":
            number = float(array.reshape(()))
            if math.isfinite(number):
                found[printable(name)] = number
    return found


def space_axes(dimensions: int) -> tuple[str, ...]:
    """Names of the space axes in the order in which samples have them."""
    return AXIS_NAMES[dimensions]


def to_array(values: Tensor | NDArray[np.floating]) -> NDArray[np.floating]:
    """Values as a floating-point array that PyTorch accepts: native byte order, at most 64 bits."""
    array = values.numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    if array.dtype.kind != "f":
        return array.astype(np.float32)
    return array.astype(np.float64 if array.dtype.itemsize > 8 else array.dtype.newbyteorder("="), copy=False)
