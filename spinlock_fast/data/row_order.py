"""Order of the rows of an epoch: depends on seed, epoch, rank and sizes only, not on threads or timing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

RowNumbers = NDArray[np.int64]

_UNITS, _WINDOW, _ROWS = range(3)  # purposes of random streams


class RowSequence(Protocol):
    """Sequence of rows of a pass, in windows."""

    @property
    def max_rows(self) -> tuple[int, int]:
        """Largest number of rows of a batch and of a window."""

    @property
    def batch_ends(self) -> RowNumbers:
        """End position of each batch."""

    def windows(self, epoch: int) -> Iterator[tuple[int, RowNumbers]]:
        """Yields (first position, row numbers) of windows: consecutive positions whose rows are read together."""


@dataclass(frozen=True)
class SingleBatch:
    """One batch of given rows."""

    rows: RowNumbers

    @property
    def max_rows(self) -> tuple[int, int]:
        return len(self.rows), len(self.rows)

    @property
    def batch_ends(self) -> RowNumbers:
        return np.array([len(self.rows)])

    def windows(self, epoch: int) -> Iterator[tuple[int, RowNumbers]]:
        yield 0, self.rows


@dataclass(frozen=True)
class RowOrder:
    """Order of the rows of one rank for each epoch.

    Rows of a chunk form a unit. `shuffle=True` permutes the units of all shards, assigns each rank a contiguous part of
    equal size, and shuffles rows within windows of as many units as fit `window_rows`; "exact" permutes all rows; False
    keeps the order of the files.
    """

    shard_rows: tuple[int, ...]
    unit_rows: int  # at most window_rows
    window_rows: int
    batch_size: int
    shuffle: bool | Literal["exact"]
    seed: int
    rank: int = 0
    world_size: int = 1
    drop_last: bool = False

    @property
    def rows(self) -> int:
        """Number of rows of all ranks."""
        return sum(self.shard_rows)

    @property
    def nbytes(self) -> int:
        """Memory for the order of an epoch, in bytes."""
        numbers = self.rows if self.shuffle == "exact" else 3 * (self.rows // self.unit_rows)
        return 8 * (numbers + self.rows // self.batch_size)

    @property
    def max_rows(self) -> tuple[int, int]:
        return min(self.batch_size, self.rows), self.window_rows

    @property
    def rank_range(self) -> tuple[int, int]:
        """Positions [start, stop) of this rank in the order of all ranks; sizes differ by at most one row."""
        return tuple(self.rows * r // self.world_size for r in (self.rank, self.rank + 1))  # type: ignore[return-value]

    @cached_property
    def batch_ends(self) -> RowNumbers:
        """End position of each batch.

        All ranks have the same number of batches, so the last but one may be one row short. With batches of one row
        the numbers can differ.
        """
        if self.drop_last:
            count = self.rows // self.world_size // self.batch_size
            return np.arange(1, count + 1, dtype=np.int64) * self.batch_size
        largest = -(-self.rows // self.world_size)
        size = self.rank_range[1] - self.rank_range[0]
        count = min(-(-largest // self.batch_size), size)
        ends = np.arange(1, count + 1, dtype=np.int64) * self.batch_size
        ends[-1:] = size
        if count > 1 and ends[-2] == size:
            ends[-2] -= 1
        return ends

    def windows(self, epoch: int) -> Iterator[tuple[int, RowNumbers]]:
        """Yields (first position within this rank, row numbers) of windows."""
        if self.shuffle == "exact":
            yield from self._exact(epoch)
            return
        start, length = self._units
        if self.shuffle:
            chosen = self._permutation(len(start), _UNITS, epoch)
            start, length = start[chosen], length[chosen]
        end = np.cumsum(length)
        low, high = self.rank_range
        unit, position = int(np.searchsorted(end, low, side="right")), low
        number = 0
        while position < high:
            stop_unit = max(unit + 1, int(np.searchsorted(end, position + self.window_rows, side="right")))
            block = slice(unit, stop_unit)
            first = int(end[unit] - length[unit])
            rows = np.arange(first, end[stop_unit - 1]) + np.repeat(
                start[block] + length[block] - end[block], length[block]
            )
            stop = min(int(end[stop_unit - 1]), high)
            rows = rows[position - first : stop - first]  # a rank may start and end within a unit
            if self.shuffle:
                rows = rows[self._permutation(len(rows), _WINDOW, epoch, self.rank, number)]
            yield position - low, rows
            unit, position, number = stop_unit, stop, number + 1

    def _exact(self, epoch: int) -> Iterator[tuple[int, RowNumbers]]:
        low, high = self.rank_range
        rows = self._permutation(self.rows, _ROWS, epoch)[low:high]
        for first in range(0, len(rows), self.window_rows):
            yield first, rows[first : first + self.window_rows]

    @cached_property
    def _units(self) -> tuple[RowNumbers, RowNumbers]:
        """First row and number of rows of each unit; units do not cross shards."""
        starts, lengths, shard_start = [], [], 0
        for rows in self.shard_rows:
            start = np.arange(0, rows, self.unit_rows, dtype=np.int64)
            starts.append(start + shard_start)
            lengths.append(np.minimum(self.unit_rows, rows - start))
            shard_start += rows
        return np.concatenate(starts), np.concatenate(lengths)

    def _permutation(self, count: int, *purpose: int) -> RowNumbers:
        # argsort of raw bits is stable across NumPy versions; Generator.permutation is not guaranteed to be.
        bits = np.random.Philox(np.random.SeedSequence([self.seed, *purpose]))
        return np.argsort(bits.random_raw(count), kind="stable")
