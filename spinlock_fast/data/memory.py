"""Memory for batches, used again once the caller has let go of it."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def _references(blocks: list[NDArray[Any]], i: int) -> int:
    return sys.getrefcount(blocks[i])


# Of a block that nothing but the list refers to; what the interpreter itself holds differs between its versions.
_UNUSED = _references([np.empty(0)], 0)


class BatchMemory:
    """Tensors of one dataset with up to `most_rows` rows.

    Fresh memory costs a page fault for every 4 KiB, more than reading uncompressed data does. A block is used again
    when no tensor, view or array refers to it any more; a caller that keeps its batches gets new ones.

    Args:
        keep: blocks that are kept for later at most.
        pin: page-locked memory; torch has a cache of its own for it, which waits for copies to the device.
    """

    def __init__(self, row_shape: tuple[int, ...], dtype: np.dtype[Any], most_rows: int, keep: int, pin: bool) -> None:
        self._row_shape = row_shape
        self._dtype = dtype
        self._most_rows = most_rows
        self._keep = keep
        self.pin = pin
        self._blocks: list[NDArray[Any]] = []

    def take(self, rows: int) -> Tensor:
        """An uninitialised tensor [rows, *row_shape]."""
        shape = (rows, *self._row_shape)
        if self.pin:
            return torch.empty(shape, dtype=_TORCH[self._dtype.str[1:]], pin_memory=True)
        return torch.from_numpy(self._block()[:rows])

    def _block(self) -> NDArray[Any]:
        for i in range(len(self._blocks)):
            if _references(self._blocks, i) == _UNUSED:
                return self._blocks[i]
        # numpy asks for large pages, which torch.empty does not.
        block = np.empty((self._most_rows, *self._row_shape), self._dtype)
        self._blocks.append(block)
        del self._blocks[: -self._keep]
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
