"""Pages of memory maps: returned to the system after reading, so that a map does not fill the process's memory."""

from __future__ import annotations

import mmap
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

_RESIDENT_BYTES = 1 << 27  # of maps, between two releases
_PARTS_ROWS = 128  # scattered rows between two looks at the resident memory; one may map 2 MB of its file
_DENSE_BYTES = 1 << 25


class MappedPages:
    """Releases the pages of a memory map when the process holds more than 128 MiB of them.

    The file keeps the values, in general in the page cache of the system. No effect for other arrays, nor on systems
    other than Linux.

    Args:
        matrix: [N, F]; a view of an `mmap.mmap`, such as a `numpy.memmap`, or any other array.
    """

    def __init__(self, matrix: NDArray[Any]) -> None:
        self._map = _map_of(matrix)
        self._row_bytes = max(matrix[:1].nbytes, 1)
        self._others = 0  # resident bytes of libraries and other maps
        self.release()

    @property
    def is_mapped(self) -> bool:
        """Whether the matrix is a shared memory map."""
        return self._map is not None

    def rows_at_once(self, row_numbers: NDArray[np.int64]) -> int:
        """How many of these rows to read between two calls of `release_if_many`."""
        count = max(len(row_numbers), 1)
        if self._map is None or not len(row_numbers):
            return count
        span = (int(row_numbers.max()) - int(row_numbers.min()) + 1) * self._row_bytes
        return count if span <= _DENSE_BYTES else _PARTS_ROWS

    def release_if_many(self) -> None:
        """To be called after rows were read or written."""
        if self._map is not None and _resident_file_bytes() > self._others + _RESIDENT_BYTES:
            self.release()

    def release(self) -> None:
        """Releases all pages; a later access finds the same values."""
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)
            self._others = _resident_file_bytes()


def _resident_file_bytes() -> int:
    """Resident memory of this process that is backed by files; 0 where the system does not say."""
    try:
        with open("/proc/self/statm", "rb", buffering=0) as file:
            return int(file.read().split()[2]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _map_of(array: Any) -> mmap.mmap | None:
    """The shared memory map that an array is a view of; None for other arrays and private maps."""
    while isinstance(array, np.ndarray):
        if isinstance(array, np.memmap) and array.mode == "c":
            return None  # changed pages of a private map exist in memory only
        array = array.base
    array = array.obj if isinstance(array, memoryview) else array
    return array if isinstance(array, mmap.mmap) else None
