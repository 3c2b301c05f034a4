"""Where a model finds rows: on its device, or in main memory, from where they follow as they are needed.

A `Tensor` on the device and `HostRows` serve alike: both have `shape`, `device`, `dtype`, rows by `x[numbers]` and
blocks by `x.split(n)`, and give the same values.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spinlock_fast.errors import DataError
from spinlock_fast.features.selection import Selection

log = logging.getLogger(__name__)

# Rows stay on the device where they take at most this share of its free memory: steps and validations need some of it.
_SHARE = 0.5
_HALF_BYTES = 1 << 24  # of the rows that lie on the device while others arrive; nothing hides the first of an epoch
_BLOCK_BYTES = 1 << 23  # of rows on their way to stay there: page-locked memory takes long to get
_READERS = 4  # threads that gather rows: more than one waits for the disk under a memory map


class HostRows:
    """Rows of main memory, or of a memory map, which come to a device when they are asked for.

    Args:
        rows: [N, F].
        device: where they are needed; may be the CPU.
    """

    dtype = torch.float32

    def __init__(self, rows: Selection, device: torch.device) -> None:
        self.rows = rows
        self.device = torch.empty(0, device=device).device  # with its number, as tensors have it
        self.shape = torch.Size(rows.shape)
        self._copied = torch.cuda.Event() if device.type == "cuda" else None

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, numbers: Tensor) -> Tensor:
        """[n, F] rows by number [n], on the device."""
        return self._sent(numbers.cpu().numpy())

    def split(self, most: int) -> Iterator[Tensor]:
        """All rows in blocks of `most`, on the device, one after another."""
        for start in range(0, len(self), most):
            yield self._sent(slice(start, min(start + most, len(self))))

    def resident(self) -> Tensor:
        """All rows on the device; raises MemoryError or torch.OutOfMemoryError where they do not fit."""
        if self._copied is None:
            return torch.from_numpy(self.rows[:])
        x = torch.empty(self.shape, device=self.device)
        most = max(1, _BLOCK_BYTES // max(x[:1].nbytes, 1))
        for part, block in zip(x.split(most), self.split(most), strict=True):
            part.copy_(block)
        return x

    def _sent(self, places: slice | NDArray[np.int64]) -> Tensor:
        count = len(places) if not isinstance(places, slice) else places.stop - places.start
        if self._copied is not None:
            self._copied.synchronize()  # else a slow device would leave ever more rows waiting in page-locked memory
        host = torch.empty(count, self.shape[1], pin_memory=self._copied is not None)
        self.rows.read(places, host.numpy())
        rows = host.to(self.device, non_blocking=True)
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self.device))
        return rows


Rows = Tensor | HostRows

# Rows that the model sees at once: what stays in the caches of a CPU, few launches elsewhere.
_ROWS_AT_ONCE = {"cpu": 1024}
_ROWS_AT_ONCE_ELSEWHERE = 16384


def blocks_of(x: Rows) -> Iterable[Tensor]:
    """The rows in blocks of nearly one size."""
    most = _ROWS_AT_ONCE.get(x.device.type, _ROWS_AT_ONCE_ELSEWHERE)
    count = max(1, -(-x.shape[0] // most))
    blocks: Iterable[Tensor] = x.split(max(1, -(-x.shape[0] // count)))
    return blocks


def place_rows(rows: Selection, device: torch.device, where: Literal["auto", "always", "never"] = "auto") -> Rows:
    """Rows on the device, or in main memory if they are too large for it ("auto") or shall stay there ("never").

    Raises:
        DataError: they must lie on the device ("always") and do not fit.
    """
    host = HostRows(rows, device)
    size = 4 * rows.shape[0] * rows.shape[1]
    if where == "never" or (where == "auto" and size > _SHARE * free_memory(device)):
        return host
    try:
        return host.resident()
    except (MemoryError, torch.OutOfMemoryError):
        if where == "auto":
            return host
        raise DataError(
            f"{rows.shape[0]:,} rows of {rows.shape[1]} features take {size / 1e9:.2f} GB, but {device} has "
            f"{free_memory(device) / 1e9:.2f} GB free; training.data_on_device: auto leaves them in main memory"
        ) from None


def free_memory(device: torch.device) -> float:
    """Bytes that can still be had; infinite where the system does not tell."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + unused)
    free = _number_after("/proc/meminfo", "MemAvailable:") * 1024
    group = "/sys/fs/cgroup/memory"  # of a container; pages of files can be dropped, what else it holds cannot
    return min(free, _number_after(f"{group}.max", "") - _number_after(f"{group}.stat", "anon ", 0.0))


def _number_after(path: str, label: str, otherwise: float = float("inf")) -> float:
    try:
        lines = Path(path).read_text().splitlines()
        return next(float(line.removeprefix(label).split()[0]) for line in lines if line.startswith(label))
    except (OSError, ValueError, StopIteration):
        return otherwise


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
        self.table = torch.empty(2 * self._half, x.shape[1], device=x.device)
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
        self._staging = [torch.empty(half.shape, pin_memory=device.type == "cuda") for half in halves]
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
