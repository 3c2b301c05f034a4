"""Plain arrays: a dataset of an HDF5 (or netCDF-4) file, or a `.npy` file, whose axes the user names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from spinlock_fast.data.input_arrays import to_real_tensor
from spinlock_fast.data.input_files import fetched, open_file
from spinlock_fast.errors import ConfigError, DataError
from spinlock_fast.messages import one_line
from spinlock_fast.trajectories.options import Options
from spinlock_fast.trajectories.samples import (
    SampleShape,
    numeric_attributes,
    read_values,
    space_axes,
    stream_rows,
    to_array,
)


@dataclass(frozen=True)
class ArrayFile:
    """The samples of one array; see `samples.SampleFile`."""

    path: Path
    dataset: str | None  # in an HDF5 file; None: a .npy file
    letters: Sequence[str]  # of the axes
    samples: int
    shape: SampleShape
    memory_budget: int
    parameters: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)

    def read(self, start: int) -> Iterator[NDArray[np.floating]]:
        """Samples from number `start` on."""
        letters = list(self.letters)
        if self.dataset is None:
            with fetched(self.path):
                array = np.load(self.path, mmap_mode="r", allow_pickle=False)
            axis = letters.index("n") if "n" in letters else None
            for i in range(start, self.samples):
                yield self._arranged(array if axis is None else np.take(array, i, axis), letters)
        elif letters[0] == "n":
            for row in stream_rows(self.path, [self.dataset], start, self.memory_budget):
                yield self._arranged(to_array(row[self.dataset]), letters)
        else:
            with open_file(self.path) as file:
                dataset = file[self.dataset]
                for i in range(start, self.samples):
                    place = tuple(i if letter == "n" else slice(None) for letter in letters)
                    yield self._arranged(read_values(dataset, place), letters)

    def _arranged(self, values: NDArray[np.floating], letters: Sequence[str]) -> NDArray[np.floating]:
        """One sample, whose axes are `letters` without n, as [M, T, C, *space]."""
        own = [letter for letter in letters if letter != "n"]
        for letter in ("c", "m"):
            if letter not in own:
                values, own = values[None], [letter, *own]
        order = ["m", "t", "c", *space_axes(self.shape.grid.dimensions)]
        return to_array(np.ascontiguousarray(np.transpose(values, [own.index(letter) for letter in order])))


def open_array_file(path: Path, options: Options) -> ArrayFile:
    """The samples of an array of an HDF5 or `.npy` file.

    Raises:
        ConfigError: the axes or the dataset are not named.
        DataError: the file has no such array.
    """
    parameters: dict[str, float] = {}
    if path.suffix == ".npy":
        try:
            with fetched(path):
                array = np.load(path, mmap_mode="r", allow_pickle=False)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or one_line(error)}") from None
        except (ValueError, EOFError):  # NumPy's message recommends to unpickle the file
            raise DataError(f"{path}: cannot be read as .npy: not a whole array of numbers") from None
        dataset, shape, kind = None, array.shape, array.dtype
        if kind.kind not in "fiub":
            to_real_tensor(np.zeros(1, kind), str(path))
    else:
        with open_file(path) as file:
            dataset = options.dataset or _only_array(path, file)
            node = file.get(dataset)
            if not isinstance(node, h5py.Dataset):
                raise DataError(f"{path}: no dataset {dataset!r}; --dataset names the array of the fields")
            shape, kind = node.shape, node.dtype
            parameters = {**numeric_attributes(file), **numeric_attributes(node)}
        if kind.kind not in "fiub":
            raise DataError(f"{path}: {dataset}: expected real numbers, got {kind}")
    return array_file(ArrayFile, path, dataset, shape, parameters, options)


def array_file(
    kind: type[ArrayFile],
    path: Path,
    dataset: str | None,
    shape: Sequence[int],
    parameters: Mapping[str, float],
    options: Options,
) -> ArrayFile:
    """The samples of an array of a shape; raises ConfigError or DataError where its axes do not fit."""
    if options.axes is None:
        raise ConfigError(
            f"--axes: required for plain arrays; name the axes of shape {list(shape)}, for instance --axes 'n t c y x'"
        )
    letters = options.letters(len(shape), f"{path}" if dataset is None else f"{path}: {dataset}")
    size = dict(zip(letters, shape, strict=True))
    space = space_axes(sum(letter in "xyz" for letter in letters))
    if empty := [letter for letter in letters if size[letter] == 0]:
        raise DataError(f"{path}: axis {empty[0]} has length 0")
    if size["t"] < 2:
        raise DataError(f"{path}: axis t has {size['t']} state; at least 2 are needed")
    grid = options.grid([size[axis] for axis in space], path)
    channels = options.channel_names(size.get("c", 1), path)
    found = SampleShape(size.get("m", 1), size["t"], channels, grid, options.time_step or 1.0)
    samples = size.get("n", 1)
    return kind(
        path,
        dataset,
        letters,
        samples,
        found,
        options.memory_budget,
        {name: np.full(samples, value) for name, value in parameters.items()},
    )


def _only_array(path: Path, file: h5py.File) -> str:
    """The only dataset with three or more axes; raises ConfigError if there are several or none."""
    found: list[str] = []

    def visit(name: str, node: object) -> None:
        if isinstance(node, h5py.Dataset) and node.ndim >= 3:
            found.append(name)

    file.visititems(visit)
    if len(found) != 1:
        names = ", ".join(found[:5]) or "none"
        raise ConfigError(f"--dataset: required, {path} has {len(found)} arrays with three or more axes ({names})")
    return found[0]
