"""Rows that only libhdf5 can read: the slow path, with the same values."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from spinlock_fast.data.files import H5PY_ERRORS, identify, one_line, open_file
from spinlock_fast.data.table import Table, Tables
from spinlock_fast.errors import DataError

_OPEN_FILES = 16
_BLOCK_BYTES = 1 << 20


class H5pyRows:
    """Reads rows of any dataset through h5py; keeps a few files open."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._ends = np.cumsum(tables.shard_rows)
        self._handles: OrderedDict[int, h5py.File] = OrderedDict()  # the last used, at most _OPEN_FILES

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
        index = table.shards[shard]
        where = f"{index.file}: {table.path}: rows {low}..{high - 1}"
        try:
            values, error = self._handle(shard)[index.path][low:high], None
        except H5PY_ERRORS as caught:
            error = caught
        if not index.growing and identify(index.file) != index.identity:
            raise DataError(f"{where}: the file has changed since it was opened")
        if error is not None:
            raise DataError(f"{where} cannot be read, the file is damaged: {one_line(error)}")
        wanted: NDArray[Any] = np.asarray(values, table.dtype)[local - low]
        return wanted

    def _handle(self, shard: int) -> h5py.File:
        if shard not in self._handles:
            while len(self._handles) >= _OPEN_FILES:
                self._handles.popitem(last=False)[1].close()
            self._handles[shard] = open_file(self._tables.files[shard])
        self._handles.move_to_end(shard)
        return self._handles[shard]
