"""Memory for batches, reused when the caller no longer holds a reference to it."""

from __future__ import annotations

import sys
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def _reference_count(blocks: list[NDArray[Any]], i: int) -> int:
    return sys.getrefcount(blocks[i])


# Processors may copy several times slower if the destination lies 1 to 31 bytes after the source, modulo the page size.
# Large NumPy arrays often begin 16 bytes after a page boundary, and datasets of aligned files at one.
_ALIGNMENT = 4096
_LARGE = 64 * _ALIGNMENT  # smaller blocks would grow by more than 2 %


# Reference count of a block that only the list refers to; depends on the interpreter version.
_UNUSED_COUNT = _reference_count([np.empty(0)], 0)


class BatchMemory:
    """Allocates tensors [rows, *row_shape] of one dataset and reuses their memory.

    New memory costs a page fault per 4 KiB, more time than reading uncompressed data. A block is reused when no tensor,
    view or array refers to it; a caller that keeps its batches gets new blocks.

    Args:
        row_shape: shape of a row.
        dtype: type of the elements.
        max_rows: largest number of rows of a tensor.
        max_blocks: number of blocks that are kept for reuse.
        pin: allocate pinned memory from PyTorch's own cache, which waits for copies to the device.
    """

    def __init__(
        self, row_shape: tuple[int, ...], dtype: np.dtype[Any], max_rows: int, max_blocks: int, pin: bool
    ) -> None:
        self._row_shape = row_shape
        self._dtype = dtype
        self._max_rows = max_rows
        self._max_blocks = max_blocks
        self.pin = pin
        self._blocks: list[NDArray[np.uint8]] = []  # NumPy's views keep a reference to the array that owns the memory
        self._offsets: list[int] = []  # of the first row in each block

    def allocate(self, rows: int) -> tuple[Tensor, NDArray[Any]]:
        """Returns an uninitialised tensor [rows, *row_shape], and an array with the same memory."""
        if self.pin:
            tensor = torch.empty((rows, *self._row_shape), dtype=_TORCH[self._dtype.str[1:]], pin_memory=True)
            return tensor, tensor.numpy()
        i = self._unused_block()
        array = np.ndarray((rows, *self._row_shape), self._dtype, self._blocks[i], self._offsets[i])
        return torch.from_numpy(array), array

    def _unused_block(self) -> int:
        """Number of a block to which only the list refers."""
        for i in range(len(self._blocks)):
            if _reference_count(self._blocks, i) == _UNUSED_COUNT:
                return i
        # NumPy requests huge pages, torch.empty does not.
        size = self._max_rows * prod(self._row_shape) * self._dtype.itemsize
        alignment = _ALIGNMENT if size >= _LARGE else 1
        block = np.empty(size + alignment - 1, np.uint8)
        self._blocks.append(block)
        self._offsets.append(-block.ctypes.data % alignment)
        del self._blocks[: -self._max_blocks], self._offsets[: -self._max_blocks]
        return len(self._blocks) - 1


_TORCH = {
    "f2": torch.float16,
    "f4": torch.float32,
    "f8": torch.float64,
    "i1": torch.int8,
    "i2": torch.int16,
    "i4": torch.int32,
    "i8": torch.int64,
    "u1": torch.uint8,
    "u2": torch.uint16,
    "u4": torch.uint32,
    "u8": torch.uint64,
}
