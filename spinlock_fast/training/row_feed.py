"""Supplies the rows of each training step: resident on the device, or double-buffered from pinned host memory."""

from __future__ import annotations

import sys
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spinlock_fast.data.host_rows import HostRows, Rows

_HALF_BUFFER_BYTES = 1 << 24  # size of each half of the double buffer; the first copy of an epoch is not overlapped
_READERS = 4  # threads that gather rows; with a memory map, several reads can be in flight


class RowFeed(Protocol):
    """Supplies the rows of the steps of an epoch."""

    table: Tensor
    """[M, F] on the device, at a fixed address."""

    def begin_epoch(self, order: Tensor, steps_done: int) -> Tensor:
        """Starts an epoch at a step.

        Args:
            order: [n] numbers of the rows that the steps of the epoch read, in their order.
            steps_done: steps of the epoch that a resumed run has made.

        Returns:
            [n] the row of `table` that holds each row of `order` at its step.
        """

    def steps_available(self, step: int) -> int:
        """How many steps of the epoch can be launched from `step` on; all steps before it were launched."""


class ResidentFeed:
    """All rows are on the device."""

    def __init__(self, x: Tensor) -> None:
        self.table = x

    def begin_epoch(self, order: Tensor, steps_done: int) -> Tensor:
        return order

    def steps_available(self, step: int) -> int:
        return sys.maxsize


class StreamedFeed:
    """A double buffer: steps read one half of the table while threads gather the rows of the other half.

    Each half holds the rows of consecutive steps, in their order; chunk i of the epoch is in half i % 2. Staging
    memory, halves and copies are synchronised before they are reused, so the host is at most two halves ahead of the
    device.

    Args:
        x: the rows.
        rows_per_step: rows of each step; the last one may have fewer.
        steps: steps of an epoch.
    """

    def __init__(self, x: HostRows, rows_per_step: int, steps: int) -> None:
        steps_per_half = max(1, _HALF_BUFFER_BYTES // (4 * rows_per_step * x.shape[1]))
        self._steps_per_half = min(steps_per_half, steps)
        self._rows_per_half = self._steps_per_half * rows_per_step
        self.table = torch.empty(2 * self._rows_per_half, x.shape[1], dtype=torch.float32, device=x.device)
        halves = self.table.split(self._rows_per_half)
        self._transfer: Transfer = CopyStream(halves) if x.device.type == "cuda" else NoTransfer(halves)
        self._rows = x.rows
        self._readers = ThreadPoolExecutor(_READERS, "rows")
        self._pending_reads: list[Future[None]] = []
        self._order: NDArray[np.int64] = np.empty(0, np.int64)
        self._current_chunk: int | None = None

    def begin_epoch(self, order: Tensor, steps_done: int) -> Tensor:
        self._release_current_half()
        self._wait_for_readers()
        self._order = order.numpy()
        self._start_reading(steps_done // self._steps_per_half)
        return torch.arange(len(order)) % len(self.table)

    def steps_available(self, step: int) -> int:
        chunk = step // self._steps_per_half
        if chunk != self._current_chunk:
            self._release_current_half()
            self._wait_for_readers()
            self._transfer.send(chunk % 2, len(self._chunk_rows(chunk)))
            self._current_chunk = chunk
            self._start_reading(chunk + 1)
        return (chunk + 1) * self._steps_per_half - step

    def _chunk_rows(self, chunk: int) -> NDArray[np.int64]:
        return self._order[chunk * self._rows_per_half : (chunk + 1) * self._rows_per_half]

    def _start_reading(self, chunk: int) -> None:
        """Starts to gather the rows of a chunk; does nothing after the last chunk."""
        rows = self._chunk_rows(chunk)
        if not len(rows):
            return
        staging = self._transfer.staging(chunk % 2)[: len(rows)].numpy()
        parts = zip(np.array_split(rows, _READERS), np.array_split(staging, _READERS), strict=True)
        self._pending_reads = [self._readers.submit(self._rows.read, part, out) for part, out in parts]

    def _wait_for_readers(self) -> None:
        while self._pending_reads:
            self._pending_reads.pop().result()

    def _release_current_half(self) -> None:
        if self._current_chunk is not None:
            self._transfer.release(self._current_chunk % 2)
            self._current_chunk = None


class Transfer(Protocol):
    """Copies gathered rows into a half of the table."""

    def staging(self, half: int) -> Tensor:
        """Host memory to gather the rows of a half in; waits until its last copy is complete."""

    def send(self, half: int, rows: int) -> None:
        """Copies the first rows to the device after the steps that read the half; later steps wait for the copy."""

    def release(self, half: int) -> None:
        """Marks the half as unused by steps launched from now on."""


class NoTransfer:
    """For a CPU: rows are gathered into the table itself, since a step is complete when its call returns."""

    def __init__(self, halves: tuple[Tensor, ...]) -> None:
        self._halves = halves

    def staging(self, half: int) -> Tensor:
        return self._halves[half]

    def send(self, half: int, rows: int) -> None:
        pass

    def release(self, half: int) -> None:
        pass


class CopyStream:
    """Copies from pinned memory on a stream of its own.

    Reader threads make no CUDA call, which would invalidate a capture in progress.
    """

    def __init__(self, halves: tuple[Tensor, ...]) -> None:
        self._device = device = halves[0].device
        self._halves = halves
        self._staging = [torch.empty(half.shape, dtype=half.dtype, pin_memory=device.type == "cuda") for half in halves]
        self._stream: Any = torch.cuda.Stream(device)
        self._stream.wait_stream(self._steps_stream())  # earlier users of the halves' memory
        self._sent = [torch.cuda.Event() for _ in halves]
        self._free = [torch.cuda.Event() for _ in halves]

    def staging(self, half: int) -> Tensor:
        self._sent[half].synchronize()
        return self._staging[half]

    def send(self, half: int, rows: int) -> None:
        self._stream.wait_event(self._free[half])
        with torch.cuda.stream(self._stream):
            self._copy(half, rows)
            self._sent[half].record(self._stream)
        self._steps_stream().wait_event(self._sent[half])

    def release(self, half: int) -> None:
        self._free[half].record(self._steps_stream())

    def _steps_stream(self) -> Any:
        return torch.cuda.current_stream(self._device)

    def _copy(self, half: int, rows: int) -> None:
        self._halves[half][:rows].copy_(self._staging[half][:rows], non_blocking=True)


def make_row_feed(x: Rows, rows_per_step: int, steps: int) -> RowFeed:
    """The feed for rows x [N, F], by where they are stored."""
    return StreamedFeed(x, rows_per_step, steps) if isinstance(x, HostRows) else ResidentFeed(x)
