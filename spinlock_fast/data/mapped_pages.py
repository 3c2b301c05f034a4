"""Pages of memory maps: returned to the system after reading, so that a map does not fill the process's memory."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

_RESIDENT_BYTES = 1 << 27  # of a map, between two releases
_FAULT_BYTES = 1 << 16  # mapped around an address that is read for the first time (`fault_around_bytes` of Linux)


class MappedPages:
    """Counts the bytes of a memory map that become resident, and releases them beyond 128 MiB.

    The file keeps the values, in general in the page cache of the system. No effect for other arrays.

    Args:
        matrix: [N, F]; a view of an `mmap.mmap`, such as a `numpy.memmap`, or any other array.
    """

    def __init__(self, matrix: NDArray[Any]) -> None:
        self._map = _map_of(matrix)
        self._row_bytes = max(matrix[:1].nbytes, 1)
        self._resident = 0

    @property
    def is_mapped(self) -> bool:
        """Whether the matrix is a shared memory map."""
        return self._map is not None

    def touched(self, row_numbers: NDArray[np.int64]) -> None:
        """To be called after rows were read or written."""
        if self._map is None or not len(row_numbers):
            return
        span = (int(row_numbers.max()) - int(row_numbers.min()) + 1) * self._row_bytes
        self._resident += min(span, len(row_numbers) * max(self._row_bytes, _FAULT_BYTES))
        if self._resident > _RESIDENT_BYTES:
            self.release()

    def release(self) -> None:
        """Releases all pages; a later access finds the same values."""
        self._resident = 0
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


def _map_of(array: Any) -> mmap.mmap | None:
    """The shared memory map that an array is a view of; None for other arrays and private maps."""
    while isinstance(array, np.ndarray):
        if isinstance(array, np.memmap) and array.mode == "c":
            return None  # changed pages of a private map exist in memory only
        array = array.base
    array = array.obj if isinstance(array, memoryview) else array
    return array if isinstance(array, mmap.mmap) else None
