"""Rows of a matrix that stay in host memory and are copied to the device on request.

`HostRows` and a `Tensor` on the device share an interface: `shape`, `device`, `dtype`, `x[row_numbers]`, `x.split(n)`.
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

# Rows are placed on the device if they take at most this fraction of its free memory; training needs the rest.
_MAX_MEMORY_FRACTION = 0.5
_BLOCK_BYTES = 1 << 23  # per copy of `to_device`: allocating pinned memory is slow


class HostRows:
    """Rows in host memory or a memory map, copied to a device when they are indexed.

    Args:
        rows: [N, F].
        device: device of the copies; may be the CPU.
    """

    dtype = torch.float32

    def __init__(self, rows: RowView, device: torch.device) -> None:
        self.rows = rows
        self.device = torch.empty(0, device=device).device  # with its index, like the device of tensors
        self.shape = torch.Size(rows.shape)
        self._copy_done = torch.cuda.Event() if device.type == "cuda" else None

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, row_numbers: Tensor) -> Tensor:
        """Rows [n, F] on the device, for row numbers [n]."""
        return self._copy(row_numbers.cpu().numpy())

    def split(self, block_rows: int) -> Iterator[Tensor]:
        """Yields all rows in blocks of `block_rows` on the device."""
        for start in range(0, len(self), block_rows):
            yield self._copy(slice(start, min(start + block_rows, len(self))))

    def to_device(self) -> Tensor:
        """All rows on the device; raises MemoryError or torch.OutOfMemoryError if they do not fit."""
        if self._copy_done is None:
            return torch.from_numpy(self.rows[:])
        x = torch.empty(self.shape, dtype=torch.float32, device=self.device)
        block_rows = max(1, _BLOCK_BYTES // max(x[:1].nbytes, 1))
        for part, block in zip(x.split(block_rows), self.split(block_rows), strict=True):
            part.copy_(block)
        return x

    def _copy(self, positions: slice | NDArray[np.int64]) -> Tensor:
        count = len(positions) if not isinstance(positions, slice) else positions.stop - positions.start
        if self._copy_done is not None:
            self._copy_done.synchronize()  # limits the pinned memory in use if the device is slow
        host = torch.empty(count, self.shape[1], dtype=torch.float32, pin_memory=self._copy_done is not None)
        self.rows.read(positions, host.numpy())
        rows = host.to(self.device, non_blocking=True)
        if self._copy_done is not None:
            self._copy_done.record(torch.cuda.current_stream(self.device))
        return rows


Rows = Tensor | HostRows

# Rows per evaluation block: fits the caches of a CPU; few kernel launches on other devices.
_BLOCK_ROWS = {"cpu": 1024}
_BLOCK_ROWS_ELSEWHERE = 16384


def row_blocks(x: Rows) -> Iterable[Tensor]:
    """The rows in blocks of nearly equal size, suited to the device."""
    max_rows = _BLOCK_ROWS.get(x.device.type, _BLOCK_ROWS_ELSEWHERE)
    count = max(1, -(-x.shape[0] // max_rows))
    blocks: Iterable[Tensor] = x.split(max(1, -(-x.shape[0] // count)))
    return blocks


def place_rows(rows: RowView, device: torch.device, where: Literal["auto", "always", "never"] = "auto") -> Rows:
    """Places rows on the device or keeps them in host memory.

    Args:
        rows: [N, F].
        device: the device that processes the rows.
        where: "auto" copies the rows to the device if they fit well, but not from a memory map to the CPU; "always"
            copies them, "never" keeps them in host memory.

    Raises:
        DataError: where is "always" and the rows do not fit on the device.
    """
    host = HostRows(rows, device)
    size = 4 * rows.shape[0] * rows.shape[1]
    stays = size > _MAX_MEMORY_FRACTION * free_memory(device) or (rows.is_mapped and device.type == "cpu")
    if where == "never" or (where == "auto" and stays):
        return host
    try:
        return host.to_device()
    except (MemoryError, torch.OutOfMemoryError):
        if where == "auto":
            return host
        raise DataError(
            f"{rows.shape[0]:,} rows of {rows.shape[1]} features take {size / 1e9:.2f} GB, but {device} has "
            f"{free_memory(device) / 1e9:.2f} GB free; training.data_on_device: auto keeps them in host memory"
        ) from None


def free_memory(device: torch.device) -> float:
    """Bytes of memory available on a device; infinite if unknown."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + unused)
    free = _read_number("/proc/meminfo", "MemAvailable:") * 1024
    cgroup = "/sys/fs/cgroup/memory"  # cgroup limit of a container; only its anonymous memory cannot be reclaimed
    return min(free, _read_number(f"{cgroup}.max", "") - _read_number(f"{cgroup}.stat", "anon ", 0.0))


def _read_number(path: str, label: str, default: float = float("inf")) -> float:
    try:
        lines = Path(path).read_text().splitlines()
        return next(float(line.removeprefix(label).split()[0]) for line in lines if line.startswith(label))
    except (OSError, ValueError, StopIteration):
        return default
