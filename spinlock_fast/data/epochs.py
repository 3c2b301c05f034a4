"""Which epoch a pass is, when DataLoader workers make it: a count that all processes share."""

from __future__ import annotations

import mmap
from multiprocessing import context
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from spinlock_fast.errors import ConfigError

MOST_WORKERS = 128

_EPOCH, _RESUME_EPOCH, _RESUME_BATCH, _PASSES = range(4)
_SIZE = _PASSES + MOST_WORKERS * (MOST_WORKERS + 1) // 2  # for every number of workers, one number each


class SharedPosition:
    """The epoch that was set last, the batch to go on at, and the passes that workers have begun since.

    Workers begin each pass of a DataLoader once, in any order, so each counts for itself; those of a DataLoader with
    another number of workers continue the count. It reaches workers that live on (`persistent_workers`).
    """

    def __init__(self) -> None:
        self._values: NDArray[np.int64] = np.frombuffer(mmap.mmap(-1, 8 * _SIZE), np.int64)  # forked workers share it
        self._named: torch.Tensor | None = None  # the same in memory that spawned workers find

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
        """The next pass, whoever makes it, is `epoch`, from `batch` on."""
        self._values[_PASSES:] = 0
        self._values[_EPOCH] = self._values[_RESUME_EPOCH] = epoch
        self._values[_RESUME_BATCH] = batch

    @property
    def workers_began(self) -> bool:
        """Whether workers have begun a pass since `set`."""
        return bool(self._values[_PASSES:].any())

    @property
    def next_epoch(self) -> int:
        """The epoch after those that workers have begun."""
        return self._base(0)

    def begin(self, worker: int, workers: int) -> tuple[int, int]:
        """Counts a pass of one worker; returns its epoch, and the batch at which that epoch is to begin."""
        mine = self._passes(workers)
        epoch = self._base(workers) + int(mine[worker])
        mine[worker] += 1
        return epoch, int(self._values[_RESUME_BATCH]) if epoch == self._values[_RESUME_EPOCH] else 0

    def resume(self, worker: int, workers: int, epoch: int) -> None:
        """The next pass of one worker is `epoch`."""
        self._passes(workers)[worker] = epoch - self._base(workers)

    def _base(self, workers: int) -> int:
        """Epoch of the first pass of so many workers. Passes of other numbers are over, and do not change meanwhile."""
        others = (count for count in range(1, MOST_WORKERS + 1) if count != workers)
        return int(self._values[_EPOCH]) + sum(int(self._passes(count).max()) for count in others)

    def _passes(self, workers: int) -> NDArray[np.int64]:
        """Passes begun by each of so many workers."""
        if workers > MOST_WORKERS:
            raise ConfigError(f"num_workers: {workers}, but {MOST_WORKERS} is the most")
        first = _PASSES + workers * (workers - 1) // 2
        return self._values[first : first + workers]
