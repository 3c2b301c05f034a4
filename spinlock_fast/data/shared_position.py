"""Epoch and batch position shared by the processes of a DataLoader."""

from __future__ import annotations

import mmap
from multiprocessing import context
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from spinlock_fast.errors import ConfigError

MAX_WORKERS = 128

_EPOCH, _RESUME_EPOCH, _RESUME_BATCH, _PASSES = range(4)
_SIZE = _PASSES + MAX_WORKERS * (MAX_WORKERS + 1) // 2  # one counter per worker, for each number of workers


class SharedPosition:
    """Last epoch that was set, batch to resume at, and number of passes that each worker has started since.

    Workers start each pass of a DataLoader once, in any order, so each has its own counter; a DataLoader with another
    number of workers continues the count. Shared memory also reaches persistent workers.
    """

    def __init__(self) -> None:
        self._values: NDArray[np.int64] = np.frombuffer(
            mmap.mmap(-1, 8 * _SIZE), np.int64
        )  # inherited by forked workers
        self._named: torch.Tensor | None = None  # copy in named shared memory, for spawned workers

    def __getstate__(self) -> Any:
        if context.get_spawning_popen() is None:
            return self._values.copy()
        if self._named is None:
            self._named = torch.from_numpy(self._values.copy()).share_memory_()
            self._values = self._named.numpy()
        return self._named

    def __setstate__(self, state: Any) -> None:
        self.__init__()  # type: ignore[misc]
        if isinstance(state, torch.Tensor):
            self._named, self._values = state, state.numpy()
        else:
            self._values[:] = state

    def set(self, epoch: int, batch: int = 0) -> None:
        """Sets the epoch and first batch of the next pass, in any process."""
        self._values[_PASSES:] = 0
        self._values[_EPOCH] = self._values[_RESUME_EPOCH] = epoch
        self._values[_RESUME_BATCH] = batch

    @property
    def workers_began(self) -> bool:
        """Whether workers have started a pass since `set`."""
        return bool(self._values[_PASSES:].any())

    @property
    def next_epoch(self) -> int:
        """The epoch after those that workers have started."""
        return self._first_epoch(0)

    def begin(self, worker: int, workers: int) -> tuple[int, int]:
        """Counts a pass of one worker; returns its epoch and first batch."""
        passes = self._passes(workers)
        epoch = self._first_epoch(workers) + int(passes[worker])
        passes[worker] += 1
        return epoch, int(self._values[_RESUME_BATCH]) if epoch == self._values[_RESUME_EPOCH] else 0

    def resume(self, worker: int, workers: int, epoch: int) -> None:
        """Sets the epoch of the next pass of one worker."""
        self._passes(workers)[worker] = epoch - self._first_epoch(workers)

    def _first_epoch(self, workers: int) -> int:
        """Epoch of the first pass with this number of workers. Passes with other numbers of workers are complete."""
        others = (count for count in range(1, MAX_WORKERS + 1) if count != workers)
        return int(self._values[_EPOCH]) + sum(int(self._passes(count).max()) for count in others)

    def _passes(self, workers: int) -> NDArray[np.int64]:
        """Counters of started passes with this number of workers, one per worker."""
        if workers > MAX_WORKERS:
            raise ConfigError(f"num_workers: {workers}, expected at most {MAX_WORKERS}")
        first = _PASSES + workers * (workers - 1) // 2
        return self._values[first : first + workers]
