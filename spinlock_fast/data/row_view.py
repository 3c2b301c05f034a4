"""Some rows of a matrix that may be larger than the memory."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray


class RowView:
    """Rows of a matrix by number; none is copied before it is read.

    As much of an array as statistics need: `shape`, and rows by a slice or by their places in the selection.

    Args:
        matrix: [N, F] float32, contiguous; may be a memory map.
        numbers: [n] of rows, all of them when not given.
        transform: what is read of rows [m, F] becomes transform(rows) [m, F], float32.
    """

    def __init__(
        self,
        matrix: NDArray[np.float32],
        numbers: NDArray[np.int64] | None = None,
        transform: Callable[[NDArray[np.float32]], NDArray[np.float32]] | None = None,
    ) -> None:
        self._matrix = np.asarray(matrix)  # of a memory map the plain view, which is quicker to index
        self._numbers = np.arange(len(matrix)) if numbers is None else numbers
        self._transform = transform
        self.shape = (len(self._numbers), matrix.shape[1])

    def __getitem__(self, places: slice | NDArray[np.int64]) -> NDArray[np.float32]:
        """A copy of rows."""
        numbers = self._numbers[places]
        found: NDArray[np.float32] = np.empty((len(numbers), self.shape[1]), np.float32)
        self._read(numbers, found)
        return found

    def part(self, places: NDArray[np.int64]) -> RowView:
        """The rows at some places of this selection."""
        return RowView(self._matrix, self._numbers[places])

    def read(self, places: slice | NDArray[np.int64], out: NDArray[np.float32]) -> None:
        """Copies rows to `out` [len(places), F], without the interpreter's lock."""
        self._read(self._numbers[places], out)

    def _read(self, numbers: NDArray[np.int64], out: NDArray[np.float32]) -> None:
        # The mode that checks every number first copies to a buffer: half as fast.
        np.take(self._matrix, numbers, axis=0, out=out, mode="clip")
        if self._transform is not None:
            out[...] = self._transform(out)
