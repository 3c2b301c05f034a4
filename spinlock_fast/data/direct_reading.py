"""Whether the caller reads a batch when it requests it, instead of threads that read ahead."""

from __future__ import annotations

from collections import deque

from spinlock_fast.data.remote_files import remote_file
from spinlock_fast.data.row_order import RowSequence
from spinlock_fast.data.sharded_dataset import ShardedDatasets

_CALLS = 4
_MAX_THREADS = 2
# Reading ahead saves at most the time that the caller takes for a batch. Below both limits that is less than switching
# between threads costs, or than an eighth of the time for copying the batch.
_SWITCH_SECONDS = 30e-6
_BYTES_PER_SECOND = 80e9


class CallerTime:
    """Time that the caller takes for each of its last batches; shared by the passes of a loader."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=_CALLS)

    def add(self, seconds: float) -> None:
        self._seconds.append(seconds)

    def shorter_than(self, seconds: float) -> bool:
        """Whether the shortest of the last times is; the others may include interruptions by other processes."""
        return len(self._seconds) == _CALLS and min(self._seconds) < seconds


def direct_reading_seconds(sharded: ShardedDatasets, order: RowSequence, threads: int) -> float:
    """Time per batch below which the caller reads the batches of a pass itself; 0 if threads read all."""
    if (
        threads > _MAX_THREADS  # they copy faster than one
        or order.first_row is None
        or any(dataset.h5py_reason or dataset.chunk_bytes for dataset in sharded.datasets)
        or any(remote_file(file) is not None for file in sharded.files)
    ):
        return 0.0
    batch_bytes = order.max_rows[0] * sum(dataset.row_bytes for dataset in sharded.datasets)
    return max(_SWITCH_SECONDS, batch_bytes / _BYTES_PER_SECOND)
