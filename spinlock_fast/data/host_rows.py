"""Rows of a matrix on the device, or in main memory and copied to the device on request.

A `Tensor` on the device and `HostRows` share an interface: `shape`, `device`, `dtype`, rows by `x[numbers]` and blocks
by `x.split(n)`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spinlock_fast.data.row_view import RowView
from spinlock_fast.errors import DataError

log = logging.getLogger(__name__)

# Rows stay on the device where they take at most this share of its free memory: steps and validations need some of it.
_SHARE = 0.5
_BLOCK_BYTES = 1 << 23  # of rows on their way to stay there: page-locked memory takes long to get


class HostRows:
    """Rows of main memory, or of a memory map, which come to a device when they are asked for.

    Args:
        rows: [N, F].
        device: where they are needed; may be the CPU.
    """

    dtype = torch.float32

    def __init__(self, rows: RowView, device: torch.device) -> None:
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
        x = torch.empty(self.shape, dtype=torch.float32, device=self.device)
        most = max(1, _BLOCK_BYTES // max(x[:1].nbytes, 1))
        for part, block in zip(x.split(most), self.split(most), strict=True):
            part.copy_(block)
        return x

    def _sent(self, places: slice | NDArray[np.int64]) -> Tensor:
        count = len(places) if not isinstance(places, slice) else places.stop - places.start
        if self._copied is not None:
            self._copied.synchronize()  # else a slow device would leave ever more rows waiting in page-locked memory
        host = torch.empty(count, self.shape[1], dtype=torch.float32, pin_memory=self._copied is not None)
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


def place_rows(rows: RowView, device: torch.device, where: Literal["auto", "always", "never"] = "auto") -> Rows:
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
