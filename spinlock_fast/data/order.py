"""In which order rows are visited: a function of seed, epoch, rank and sizes, never of threads or timing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]

_UNITS, _WINDOW, _ROWS = range(3)  # what a stream of random numbers is for


class Order(Protocol):
    """What a pass over rows must know."""

    @property
    def most_rows(self) -> tuple[int, int]:
        """Of a batch, of a window."""

    @property
    def batch_ends(self) -> Rows:
        """Position after each batch."""

    def windows(self, epoch: int) -> Iterator[tuple[int, Rows]]:
        """(first position, rows) of runs that are best read together, in order."""


@dataclass(frozen=True)
class GivenRows:
    """One batch of exactly these rows."""

    rows: Rows

    @property
    def most_rows(self) -> tuple[int, int]:
        return len(self.rows), len(self.rows)

    @property
    def batch_ends(self) -> Rows:
        return np.array([len(self.rows)])

    def windows(self, epoch: int) -> Iterator[tuple[int, Rows]]:
        yield 0, self.rows


@dataclass(frozen=True)
class RowOrder:
    """Rows of one rank, epoch by epoch.

    Rows that are stored together form units. `shuffle=True` permutes the units of all shards, gives every rank an
    equal run of them, and shuffles rows within windows of as many units as fit in `window_rows`; "exact" permutes
    rows; False leaves them as they are.
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
        """Rows of all ranks."""
        return sum(self.shard_rows)

    @property
    def bytes(self) -> int:
        """Of memory for the order of an epoch."""
        numbers = self.rows if self.shuffle == "exact" else 3 * (self.rows // self.unit_rows)
        return 8 * (numbers + self.rows // self.batch_size)

    @property
    def most_rows(self) -> tuple[int, int]:
        return min(self.batch_size, self.rows), self.window_rows

    @property
    def span(self) -> tuple[int, int]:
        """The positions of this rank in the order of all ranks; sizes differ by one row at most."""
        return tuple(self.rows * r // self.world_size for r in (self.rank, self.rank + 1))  # type: ignore[return-value]

    @cached_property
    def batch_ends(self) -> Rows:
        """Position after each batch. Every rank has as many batches (but for batches of one row, where that cannot be),
        so the last but one may be a row short.
        """
        if self.drop_last:
            count = self.rows // self.world_size // self.batch_size
            return np.arange(1, count + 1, dtype=np.int64) * self.batch_size
        largest = -(-self.rows // self.world_size)
        size = self.span[1] - self.span[0]
        count = min(-(-largest // self.batch_size), size)
        ends = np.arange(1, count + 1, dtype=np.int64) * self.batch_size
        ends[-1:] = size
        if count > 1 and ends[-2] == size:
            ends[-2] -= 1
        return ends

    def windows(self, epoch: int) -> Iterator[tuple[int, Rows]]:
        """(first position of this rank, rows) of runs that are best read together, in order."""
        if self.shuffle == "exact":
            yield from self._exact(epoch)
            return
        start, length = self._units
        if self.shuffle:
            chosen = self._permutation(len(start), _UNITS, epoch)
            start, length = start[chosen], length[chosen]
        end = np.cumsum(length)
        low, high = self.span
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
            rows = rows[position - first : stop - first]  # a rank may begin and end within a unit
            if self.shuffle:
                rows = rows[self._permutation(len(rows), _WINDOW, epoch, self.rank, number)]
            yield position - low, rows
            unit, position, number = stop_unit, stop, number + 1

    def _exact(self, epoch: int) -> Iterator[tuple[int, Rows]]:
        low, high = self.span
        rows = self._permutation(self.rows, _ROWS, epoch)[low:high]
        for first in range(0, len(rows), self.window_rows):
            yield first, rows[first : first + self.window_rows]

    @cached_property
    def _units(self) -> tuple[Rows, Rows]:
        """First row and number of rows of every unit; none crosses a shard."""
        starts, lengths, shard_start = [], [], 0
        for rows in self.shard_rows:
            start = np.arange(0, rows, self.unit_rows, dtype=np.int64)
            starts.append(start + shard_start)
            lengths.append(np.minimum(self.unit_rows, rows - start))
            shard_start += rows
        return np.concatenate(starts), np.concatenate(lengths)

    def _permutation(self, count: int, *purpose: int) -> Rows:
        # Sorting raw bits gives the same order with every version of numpy; its own permutation() need not.
        bits = np.random.Philox(np.random.SeedSequence([self.seed, *purpose]))
        return np.argsort(bits.random_raw(count), kind="stable")
