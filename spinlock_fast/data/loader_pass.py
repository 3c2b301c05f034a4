"""One pass over the rows: windows of rows are submitted ahead, batches are delivered in order."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spinlock_fast import _native
from spinlock_fast.data.batch_memory import BatchMemory
from spinlock_fast.data.h5py_reader import H5pyReader
from spinlock_fast.data.row_order import RowSequence
from spinlock_fast.data.shard_fetcher import ShardFetcher
from spinlock_fast.data.sharded_dataset import ShardedDatasets
from spinlock_fast.errors import DataError


@dataclass
class PassStats:
    """Statistics of a pass."""

    batches: int = 0
    rows: int = 0
    seconds: float = 0.0  # from the first request of a batch to the last delivery
    seconds_waited: float = 0.0
    reader: _native.RowReader | None = None

    def summary(self) -> dict[str, Any]:
        empty: _native.ReaderStats = {"chunks": 0, "stored_bytes": 0, "decoded_bytes": 0, "cpu_seconds": 0.0}
        native = self.reader.stats() if self.reader is not None else empty
        return {
            "batches": self.batches,
            "rows": self.rows,
            "seconds": self.seconds,
            "seconds_waited": self.seconds_waited,
            **native,
            "decoded_mb_per_second": native["decoded_bytes"] / 1e6 / self.seconds if self.seconds else 0.0,
        }


@dataclass
class _Batch:
    first: int
    tensors: list[Tensor]  # in the order of the datasets
    index: Tensor
    error: DataError | None = None
    rows: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self.rows = self.index.numpy()


def batch_memory(sharded: ShardedDatasets, order: RowSequence, windows_ahead: int, pin: bool) -> list[BatchMemory]:
    """Memory for the batches of a pass, one per dataset; pinned if `pin`."""
    batch, window = order.max_rows
    in_flight = 2 + windows_ahead * (2 + window // batch)  # batches held by the caller and in windows
    return [BatchMemory(dataset.row_shape, dataset.dtype, batch, in_flight, pin) for dataset in sharded.datasets]


class LoaderPass:
    """Iterates over batches of an epoch. Holds threads and open files until it is closed.

    Args:
        sharded: datasets to read.
        order: order of the rows and sizes of the batches.
        epoch: selects the permutation of the order.
        first_batch: number of the first batch to deliver.
        stop_batch: end of the range of batches; the end of the epoch by default.
        windows_ahead: number of windows that are decoded or delivered at a time.
        threads: decoding threads.
        verify_checksums: verify fletcher32 checksums.
        memory: result of `batch_memory`, to share memory between consecutive passes.
        stats: updated during the pass.
    """

    def __init__(
        self,
        sharded: ShardedDatasets,
        order: RowSequence,
        epoch: int = 0,
        first_batch: int = 0,
        stop_batch: int | None = None,
        *,
        windows_ahead: int,
        threads: int,
        verify_checksums: bool = True,
        memory: list[BatchMemory] | None = None,
        stats: PassStats | None = None,
    ) -> None:
        self._sharded = sharded
        self._batch_end = order.batch_end
        self._batches = range(first_batch, order.batch_count if stop_batch is None else stop_batch)
        self._next_batch = first_batch
        self._start, self._stop = order.batch_end(first_batch), order.batch_end(self._batches.stop)
        self._windows = order.windows(epoch, self._start)
        self._fetcher = ShardFetcher(sharded, order.shards(epoch))
        self._windows_ahead = windows_ahead
        self._memory = batch_memory(sharded, order, windows_ahead, pin=False) if memory is None else memory
        self._reader = _native.RowReader(*sharded.native_descriptions(), threads, verify_checksums)
        self._h5py_reader = H5pyReader(sharded)
        self._submitted = self._start
        self._window_ends: deque[int] = deque()  # end position of each window not yet delivered
        self._pending: deque[_Batch] = deque()  # submitted, not yet delivered
        self._stats = PassStats() if stats is None else stats
        self._owner_pid = os.getpid()
        self._stats.reader = self._reader

    def close(self) -> None:
        """Joins the threads and closes the files; delivered batches stay valid."""
        self._reader.close()
        if os.getpid() == self._owner_pid:  # a forked process must not close the files of its parent
            self._h5py_reader.close()
            self._fetcher.close()
        self._pending.clear()

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        started = time.perf_counter()
        for number in self._batches:
            end = self._batch_end(number + 1)
            requested = time.perf_counter()
            self._submit(end)
            batch = self._deliver()
            while self._window_ends and self._window_ends[0] <= end:
                self._window_ends.popleft()
            self._fetcher.release(end)
            self._submit(end)  # keeps the threads busy while the caller processes the batch
            self._stats.batches += 1
            self._stats.rows += len(batch["index"])
            now = time.perf_counter()
            self._stats.seconds_waited += now - requested
            self._stats.seconds = now - started
            yield batch

    def _deliver(self) -> dict[str, Tensor]:
        batch = self._pending[0]
        try:
            self._reader.wait(batch.first)
        except _native.ReadError as error:
            raise DataError(str(error)) from None
        if batch.error is not None:
            raise batch.error
        self._pending.popleft()
        names = (dataset.path for dataset in self._sharded.datasets)
        return {**dict(zip(names, batch.tensors, strict=True)), "index": batch.index}

    def _submit(self, needed: int) -> None:
        """Submits windows ahead, at least all windows before position `needed`."""
        while len(self._window_ends) < self._windows_ahead or self._submitted < needed:
            if self._submitted >= self._stop:
                return
            if (window := next(self._windows, None)) is None:
                return
            first, rows = window
            rows = rows[max(0, self._start - first) : max(0, self._stop - first)]
            first = max(first, self._start)
            if not len(rows):
                continue
            end = first + len(rows)
            self._fetcher.require(end, rows)
            self._add_batches(end)
            for batch in self._pending:
                low, high = max(batch.first, first), min(batch.first + len(batch.rows), end)
                if low < high:
                    batch.rows[low - batch.first : high - batch.first] = rows[low - first : high - first]
            self._reader.submit(first, rows)
            self._window_ends.append(end)
            self._submitted = end
            self._read_with_h5py(first, rows)

    def _add_batches(self, end: int) -> None:
        """Adds the batches that start before position `end`."""
        while self._next_batch < self._batches.stop:
            first = self._batch_end(self._next_batch)
            if first >= end:
                return
            count = self._batch_end(self._next_batch + 1) - first
            tensors = [memory.allocate(count) for memory in self._memory]
            pairs = zip(self._sharded.datasets, tensors, strict=True)
            native = [tensor.numpy() for dataset, tensor in pairs if not dataset.h5py_reason]
            self._reader.add_batch(first, count, native)
            self._pending.append(
                _Batch(first, tensors, torch.empty(count, dtype=torch.int64, pin_memory=self._memory[0].pin))
            )
            self._next_batch += 1

    def _read_with_h5py(self, first: int, rows: NDArray[np.int64]) -> None:
        """Reads the rows of a window for the datasets that the native reader does not support."""
        starts = np.array([batch.first for batch in self._pending])
        for t, dataset in enumerate(self._sharded.datasets):
            if not dataset.h5py_reason:
                continue
            for block in self._h5py_reader.blocks(dataset, rows):
                batch_of_row = np.searchsorted(starts, first + block, side="right") - 1
                values, error = None, None
                try:
                    values = self._h5py_reader.read(dataset, rows[block])
                except DataError as caught:
                    error = caught
                for b in np.unique(batch_of_row):
                    batch, in_batch = self._pending[int(b)], batch_of_row == b
                    if values is None:
                        batch.error = batch.error or error
                    else:
                        batch.tensors[t].numpy()[first + block[in_batch] - batch.first] = values[in_batch]
