"""A thread that reads rows through h5py ahead of their delivery."""

from __future__ import annotations

import atexit
import signal
import time
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Thread
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spinlock_fast.data.h5py_reader import H5pyReader
from spinlock_fast.data.sharded_dataset import ShardedDataset, ShardedDatasets
from spinlock_fast.interrupts import deferred_interrupts

_BLOCK_BYTES = 1 << 20  # read at a time if a dataset is not chunked
_LARGE_ROW_BYTES = 2048  # copied one at a time, since NumPy gathers rows in a temporary array
_REPORT_SECONDS = 0.04  # complete tasks are reported together: each report switches to another thread and back
_MAX_BLOCK_BYTES = 4 << 20  # of several chunks: closing the thread waits for a block


@dataclass
class H5pyBatch:
    """Memory of a batch for one dataset."""

    first: int  # position of its first row
    memory: NDArray[Any]  # [rows, *row_shape]


@dataclass
class _Task:
    number: int
    dataset: ShardedDataset
    rows: NDArray[np.int64]
    positions: NDArray[np.int64]  # of the rows
    batches: list[H5pyBatch]


@dataclass
class _ConsecutiveRows:
    """Task of rows that are consecutive in the shards and in one batch."""

    number: int
    dataset: ShardedDataset
    first_row: int
    batch: int  # position of the first row of the batch
    memory: NDArray[Any]  # of the rows


@dataclass
class _Stop:
    requested: bool = False


@dataclass
class _Result:
    number: int  # of the last complete task
    errors: dict[int, Exception]  # by the position of the first row of a batch


class H5pyThread:
    """Reads submitted rows in order, one task after another: libhdf5 holds a global lock.

    A thread is needed also because Python runs signal handlers in the main thread only. h5py removes each identifier
    from a dictionary of weak references, in a callback; an exception that a handler raises there, such as
    KeyboardInterrupt, would be ignored.

    Queues are the only shared state: unlike conditions they stay consistent if a signal interrupts the caller.
    """

    def __init__(self, sharded: ShardedDatasets) -> None:
        self._sharded = sharded
        self._tasks: SimpleQueue[_Task | _ConsecutiveRows | None] = SimpleQueue()
        self._results: SimpleQueue[_Result] = SimpleQueue()
        self._stop = _Stop()
        self._thread: Thread | None = None
        self._submitted = self._completed = 0
        self._errors: dict[int, Exception] = {}

    def submit(
        self, dataset: ShardedDataset, first: int, rows: NDArray[np.int64], batches: list[H5pyBatch]
    ) -> list[int]:
        """Queues those of the rows at positions first, first + 1, ... that h5py must read, if there are any.

        Args:
            dataset: the dataset to read.
            first: position of the first row.
            rows: row numbers over all shards.
            batches: consecutive batches that cover the positions.

        Returns:
            For each batch, the number of tasks that must be complete before it is.
        """
        if dataset.read_in_parts and _consecutive(rows):
            tasks = []
            for batch in batches:
                low, high = max(first, batch.first), min(first + len(rows), batch.first + len(batch.memory))
                memory = batch.memory[low - batch.first : high - batch.first]
                row = int(rows[0]) + low - first
                self._put(_ConsecutiveRows(self._submitted + 1, dataset, row, batch.first, memory))
                tasks.append(self._submitted)
            return tasks
        selected = np.flatnonzero(dataset.read_by_h5py(rows))
        if not len(selected):
            return [0] * len(batches)
        self._put(_Task(self._submitted + 1, dataset, rows[selected], first + selected, batches))
        return [self._submitted] * len(batches)

    def _put(self, task: _Task | _ConsecutiveRows) -> None:
        if self._thread is None:
            with deferred_interrupts():
                self._thread = Thread(
                    target=_run, args=(self._sharded, self._tasks, self._results, self._stop), name="h5py", daemon=True
                )
                self._thread.start()
                atexit.register(self.close)  # the interpreter must not end while the thread is inside libhdf5
        self._submitted = task.number
        self._tasks.put(task)

    def wait(self, tasks: int, first: int) -> None:
        """Waits until the first `tasks` tasks are complete; raises the error of the batch that starts at `first`."""
        while self._completed < tasks:
            result = self._results.get()
            self._completed = result.number
            for batch, error in result.errors.items():
                self._errors.setdefault(batch, error)
        if (failure := self._errors.pop(first, None)) is not None:
            raise failure

    def close(self) -> None:
        """Discards queued tasks, waits for the block that is being read, and closes the files."""
        if self._thread is None:
            return
        self._stop.requested = True
        self._tasks.put(None)
        if self._thread.is_alive():
            self._thread.join()
        atexit.unregister(self.close)
        self._thread = None


def _run(
    sharded: ShardedDatasets,
    tasks: SimpleQueue[_Task | _ConsecutiveRows | None],
    results: SimpleQueue[_Result],
    stop: _Stop,
) -> None:
    # The operating system then delivers signals to the main thread, and interrupts its waiting.
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    reader, ends = H5pyReader(), np.cumsum(sharded.shard_rows)
    errors: dict[int, Exception] = {}
    reported = 0.0
    try:
        while (task := tasks.get()) is not None:
            if isinstance(task, _ConsecutiveRows):
                found = _read_consecutive(reader, ends, task, stop)
            else:
                found = _read(reader, ends, task, stop)
            errors = found | errors  # keeps the first one of each batch
            number = task.number
            del task  # refers to the memory of batches
            if tasks.empty() or time.monotonic() > reported + _REPORT_SECONDS:
                results.put(_Result(number, errors))
                errors, reported = {}, time.monotonic()
    finally:
        reader.close()


def _consecutive(rows: NDArray[np.int64]) -> bool:
    return int(rows[-1] - rows[0]) == len(rows) - 1 and bool((rows[1:] > rows[:-1]).all())


def _read_consecutive(
    reader: H5pyReader, ends: NDArray[np.int64], task: _ConsecutiveRows, stop: _Stop
) -> dict[int, Exception]:
    """Reads the rows of a task; returns the error of its batch, if there is one."""
    step, most = _block_rows(task.dataset)
    done, count = 0, len(task.memory)
    try:
        while done < count and not stop.requested:
            row = task.first_row + done
            number = bisect_right(ends, row)
            shard = task.dataset.shards[number]
            low = row - int(ends[number]) + shard.shape[0]
            high = min(low + count - done, shard.shape[0], (low + most) // step * step)
            reader.read(shard, low, high, task.memory[done : done + high - low])
            done += high - low
    except Exception as error:  # noqa: BLE001 - raised again at the batch
        return {task.batch: error}
    return {}


def _read(reader: H5pyReader, ends: NDArray[np.int64], task: _Task, stop: _Stop) -> dict[int, Exception]:
    """Reads the rows of a task; returns the first error of each batch."""
    dataset, batches = task.dataset, task.batches
    rows, positions = task.rows, task.positions
    if (rows[1:] <= rows[:-1]).any():
        order = np.argsort(rows, kind="stable")
        rows, positions = rows[order], positions[order]
    starts = np.array([batch.first for batch in batches])
    shards = np.searchsorted(ends, rows, side="right")
    local = rows - np.append(0, ends)[shards]
    owner = np.searchsorted(starts, positions, side="right") - 1
    slots = positions - starts[owner]
    memory = [batch.memory for batch in batches]
    scratch = np.empty((0, *dataset.row_shape), dataset.dtype)
    errors: dict[int, Exception] = {}
    for begin, end, consecutive in _blocks(dataset, shards, local, owner, slots):
        if stop.requested:
            break
        shard, low, high = dataset.shards[int(shards[begin])], int(local[begin]), int(local[end - 1]) + 1
        try:
            if consecutive:
                slot = int(slots[begin])
                reader.read(shard, low, high, memory[int(owner[begin])][slot : slot + high - low])
                continue
            if len(scratch) < high - low:
                scratch = np.empty((high - low, *dataset.row_shape), dataset.dtype)
            reader.read(shard, low, high, scratch[: high - low])
            _scatter(scratch, local[begin:end] - low, memory, owner[begin:end], slots[begin:end])
        except Exception as error:  # noqa: BLE001 - raised again at the batch it belongs to
            for i in np.unique(owner[begin:end]):
                errors.setdefault(batches[int(i)].first, error)
    return errors


def _scatter(
    values: NDArray[Any],
    rows: NDArray[np.int64],
    memory: list[NDArray[Any]],
    owner: NDArray[np.int64],
    slots: NDArray[np.int64],
) -> None:
    """Copies values[rows[i]] to memory[owner[i]][slots[i]]."""
    if values[:1].nbytes >= _LARGE_ROW_BYTES:
        for row, i, slot in zip(rows.tolist(), owner.tolist(), slots.tolist(), strict=True):
            memory[i][slot] = values[row]
        return
    for i in np.unique(owner):
        mine = owner == i
        memory[int(i)][slots[mine]] = values[rows[mine]]


def _blocks(
    dataset: ShardedDataset,
    shards: NDArray[np.int64],
    local: NDArray[np.int64],
    owner: NDArray[np.int64],
    slots: NDArray[np.int64],
) -> Iterator[tuple[int, int, bool]]:
    """Ranges of sorted rows to read at a time.

    The rows of a chunk are one block, and so are chunks whose rows are consecutive in the file and in one batch.

    Args:
        dataset: the dataset.
        shards: number of the shard of each row [n].
        local: row number within the shard [n].
        owner: batch of each row [n].
        slots: place in the batch [n].

    Yields:
        (first, end, whether the rows are consecutive in the file and in one batch).
    """
    step, most = _block_rows(dataset)

    def changes(*columns: NDArray[np.int64]) -> NDArray[np.bool_]:
        changed = np.ones(len(local), bool)
        changed[1:] = columns[0][1:] != columns[0][:-1]
        for column in columns[1:]:
            changed[1:] |= column[1:] != column[:-1]
        return changed

    place = np.arange(len(local))
    run = np.cumsum(changes(shards, owner, local - place, slots - place))  # number of the consecutive run of each row
    first = np.flatnonzero(changes(shards, local // step))
    last = np.append(first[1:], len(local)) - 1
    single = run[first] == run[last]
    joined = single[1:] & single[:-1] & (run[first[1:]] == run[first[:-1]])
    joined &= local[first[1:]] // most == local[first[:-1]] // most
    begin = first[np.append(True, ~joined)]
    for low, high in zip(begin.tolist(), [*begin[1:].tolist(), len(local)], strict=True):
        yield low, high, bool(run[low] == run[high - 1])


def _block_rows(dataset: ShardedDataset) -> tuple[int, int]:
    """Smallest and largest number of rows to read at a time."""
    step = dataset.chunk_rows if dataset.chunk_rows > 1 else max(1, _BLOCK_BYTES // dataset.row_bytes)
    return step, step * max(1, _MAX_BLOCK_BYTES // (step * dataset.row_bytes))
