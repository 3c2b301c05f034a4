"""Reading rows through h5py, for datasets that the native reader does not support."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from spinlock_fast.data.input_files import H5PY_ERRORS, TooManyOpenFilesError, open_file
from spinlock_fast.data.shard_index import ShardIndex
from spinlock_fast.data.sharded_dataset import ShardedDataset, ShardedDatasets
from spinlock_fast.errors import DataError
from spinlock_fast.messages import one_line

_MAX_OPEN_FILES = 16
_SPARE_DESCRIPTORS = 4  # libhdf5 opens a file before it detects that it is already open
_BLOCK_BYTES = 1 << 20


class H5pyReader:
    """Reads rows through h5py; keeps the most recently used files open."""

    def __init__(self, sharded: ShardedDatasets) -> None:
        self._sharded = sharded
        self._ends = np.cumsum(sharded.shard_rows)
        self._handles: OrderedDict[Path, h5py.File] = OrderedDict()  # least recently used first

    def close(self) -> None:
        while self._handles:
            self._handles.popitem()[1].close()

    def blocks(self, dataset: ShardedDataset, rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Indexes into `rows`, sorted by row and grouped by the chunk that holds them."""
        order = np.argsort(rows, kind="stable")
        shard = np.searchsorted(self._ends, rows[order], side="right")
        start = self._ends - np.array(self._sharded.shard_rows)
        step = dataset.chunk_rows if dataset.chunk_rows > 1 else max(1, _BLOCK_BYTES // dataset.row_bytes)
        group = np.stack([shard, (rows[order] - start[shard]) // step])
        return np.split(order, np.flatnonzero((np.diff(group) != 0).any(0)) + 1)

    def read(self, dataset: ShardedDataset, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Reads rows of one block [len(rows), *row_shape]; raises DataError that names file, dataset and rows."""
        shard = int(np.searchsorted(self._ends, rows[0], side="right"))
        local = rows - (self._ends[shard] - self._sharded.shard_rows[shard])
        low, high = int(local.min()), int(local.max()) + 1
        values = self._read(dataset.shards[shard], low, high)
        selected: NDArray[Any] = np.asarray(values, dataset.dtype)[local - low]
        return selected

    def _read(self, index: ShardIndex, low: int, high: int) -> NDArray[Any]:
        """Reads rows [low, high) of a shard, in parts if they are stored in more files than may be open."""
        sources = sorted(
            {source.path for source in index.backing_files if source.opened_by_hdf5 and source.holds(low, high)}
        )
        location = f"{index.file}: {index.path}: rows {low}..{high - 1}"
        if len(sources) > _MAX_OPEN_FILES and high - low > 1:
            middle = (low + high) // 2
            return np.concatenate([self._read(index, low, middle), self._read(index, middle, high)])
        values, error = None, None
        try:
            values = self._read_with_sources(index, sources, low, high)
        except TooManyOpenFilesError as full:
            raise DataError(f"{location}: {full}") from None
        except H5PY_ERRORS as caught:
            error = caught
        try:
            index.check_unchanged(low, high)
        except DataError as changed:
            raise DataError(f"{location}: {changed}") from None
        if isinstance(error, DataError):
            raise error
        if values is None:
            reason = one_line(error) if error is not None else "no values"
            raise DataError(f"{location} cannot be read, the file is damaged: {reason}")
        return values

    def _read_with_sources(self, index: ShardIndex, sources: list[Path], low: int, high: int) -> NDArray[Any]:
        """Reads rows through libhdf5, which returns fill values for a source that it cannot open.

        All sources of the rows are therefore opened first, and a few file descriptors are left free for libhdf5.
        """
        files = [index.file, *sources]
        for file in files:
            self._open(file, files)
        spare: list[int] = []
        try:
            while index.backing_files and len(spare) < _SPARE_DESCRIPTORS:
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
                if len(self._handles) >= max(_MAX_OPEN_FILES, len(kept)):
                    self._close_oldest(kept)
                self._handles[file] = open_file(file)
            except TooManyOpenFilesError:
                self._close_oldest(kept)
        self._handles.move_to_end(file)

    def _close_oldest(self, kept: list[Path]) -> None:
        """Closes the least recently used file; raises TooManyOpenFilesError if all are sources."""
        oldest = next((file for file in self._handles if file not in kept), None)
        if oldest is None:
            raise TooManyOpenFilesError(
                f"{kept[0]}: {len(kept) + _SPARE_DESCRIPTORS} files must be open at a time, but this process may not "
                "open more; raise the limit with `ulimit -n`"
            )
        self._handles.pop(oldest).close()
