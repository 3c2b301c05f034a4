"""Rows of HDF5 datasets, over one file or many shards of it."""

from __future__ import annotations

import difflib
import glob
import re
from collections import Counter, OrderedDict
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
_OPEN_FILES = 16


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
    """Named datasets with a common number of rows; a context manager that keeps a few files open.

    Args:
        paths: a file, a glob, or a list of those. The shards of a glob follow each other in natural
            order (shard_10 after shard_9).
        datasets: dataset path in the file by family name; 2-D or 3-D, numeric.

    Raises:
        DataError: one line naming the file, the dataset and what is wrong.
    """

    def __init__(self, paths: str | Sequence[str], datasets: Mapping[str, str]) -> None:
        self.files = find_files(paths)
        self._handles: OrderedDict[int, h5py.File] = OrderedDict()  # the last used, at most _OPEN_FILES
        try:
            self._inspect(datasets)
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
        while self._handles:
            self._handles.popitem()[1].close()

    @property
    def rows(self) -> int:
        return next(iter(self.datasets.values())).rows

    def read(self, family: str, start: int, stop: int) -> NDArray[np.float32]:
        """Rows [start, stop) of a family as float32, across shards; DataError names a damaged place."""
        info = self.datasets[family]
        if not 0 <= start <= stop <= info.rows:
            raise IndexError(f"rows {start}..{stop} of {info.rows}")
        out = np.empty((stop - start, *info.row_shape), dtype=np.float32)
        shard = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            file, first = self.files[shard], self._ends[shard] - self._counts[shard]
            low, high = start - first, min(stop, self._ends[shard]) - first
            try:
                # Values beyond float32 become Inf, which the caller reports with its place.
                with np.errstate(over="ignore"):
                    out[len(out) - (stop - start) :][: high - low] = self._handle(shard)[info.path][low:high]
            except (OSError, RuntimeError) as error:
                raise DataError(
                    f"{file}: {info.path}: rows {low}..{high - 1} cannot be read, the file is damaged: "
                    f"{_one_line(error)}"
                ) from None
            start += high - low
            shard += 1
        return out

    def place(self, family: str, row: int) -> str:
        """Where a row lies, for messages: file, dataset, row in the file."""
        shard = int(np.searchsorted(self._ends, row, side="right"))
        first = self._ends[shard] - self._counts[shard]
        return f"{self.files[shard]}: {self.datasets[family].path}: row {row - first}"

    def placing(self, family: str, first: int) -> Callable[[int], str]:
        """`place` for rows counted from `first`."""
        return lambda row: self.place(family, first + row)

    def feature_names(self, family: str) -> list[str] | None:
        """Names of a family's columns, where the dataset or its group has an attribute `feature_names`."""
        path = self.datasets[family].path
        dataset = self._handle(0)[path]
        for node in (dataset, dataset.parent):
            names = node.attrs.get("feature_names")
            if isinstance(names, np.ndarray) and names.shape == dataset.shape[1:]:
                return [name.decode() if isinstance(name, bytes) else str(name) for name in names]
        return None

    def _handle(self, shard: int) -> h5py.File:
        if shard not in self._handles:
            while len(self._handles) >= _OPEN_FILES:
                self._handles.popitem(last=False)[1].close()
            self._handles[shard] = _open(self.files[shard])
        self._handles.move_to_end(shard)
        return self._handles[shard]

    def _inspect(self, datasets: Mapping[str, str]) -> None:
        counts: list[int] = []
        shapes: dict[str, tuple[int, ...]] = {}
        chunk_rows = dict.fromkeys(datasets, 1)
        for shard, file in enumerate(self.files):
            rows: dict[str, int] = {}
            for family, path in datasets.items():
                node = _get(file, self._handle(shard), path)
                _check(file, family, node)
                if shapes.setdefault(family, node.shape[1:]) != node.shape[1:]:
                    raise DataError(
                        f"{file}: {path}: rows of shape {node.shape[1:]}, but {shapes[family]} in {self.files[0]}"
                    )
                rows[path] = node.shape[0]
                chunk_rows[family] = max(chunk_rows[family], node.chunks[0] if node.chunks else 1)
            if len(set(rows.values())) > 1:
                listed = ", ".join(f"{path} has {count}" for path, count in rows.items())
                raise DataError(f"{file}: families differ in their number of rows: {listed}")
            counts.append(next(iter(rows.values())))
        self._counts = counts
        self._ends = np.cumsum(counts).tolist()
        total = self._ends[-1]
        if total == 0:
            raise DataError(f"{self.files[0]}: {next(iter(datasets.values()))} has no rows")
        self.datasets = {
            family: DatasetInfo(path, total, shapes[family], chunk_rows[family]) for family, path in datasets.items()
        }


def _check(file: Path, family: str, node: h5py.Dataset) -> None:
    path = node.name.lstrip("/")
    if node.dtype.kind not in "fiu":
        raise DataError(f"{file}: {path}: expected numbers, got {node.dtype}")
    if node.ndim not in (2, 3):
        raise DataError(f"{file}: {path}: family {family!r} needs a 2-D or 3-D dataset, got shape {node.shape}")
    if 0 in node.shape[1:]:
        raise DataError(f"{file}: {path}: no columns (shape {node.shape})")


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
    twice = next((file for file, count in Counter(found).items() if count > 1), None)
    if twice is not None:
        raise DataError(f"dataset_path names {twice} twice: its rows would count double")
    for file in found:
        if file.is_dir():
            raise DataError(f"{file}: is a directory; name the file, or a glob such as {file}/*.h5")
        if not file.exists():
            raise DataError(f"{file}: no such file{_how_to_make(str(file))}")
    return found


def _how_to_make(path: str) -> str:
    name = path if not _GLOB.search(path) else "FILE.h5"
    return f"; simulate one with `python -m spinlock_fast.generate --operators 512 --output {name}`"


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
