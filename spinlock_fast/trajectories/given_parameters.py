"""Parameters of simulations that the user names: a CSV or `.npy` file, or a dataset of the files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from spinlock_fast.data.csv_table import read_csv
from spinlock_fast.data.input_files import fetched, open_file
from spinlock_fast.errors import DataError
from spinlock_fast.messages import one_line, printable
from spinlock_fast.trajectories.samples import read_values

Columns = dict[str, NDArray[np.float64]]


def read_given_parameters(name: str, files: Sequence[Path], samples: Sequence[int]) -> Columns:
    """Parameters of all samples: name -> [N].

    Args:
        name: a CSV file with names in its first line, or a `.npy` array [N] or [N, P], with a row for each sample of
            all files in order; else the path of a dataset [n] or [n, P] in every file of n samples, whose columns have
            the names in its attribute `feature_names`.
        files: HDF5 files of trajectories.
        samples: of each file.

    Raises:
        DataError: the file or dataset is missing, not of finite numbers, or has another number of rows.
    """
    total = sum(samples)
    if name.lower().endswith(".csv"):
        columns = _of_csv(Path(name))
    elif name.lower().endswith(".npy"):
        columns = _of_npy(Path(name))
    else:
        parts = [_of_dataset(name, file, count) for file, count in zip(files, samples, strict=True)]
        for file, part in zip(files, parts, strict=True):
            if part.keys() != parts[0].keys():
                raise DataError(f"{file}: {name} has columns {', '.join(part)}, not {', '.join(parts[0])}")
        columns = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    for key, values in columns.items():
        if len(values) != total:
            raise DataError(f"{name}: has {len(values)} rows for {total} trajectories")
        if not np.isfinite(values).all():
            row = int(np.argmin(np.isfinite(values)))
            raise DataError(f"{name}: {key}: row {row} is not a finite number")
    return columns


def _of_csv(path: Path) -> Columns:
    table = read_csv(path)
    if "" in table.names:
        number = table.names.index("") + 1
        raise DataError(f"{path}: column {number} has no name; an index of pandas? to_csv(..., index=False) omits it")
    try:
        return {printable(name): np.array(table.numbers(name)) for name in table.names}
    except DataError as error:
        hint = "; `analyze --conditions` takes texts" if "expected a number" in str(error) else ""
        raise DataError(f"{error}{hint}") from None


def _of_npy(path: Path) -> Columns:
    try:
        with fetched(path):
            values = np.load(path, allow_pickle=False)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or one_line(error)}") from None
    except (ValueError, EOFError):  # NumPy's message recommends to unpickle the file
        raise DataError(f"{path}: cannot be read as .npy: not a whole array of numbers") from None
    return _columns(values, str(path), [])


def _of_dataset(name: str, path: Path, samples: int) -> Columns:
    if not h5py.is_hdf5(path):
        raise DataError(f"--parameters: {name}: {path} has no datasets; name a .csv or .npy file")
    with open_file(path) as file:
        dataset = file.get(name)
        if not isinstance(dataset, h5py.Dataset):
            raise DataError(f"{path}: no dataset {name!r}; --parameters names a dataset, a .csv or a .npy file")
        found = dataset.attrs.get("feature_names", ())
        names = [value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value) for value in found]
        columns = _columns(read_values(dataset), f"{path}: {name}", names)
    if columns and len(next(iter(columns.values()))) != samples:
        raise DataError(f"{path}: {name} has {len(next(iter(columns.values())))} rows for {samples} trajectories")
    return columns


def _columns(values: Any, where: str, names: Sequence[str]) -> Columns:
    """The columns of an array [N] or [N, P]."""
    if not isinstance(values, np.ndarray) or values.ndim not in (1, 2) or values.dtype.kind not in "fiub":
        found = f"{values.dtype} {list(values.shape)}" if isinstance(values, np.ndarray) else type(values).__name__
        raise DataError(f"{where}: expected numbers [N] or [N, P], got {found}")
    table = values.reshape(len(values), -1).astype(np.float64)
    if len(names) != table.shape[1] or len(set(names)) < len(names):
        leaf = where.rpartition(": ")[2].rpartition("/")[2].removesuffix(".npy")
        names = [leaf] if table.shape[1] == 1 else [f"{leaf}_{i}" for i in range(table.shape[1])]
    return {printable(name): column for name, column in zip(names, table.T, strict=True)}
