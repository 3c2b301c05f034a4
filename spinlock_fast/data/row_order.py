"""Order of the rows of an epoch: depends on seed, epoch, rank and sizes only, not on threads or timing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from spinlock_fast.data.permutation import MAX_TABLE, Feistel, Identity, Table, permutation
from spinlock_fast.data.row_units import RowUnits

RowNumbers = NDArray[np.int64]

_UNITS, _WINDOW, _ROWS, _SHARDS = range(4)  # purposes of random streams


class RowSequence(Protocol):
    """Sequence of rows of a pass, in windows."""

    @property
    def max_rows(self) -> tuple[int, int]:
        """Largest number of rows of a batch and of a window."""

    @property
    def batch_count(self) -> int:
        """Number of batches."""

    @property
    def first_row(self) -> int | None:
        """Row at position 0 if the rows are consecutive at all positions, else None."""

    def batch_end(self, number: int) -> int:
        """End position of the first `number` batches."""

    def windows(self, epoch: int, after: int = 0) -> Iterator[tuple[int, RowNumbers]]:
        """Yields (first position, row numbers) of windows: consecutive positions whose rows are read together.

        Windows that end at position `after` or before are left out.
        """

    def shards(self, epoch: int) -> RowNumbers:
        """Shards in the order in which rows are first read from them; empty if it is unknown."""


@dataclass(frozen=True)
class SingleBatch:
    """One batch of given rows."""

    rows: RowNumbers

    @property
    def max_rows(self) -> tuple[int, int]:
        return len(self.rows), len(self.rows)

    @property
    def batch_count(self) -> int:
        return 1

    @property
    def first_row(self) -> None:
        return None

    def batch_end(self, number: int) -> int:
        return number * len(self.rows)

    def windows(self, epoch: int, after: int = 0) -> Iterator[tuple[int, RowNumbers]]:
        yield 0, self.rows

    def shards(self, epoch: int) -> RowNumbers:
        return np.empty(0, np.int64)


@dataclass(frozen=True)
class RowOrder:
    """Order of the rows of one rank for each epoch.

    Rows of a chunk form a unit. `shuffle=True` permutes the units of all shards, assigns each rank a contiguous part of
    equal size, and shuffles rows within windows of as many units as fit `window_rows`; "exact" permutes all rows; False
    keeps the order of the files, without any table.

    Up to `MAX_TABLE` units (or rows, for "exact"), the permutation is a table of 8 bytes each; larger ones are computed
    by a Feistel network for the units of a window at a time.

    With `shard_group`, the shards are permuted, and units only within groups of that many consecutive shards, one group
    after the other. An epoch then reads every shard in one piece of the order, and each rank only its part of them.
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
    shard_group: int | None = None  # number of shards whose units are permuted together; None for all

    @cached_property
    def rows(self) -> int:
        """Number of rows of all ranks."""
        return sum(self.shard_rows)

    @property
    def nbytes(self) -> int:
        """Memory for the order of an epoch, in bytes."""
        if not self.shuffle or (self.shuffle is True and self.shard_group is not None):
            return 0
        per_number = 8 if self.shuffle == "exact" else 24
        count = self.rows if self.shuffle == "exact" else self.rows // self.unit_rows
        return per_number * count if count <= MAX_TABLE else 0

    @property
    def max_rows(self) -> tuple[int, int]:
        return min(self.batch_size, self.rows), self.window_rows

    @cached_property
    def rank_range(self) -> tuple[int, int]:
        """Positions [start, stop) of this rank in the order of all ranks; sizes differ by at most one row."""
        return tuple(self.rows * r // self.world_size for r in (self.rank, self.rank + 1))  # type: ignore[return-value]

    @cached_property
    def batch_count(self) -> int:
        if self.drop_last:
            return self.rows // self.world_size // self.batch_size
        low, high = self.rank_range
        largest = -(-self.rows // self.world_size)
        return min(-(-largest // self.batch_size), high - low)

    @property
    def first_row(self) -> int | None:
        return None if self.shuffle else self.rank_range[0]

    def batch_end(self, number: int) -> int:
        """End position of the first `number` batches.

        All ranks have the same number of batches, so the last but one may be one row short. With batches of one row
        the numbers can differ.
        """
        end, count = number * self.batch_size, self.batch_count
        if self.drop_last or number == 0:
            return end
        low, high = self.rank_range
        if number == count:
            return high - low
        return end - 1 if number == count - 1 and end == high - low else end

    def windows(self, epoch: int, after: int = 0) -> Iterator[tuple[int, RowNumbers]]:
        """Yields (first position within this rank, row numbers) of windows that end after position `after`."""
        if self.shuffle == "exact":
            yield from self._exact(epoch, after)
            return
        low, high = self.rank_range
        group_start, number = 0, 0
        for units in self._unit_groups(epoch):
            first, stop = max(low - group_start, 0), min(high - group_start, units.rows)
            for window in units.windows(first, stop, self.window_rows) if first < stop else ():
                position = group_start + window.start - low
                if position + len(window) > after:
                    rows = units.row_numbers(window) if self.shuffle else np.arange(window.start, window.stop)
                    if self.shuffle:
                        key = [self.seed, _WINDOW, epoch, self.rank, number]
                        rows = rows[Table(len(rows), key).numbers]
                    yield position, rows
                number += 1
            group_start += units.rows

    def shards(self, epoch: int) -> RowNumbers:
        if self.shuffle and (self.shuffle == "exact" or self.shard_group is None):
            return np.empty(0, np.int64)
        numbers = self._shard_order(epoch)
        ends = np.cumsum(np.array(self.shard_rows, np.int64)[numbers])
        low, high = self.rank_range
        group = 1 if not self.shuffle else self.shard_group or 1
        first = int(np.searchsorted(ends, low, side="right")) // group * group
        stop = -(-(int(np.searchsorted(ends, high, side="left")) + 1) // group) * group
        return numbers[first:stop]

    def _exact(self, epoch: int, after: int) -> Iterator[tuple[int, RowNumbers]]:
        low, high = self.rank_range
        order = permutation(self.rows, [self.seed, _ROWS, epoch])
        for first in range(low + after // self.window_rows * self.window_rows, high, self.window_rows):
            stop = min(first + self.window_rows, high)
            if stop - low > after:
                yield first - low, order[np.arange(first, stop)]

    def _shard_order(self, epoch: int) -> RowNumbers:
        if not self.shuffle:
            return np.arange(len(self.shard_rows))
        return Table(len(self.shard_rows), [self.seed, _SHARDS, epoch]).numbers

    def _unit_groups(self, epoch: int) -> Iterator[RowUnits]:
        """The units of groups of shards, in the order of the epoch."""
        if not self.shuffle or self.shard_group is None:
            shards = np.arange(len(self.shard_rows))
            units = RowUnits(self.shard_rows, shards, self.unit_rows)
            key = [self.seed, _UNITS, epoch]
            yield units.ordered_by(permutation(units.count, key) if self.shuffle else Identity(units.count))
            return
        order = self._shard_order(epoch)
        for number, first in enumerate(range(0, len(order), self.shard_group)):
            units = RowUnits(self.shard_rows, order[first : first + self.shard_group], self.unit_rows)
            yield units.ordered_by(Feistel(units.count, [self.seed, _UNITS, epoch, number]))
