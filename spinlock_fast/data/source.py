"""Rows of HDF5 datasets, over one file or many shards of it."""

from __future__ import annotations

import difflib
import glob
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from spinlock_fast.errors import DataError

_GLOB = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class DatasetInfo:
    """One dataset over all shards."""

    path: str
    rows: int
    row_shape: tuple[int, ...]  # (D,) or (T, D)
    chunk_rows: int  # rows that are stored, and so decoded, together; 1 where not chunked

    @property
    def row_bytes(self) -> int:
        """Bytes of a row as float32."""
        return 4 * int(np.prod(self.row_shape))


class Source:
    """Named datasets with a common number of rows; a context manager that holds the files open.

    Args:
        paths: a file, a glob, or a list of those. The shards of a glob follow each other in natural
            order (shard_10 after shard_9).
        datasets: dataset path in the file by family name; 2-D or 3-D, numeric.

    Raises:
        DataError: one line naming the file, the dataset and what is wrong.
    """

    def __init__(self, paths: str | Sequence[str], datasets: Mapping[str, str]) -> None:
        self.files = find_files(paths)
        self._handles: list[h5py.File] = []
        try:
            for file in self.files:
                self._handles.append(_open(file))
            self.datasets = {family: self._inspect(family, path) for family, path in datasets.items()}
            self._check_rows()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Source:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        for handle in self._handles:
            handle.close()
        self._handles = []

    @property
    def rows(self) -> int:
        return next(iter(self.datasets.values())).rows

    def read(self, family: str, start: int, stop: int) -> NDArray[np.float32]:
        """Rows [start, stop) of a family as float32, across shards; DataError names a damaged place."""
        info = self.datasets[family]
        if not 0 <= start <= stop <= info.rows:
            raise IndexError(f"rows {start}..{stop} of {info.rows}")
        out = np.empty((stop - start, *info.row_shape), dtype=np.float32)
        done = first = 0
        for file, handle in zip(self.files, self._handles, strict=True):
            dataset = handle[info.path]
            low, high = max(start - first, 0), min(stop - first, dataset.shape[0])
            if low < high:
                try:
                    # Values beyond float32 become Inf, which the caller reports with its place.
                    with np.errstate(over="ignore"):
                        out[done : done + high - low] = dataset[low:high]
                except (OSError, RuntimeError) as error:
                    raise DataError(
                        f"{file}: {info.path}: rows {low}..{high - 1} cannot be read, the file is damaged: "
                        f"{_one_line(error)}"
                    ) from None
                done += high - low
            first += dataset.shape[0]
        return out

    def place(self, family: str, row: int) -> str:
        """Where a row lies, for messages: file, dataset, row in the file."""
        info = self.datasets[family]
        for file, handle in zip(self.files, self._handles, strict=True):
            count = handle[info.path].shape[0]
            if row < count:
                return f"{file}: {info.path}: row {row}"
            row -= count
        raise IndexError(f"row {row} beyond the {info.rows} of {info.path}")

    def placing(self, family: str, first: int) -> Callable[[int], str]:
        """`place` for rows counted from `first`."""
        return lambda row: self.place(family, first + row)

    def feature_names(self, family: str) -> list[str] | None:
        """Names of a family's columns, where the dataset or its group has an attribute `feature_names`."""
        path = self.datasets[family].path
        dataset = self._handles[0][path]
        for node in (dataset, dataset.parent):
            names = node.attrs.get("feature_names")
            if isinstance(names, np.ndarray) and names.shape == dataset.shape[1:]:
                return [name.decode() if isinstance(name, bytes) else str(name) for name in names]
        return None

    def _inspect(self, family: str, path: str) -> DatasetInfo:
        rows, shape, chunk_rows = 0, None, 1
        for file, handle in zip(self.files, self._handles, strict=True):
            node = _get(file, handle, path)
            if node.dtype.kind not in "fiu":
                raise DataError(f"{file}: {path}: expected numbers, got {node.dtype}")
            if node.ndim not in (2, 3):
                raise DataError(f"{file}: {path}: family {family!r} needs a 2-D or 3-D dataset, got shape {node.shape}")
            if shape is not None and node.shape[1:] != shape:
                raise DataError(f"{file}: {path}: rows of shape {node.shape[1:]}, but {shape} in {self.files[0]}")
            shape = node.shape[1:]
            if 0 in shape:
                raise DataError(f"{file}: {path}: no columns (shape {node.shape})")
            rows += node.shape[0]
            chunk_rows = max(chunk_rows, node.chunks[0] if node.chunks else 1)
        assert shape is not None
        return DatasetInfo(path, rows, shape, chunk_rows)

    def _check_rows(self) -> None:
        for file, handle in zip(self.files, self._handles, strict=True):
            counts = {info.path: handle[info.path].shape[0] for info in self.datasets.values()}
            if len(set(counts.values())) > 1:
                listed = ", ".join(f"{path} has {count}" for path, count in counts.items())
                raise DataError(f"{file}: families differ in their number of rows: {listed}")
        if self.rows == 0:
            raise DataError(f"{self.files[0]}: {next(iter(self.datasets.values())).path} has no rows")


def find_files(paths: str | Sequence[str]) -> list[Path]:
    """The files of a path, a glob, or a list of those; raises DataError where one is missing."""
    found: list[Path] = []
    for pattern in [paths] if isinstance(paths, str) else paths:
        if _GLOB.search(pattern) and not Path(pattern).exists():
            matches = sorted(glob.glob(pattern, recursive=True), key=_natural)
            if not matches:
                raise DataError(f"{pattern}: no file matches{_how_to_make(pattern)}")
            found += [Path(match) for match in matches]
        else:
            found.append(Path(pattern))
    if not found:
        raise DataError("dataset_path is an empty list")
    twice = [file for i, file in enumerate(found) if file in found[:i]]
    if twice:
        raise DataError(f"dataset_path names {twice[0]} twice: its rows would count double")
    for file in found:
        if file.is_dir():
            raise DataError(f"{file}: is a directory; name the file, or a glob such as {file}/*.h5")
        if not file.exists():
            raise DataError(f"{file}: no such file{_how_to_make(str(file))}")
    return found


def _how_to_make(path: str) -> str:
    return ""


def _natural(text: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)]


def _open(file: Path) -> h5py.File:
    try:
        with open(file, "rb"):
            pass
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None
    if not h5py.is_hdf5(file):
        raise DataError(f"{file}: not an HDF5 file")
    try:
        return h5py.File(file, "r")
    except (OSError, RuntimeError) as error:
        what = "truncated" if "truncated" in str(error) else "damaged"
        raise DataError(f"{file}: the file is {what}: {_one_line(error)}") from None


def _get(file: Path, handle: h5py.File, path: str) -> h5py.Dataset:
    try:
        node = handle[path]
    except (KeyError, OSError, RuntimeError):
        names: list[str] = []
        handle.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
        close = difflib.get_close_matches(path, names, 1, cutoff=0.4)
        hint = f"; nearest is {close[0]}" if close else f"; it holds {', '.join(names[:6]) or 'no dataset'}"
        raise DataError(f"{file}: no dataset {path}{hint}") from None
    if not isinstance(node, h5py.Dataset):
        raise DataError(f"{file}: {path} is a group, not a dataset")
    return node


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
