"""Units of consecutive rows of shards, in the order of a permutation, found without a table of all units."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from spinlock_fast.data.permutation import Identity, Permutation

Numbers = NDArray[np.int64]


class RowUnits:
    """Units of `unit_rows` rows of some shards; the last unit of a shard may be shorter, and units do not cross shards.

    Units are numbered shard by shard. Position p of the order is a row of unit `permutation[u]`, where u is the number
    of complete units before p. Only the positions of short units are stored: at most one per shard.

    Args:
        shard_rows: rows of all shards.
        shards: the shards whose units are ordered.
        unit_rows: rows of a unit.
    """

    def __init__(self, shard_rows: Sequence[int], shards: Numbers, unit_rows: int) -> None:
        rows = np.asarray(shard_rows, np.int64)
        starts = np.cumsum(rows) - rows
        self._rows, self._starts, self._unit_rows = rows[shards], starts[shards], unit_rows
        units = -(-self._rows // unit_rows)
        self._unit_ends = np.cumsum(units)  # number of units up to the end of each shard
        self._first_units = self._unit_ends - units
        self.count = int(self._unit_ends[-1]) if len(shards) else 0
        self.rows = int(self._rows.sum())
        self.ordered_by(Identity(self.count))

    def ordered_by(self, permutation: Permutation) -> RowUnits:
        """Sets the order of the units; returns this object."""
        self._permutation = permutation
        short = np.flatnonzero(self._rows % self._unit_rows)
        positions = permutation.positions_of(self._unit_ends[short] - 1)
        # `positions_of` may return any order: the length of each short unit is found again from its number.
        self._short = np.sort(positions)
        missing = self._unit_rows - self._spans(permutation[self._short])[1]
        self._missing = np.cumsum(missing)  # rows that the short units lack, up to each of them
        self._short_ends = (self._short + 1) * self._unit_rows - self._missing
        return self

    def windows(self, start: int, stop: int, window_rows: int) -> Iterator[range]:
        """Consecutive ranges of positions that cover [start, stop) and hold whole units, at most `window_rows` rows.

        The first and the last one may hold a part of a unit; a unit larger than a window is a window.
        """
        position = start
        while position < stop:
            end = self._end(self._units_before(position + window_rows))
            if end <= position:
                end = self._end(self._units_before(position) + 1)
            yield range(position, min(end, stop))
            position = end

    def row_numbers(self, window: range) -> Numbers:
        """Row numbers at the positions of a window."""
        first, stop = self._units_before(window.start), self._units_before(window.stop - 1) + 1
        start, length = self._spans(self._permutation[np.arange(first, stop)])
        before = np.cumsum(length) - length
        rows: Numbers = np.arange(int(length.sum())) + np.repeat(start - before, length)
        skipped = window.start - self._end(first)
        return rows[skipped : skipped + len(window)]

    def _spans(self, units: Numbers) -> tuple[Numbers, Numbers]:
        """First row and number of rows of units."""
        shard = np.searchsorted(self._unit_ends, units, side="right")
        offset = (units - self._first_units[shard]) * self._unit_rows
        return self._starts[shard] + offset, np.minimum(self._unit_rows, self._rows[shard] - offset)

    def _units_before(self, position: int) -> int:
        """Number of units that end at or before a position."""
        short = int(np.searchsorted(self._short_ends, position, side="right"))
        first, end = (int(self._short[short - 1]) + 1, int(self._short_ends[short - 1])) if short else (0, 0)
        next_short = int(self._short[short]) if short < len(self._short) else self.count
        return min(first + (position - end) // self._unit_rows, next_short)

    def _end(self, units: int) -> int:
        """End position of the first `units` units."""
        short = int(np.searchsorted(self._short, units, side="left"))
        return units * self._unit_rows - (int(self._missing[short - 1]) if short else 0)
