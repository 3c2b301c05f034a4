"""Selected rows of a matrix that may be larger than memory."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from spinlock_fast.data.mapped_pages import MappedPages


class RowView:
    """A lazy selection of rows of a matrix: rows are copied when they are read.

    Has `shape` and supports indexing by a slice or by positions within the selection.

    Args:
        matrix: [N, F] float32, contiguous; may be a memory map, whose pages are released after reading.
        row_numbers: [n] rows to select; all rows by default.
        transform: function [m, F] -> [m, F], float32, applied to rows when they are read.
    """

    def __init__(
        self,
        matrix: NDArray[np.float32],
        row_numbers: NDArray[np.int64] | None = None,
        transform: Callable[[NDArray[np.float32]], NDArray[np.float32]] | None = None,
    ) -> None:
        self._pages = MappedPages(matrix)
        self._matrix = np.asarray(matrix)  # a plain view of a memory map is faster to index
        self._row_numbers = np.arange(len(matrix)) if row_numbers is None else row_numbers
        self._transform = transform
        self.shape = (len(self._row_numbers), matrix.shape[1])

    @property
    def is_mapped(self) -> bool:
        """Whether the rows are read from a file."""
        return self._pages.is_mapped

    def __getitem__(self, positions: slice | NDArray[np.int64]) -> NDArray[np.float32]:
        """Copies of rows [m, F]."""
        row_numbers = self._row_numbers[positions]
        rows: NDArray[np.float32] = np.empty((len(row_numbers), self.shape[1]), np.float32)
        self._read(row_numbers, rows)
        return rows

    def select(self, positions: NDArray[np.int64]) -> RowView:
        """The rows at some positions of this selection."""
        return RowView(self._matrix, self._row_numbers[positions], self._transform)

    def read(self, positions: slice | NDArray[np.int64], out: NDArray[np.float32]) -> None:
        """Copies rows to `out` [len(positions), F]; releases the GIL."""
        self._read(self._row_numbers[positions], out)

    def _read(self, row_numbers: NDArray[np.int64], out: NDArray[np.float32]) -> None:
        # mode="raise" would copy through a buffer, at half the speed; the row numbers are in range.
        step = self._pages.rows_at_once(row_numbers)
        for start in range(0, len(row_numbers), step):
            part = row_numbers[start : start + step]
            np.take(self._matrix, part, axis=0, out=out[start : start + step], mode="clip")
            self._pages.release_if_many()
        if self._transform is not None:
            out[...] = self._transform(out)
