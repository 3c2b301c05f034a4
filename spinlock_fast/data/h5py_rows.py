"""Rows that only libhdf5 can read: the slow path, with the same values."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from spinlock_fast.data.files import H5PY_ERRORS, TooManyOpenFilesError, one_line, open_file
from spinlock_fast.data.index import ShardIndex
from spinlock_fast.data.table import Table, Tables
from spinlock_fast.errors import DataError

_OPEN_FILES = 16
_SPARE_DESCRIPTORS = 4  # libhdf5 opens a file before it sees that it is open already
_BLOCK_BYTES = 1 << 20


class H5pyRows:
    """Reads rows of any dataset through h5py; keeps a few files open."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._ends = np.cumsum(tables.shard_rows)
        self._handles: OrderedDict[Path, h5py.File] = OrderedDict()  # the last used

    def close(self) -> None:
        while self._handles:
            self._handles.popitem()[1].close()

    def blocks(self, table: Table, rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Indexes into `rows`, sorted by row, in groups that are best read together: of one chunk."""
        order = np.argsort(rows, kind="stable")
        shard = np.searchsorted(self._ends, rows[order], side="right")
        start = self._ends - np.array(self._tables.shard_rows)
        step = table.chunk_rows if table.chunk_rows > 1 else max(1, _BLOCK_BYTES // table.row_bytes)
        group = np.stack([shard, (rows[order] - start[shard]) // step])
        return np.split(order, np.flatnonzero((np.diff(group) != 0).any(0)) + 1)

    def read(self, table: Table, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Values [len(rows), *row_shape] of rows of one block; raises DataError naming file, dataset and rows."""
        shard = int(np.searchsorted(self._ends, rows[0], side="right"))
        local = rows - (self._ends[shard] - self._tables.shard_rows[shard])
        low, high = int(local.min()), int(local.max()) + 1
        values = self._read(table.shards[shard], low, high)
        wanted: NDArray[Any] = np.asarray(values, table.dtype)[local - low]
        return wanted

    def _read(self, index: ShardIndex, low: int, high: int) -> NDArray[Any]:
        """Rows [low, high) of a shard, in parts where they lie in more files than may be open."""
        needed = sorted({other.path for other in index.backing if other.opened and other.holds(low, high)})
        where = f"{index.file}: {index.path}: rows {low}..{high - 1}"
        if len(needed) > _OPEN_FILES and high - low > 1:
            middle = (low + high) // 2
            return np.concatenate([self._read(index, low, middle), self._read(index, middle, high)])
        values, error = None, None
        try:
            values = self._values(index, needed, low, high)
        except TooManyOpenFilesError as full:
            raise DataError(f"{where}: {full}") from None
        except H5PY_ERRORS as caught:
            error = caught
        try:
            index.check_unchanged(low, high)
        except DataError as changed:
            raise DataError(f"{where}: {changed}") from None
        if isinstance(error, DataError):
            raise error
        if values is None:
            text = one_line(error) if error is not None else "no values"
            raise DataError(f"{where} cannot be read, the file is damaged: {text}")
        return values

    def _values(self, index: ShardIndex, needed: list[Path], low: int, high: int) -> NDArray[Any]:
        """What libhdf5 gives. It takes a source that it cannot open for one that does not exist, and gives fill values:
        so those that hold the rows are open before, and some descriptors are left to it.
        """
        files = [index.file, *needed]
        for file in files:
            self._open(file, files)
        spare: list[int] = []
        try:
            while index.backing and len(spare) < _SPARE_DESCRIPTORS:
                try:
                    spare.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
                except OSError:
                    self._close_oldest(files)
        finally:
            for descriptor in spare:
                os.close(descriptor)
        values: NDArray[Any] = self._handles[index.file][index.path][low:high]
        return values

    def _open(self, file: Path, kept: list[Path]) -> None:
        while file not in self._handles:
            try:
                if len(self._handles) >= max(_OPEN_FILES, len(kept)):
                    self._close_oldest(kept)
                self._handles[file] = open_file(file)
            except TooManyOpenFilesError:
                self._close_oldest(kept)
        self._handles.move_to_end(file)

    def _close_oldest(self, kept: list[Path]) -> None:
        """Closes the file that was used longest ago; raises TooManyOpenFilesError where all are needed."""
        oldest = next((file for file in self._handles if file not in kept), None)
        if oldest is None:
            raise TooManyOpenFilesError(
                f"{kept[0]}: {len(kept) + _SPARE_DESCRIPTORS} files must be open at a time, but this process may have "
                "no more; `ulimit -n` tells and raises the limit"
            )
        self._handles.pop(oldest).close()
