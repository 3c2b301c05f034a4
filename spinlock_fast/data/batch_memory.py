"""Memory for batches, reused when the caller no longer holds a reference to it."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def _reference_count(blocks: list[NDArray[Any]], i: int) -> int:
    return sys.getrefcount(blocks[i])


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
        self._most_rows = max_rows
        self._max_blocks = max_blocks
        self.pin = pin
        self._blocks: list[NDArray[Any]] = []

    def allocate(self, rows: int) -> Tensor:
        """Returns an uninitialised tensor [rows, *row_shape]."""
        shape = (rows, *self._row_shape)
        if self.pin:
            return torch.empty(shape, dtype=_TORCH[self._dtype.str[1:]], pin_memory=True)
        return torch.from_numpy(self._unused_block()[:rows])

    def _unused_block(self) -> NDArray[Any]:
        for i in range(len(self._blocks)):
            if _reference_count(self._blocks, i) == _UNUSED_COUNT:
                return self._blocks[i]
        # NumPy requests huge pages, torch.empty does not.
        block = np.empty((self._most_rows, *self._row_shape), self._dtype)
        self._blocks.append(block)
        del self._blocks[: -self._max_blocks]
        return block


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
