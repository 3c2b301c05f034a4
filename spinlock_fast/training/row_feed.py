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

_HALF_BYTES = 1 << 24  # size of each half of the double buffer; the first copy of an epoch is not overlapped
_READERS = 4  # threads that gather rows; with a memory map, several can wait for the disk at once


class Feed(Protocol):
    """Gives the steps of an epoch their rows."""

    table: Tensor
    """[M, F] on the device; keeps its place."""

    def begin(self, order: Tensor, done: int) -> Tensor:
        """Starts an epoch of which `done` steps are made; where in the table each row of the order [N] will lie."""

    def ready(self, step: int) -> int:
        """How many steps can be launched, from this one of the epoch on; all before it have been."""


class ResidentFeed:
    """All rows are there."""

    def __init__(self, x: Tensor) -> None:
        self.table = x

    def begin(self, order: Tensor, done: int) -> Tensor:
        return order

    def ready(self, step: int) -> int:
        return sys.maxsize


class StreamedFeed:
    """The table has two halves: while the steps of one run, threads gather the rows of the other.

    Rows lie in a half in the order of their steps. Host memory, halves and copies are waited for where they are used
    again, so the host is never more than two halves ahead of the device.

    Args:
        x: the rows.
        batch: rows of a step.
    """

    def __init__(self, x: HostRows, batch: int) -> None:
        steps = -(-len(x) // batch)
        self._batch = batch
        self._steps = min(max(1, _HALF_BYTES // (4 * batch * x.shape[1])), steps)  # of a half
        self._half = self._steps * batch
        self.table = torch.empty(2 * self._half, x.shape[1], dtype=torch.float32, device=x.device)
        halves = self.table.split(self._half)
        self._transfer: Transfer = CopyStream(halves) if x.device.type == "cuda" else NoTransfer(halves)
        self._rows = x.rows
        self._readers = ThreadPoolExecutor(_READERS, "rows")
        self._gathering: list[Future[None]] = []
        self._order: NDArray[np.int64] = np.empty(0, np.int64)
        self._current: int | None = None  # which piece of the order the steps are at; it lies in half current % 2

    def begin(self, order: Tensor, done: int) -> Tensor:
        self._leave()
        self._wait()
        self._order = order.numpy()
        self._gather(done // self._steps)
        return torch.arange(len(order)) % len(self.table)

    def ready(self, step: int) -> int:
        piece = step // self._steps
        if piece != self._current:
            self._leave()
            self._wait()
            self._transfer.send(piece % 2, len(self._piece(piece)))
            self._current = piece
            self._gather(piece + 1)
        return (piece + 1) * self._steps - step

    def _piece(self, piece: int) -> NDArray[np.int64]:
        return self._order[piece * self._half : (piece + 1) * self._half]

    def _gather(self, piece: int) -> None:
        """Starts to gather a piece of the order; nothing is left to do after the last."""
        numbers = self._piece(piece)
        if not len(numbers):
            return
        host = self._transfer.staging(piece % 2)[: len(numbers)].numpy()
        parts = zip(np.array_split(numbers, _READERS), np.array_split(host, _READERS), strict=True)
        self._gathering = [self._readers.submit(self._rows.read, part, out) for part, out in parts]

    def _wait(self) -> None:
        while self._gathering:
            self._gathering.pop().result()

    def _leave(self) -> None:
        if self._current is not None:
            self._transfer.release(self._current % 2)
            self._current = None


class Transfer(Protocol):
    """Brings gathered rows into a half of the table."""

    def staging(self, half: int) -> Tensor:
        """Host memory to gather the rows of a half in; waits until it is free."""

    def send(self, half: int, rows: int) -> None:
        """Copies the first rows to the device once no step reads the half; steps launched later wait for that."""

    def release(self, half: int) -> None:
        """No step that is launched from now on reads what lies in the half."""


class NoTransfer:
    """On a CPU rows are gathered where they are read: a step is over when its call returns."""

    def __init__(self, halves: tuple[Tensor, ...]) -> None:
        self._halves = halves

    def staging(self, half: int) -> Tensor:
        return self._halves[half]

    def send(self, half: int, rows: int) -> None:
        pass

    def release(self, half: int) -> None:
        pass


class CopyStream:
    """Copies from page-locked memory beside the steps. Threads that gather never call CUDA: a capture forbids it."""

    def __init__(self, halves: tuple[Tensor, ...]) -> None:
        self._device = device = halves[0].device
        self._halves = halves
        self._staging = [torch.empty(half.shape, dtype=half.dtype, pin_memory=device.type == "cuda") for half in halves]
        self._stream: Any = torch.cuda.Stream(device)
        self._stream.wait_stream(self._steps_stream())  # what had the memory of the halves before
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


def feed_rows(x: Rows, batch: int) -> Feed:
    """What gives the steps of an epoch rows x [N, F]."""
    return StreamedFeed(x, batch) if isinstance(x, HostRows) else ResidentFeed(x)
