"""RowOrder: permutations, windows, ranks and batches."""

from __future__ import annotations

import itertools
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spinlock_fast.data import permutation as permutation_module
from spinlock_fast.data.row_order import RowOrder


def order(**settings: Any) -> RowOrder:
    defaults = {"shard_rows": (100,), "unit_rows": 8, "window_rows": 32, "batch_size": 10, "shuffle": True, "seed": 0}
    return RowOrder(**{**defaults, **settings})


def batch_ends(order: RowOrder) -> list[int]:
    return [order.batch_end(number + 1) for number in range(order.batch_count)]


def visited(order: RowOrder, epoch: int = 0) -> list[int]:
    """Rows in order; checks that windows are consecutive."""
    rows: list[int] = []
    for first, window in order.windows(epoch):
        assert first == len(rows)
        assert len(window) > 0
        rows += window.tolist()
    return rows


@given(
    shard_rows=st.lists(st.integers(0, 60), min_size=1, max_size=4).filter(lambda rows: sum(rows) >= 5),
    unit_rows=st.integers(1, 20),
    units_a_window=st.integers(1, 5),
    batch_size=st.integers(1, 40),
    shuffle=st.sampled_from([True, False, "exact"]),
    world_size=st.integers(1, 5),
    seed=st.integers(0, 2**40),
)
def test_ranks_partition_rows_into_equally_many_batches(
    shard_rows: list[int], unit_rows: int, units_a_window: int, world_size: int, **settings: Any
) -> None:
    ranks = [
        order(
            shard_rows=tuple(shard_rows),
            unit_rows=unit_rows,
            window_rows=unit_rows * units_a_window,
            rank=rank,
            world_size=world_size,
            **settings,
        )
        for rank in range(world_size)
    ]
    parts = [visited(rank) for rank in ranks]
    assert sorted(itertools.chain(*parts)) == list(range(sum(shard_rows)))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert settings["batch_size"] == 1 or len({rank.batch_count for rank in ranks}) == 1
    for rank, part in zip(ranks, parts, strict=True):
        sizes = np.diff(batch_ends(rank), prepend=0)
        assert (sizes > 0).all()
        assert (sizes <= rank.batch_size).all()
        assert sizes.sum() == len(part)
        assert (sizes[:-2] == rank.batch_size).all()
        assert all(len(window) <= max(rank.window_rows, unit_rows) for _, window in rank.windows(0))


@pytest.mark.parametrize("shuffle", [True, "exact"])
def test_order_depends_on_seed_epoch_rank_and_window(shuffle: Any) -> None:
    base = visited(order(shuffle=shuffle))
    assert base == visited(order(shuffle=shuffle))
    assert base == visited(order(shuffle=shuffle, batch_size=3))
    assert base != visited(order(shuffle=shuffle, seed=1))
    assert base != visited(order(shuffle=shuffle), epoch=1)
    if shuffle is True:
        assert base != visited(order(window_rows=64))


def test_order_is_stable_across_versions() -> None:
    """Resuming with another version of NumPy must give the same rows."""
    assert visited(order())[:12] == FIRST_ROWS
    assert visited(order(shuffle="exact"))[:12] == FIRST_ROWS_EXACT


def test_windows_mix_units_of_all_rows() -> None:
    many = order(shard_rows=(8000,), window_rows=800)
    for _, window in many.windows(0):
        units = np.unique(window // 8)
        assert len(units) == 100
        assert len(window) == 800
        assert units.max() - units.min() > 500  # of 1000 units: 100 adjacent units would span less
        assert (window[:-1] // 8 == window[1:] // 8).mean() < 0.1  # rows of a unit are not adjacent in the window


def test_units_do_not_cross_shards() -> None:
    rows = visited(order(shard_rows=(5, 3, 20), unit_rows=8, window_rows=8, shuffle=False))
    firsts = [int(window[0]) for _, window in order(shard_rows=(5, 3, 20), window_rows=8, shuffle=False).windows(0)]
    assert rows == list(range(28))
    assert firsts == [0, 8, 16, 24]


def test_drop_last_gives_full_batches_on_all_ranks() -> None:
    for rank in range(3):
        assert batch_ends(order(shard_rows=(65,), rank=rank, world_size=3, drop_last=True)) == [10, 20]


def test_rank_with_one_row_less_has_as_many_batches() -> None:
    ends = [batch_ends(order(shard_rows=(41,), rank=rank, world_size=2)) for rank in range(2)]
    assert ends == [[10, 19, 20], [10, 20, 21]]


FIRST_ROWS = [30, 28, 78, 65, 1, 77, 4, 68, 67, 31, 66, 5]
FIRST_ROWS_EXACT = [92, 30, 18, 4, 57, 25, 91, 59, 74, 3, 80, 97]


@given(
    shard_rows=st.lists(st.integers(0, 60), min_size=1, max_size=9).filter(lambda rows: sum(rows) >= 5),
    unit_rows=st.integers(1, 20),
    shard_group=st.integers(1, 4),
    world_size=st.integers(1, 5),
)
def test_groups_of_shards_are_read_one_after_the_other(
    shard_rows: list[int], unit_rows: int, shard_group: int, world_size: int
) -> None:
    settings = {"shard_rows": tuple(shard_rows), "unit_rows": unit_rows, "window_rows": 2 * unit_rows}
    parts, shard_of = [], np.repeat(np.arange(len(shard_rows)), shard_rows)
    for rank in range(world_size):
        part = order(**settings, shard_group=shard_group, world_size=world_size, rank=rank)
        parts.append(visited(part))
        expected = part.shards(0).tolist()
        groups = [expected.index(shard) // shard_group for shard in shard_of[parts[-1]]]
        assert groups == sorted(groups)
        assert set(expected[:shard_group]) >= {int(shard_of[parts[-1][0]])}
    assert sorted(itertools.chain(*parts)) == list(range(sum(shard_rows)))


@pytest.mark.parametrize("settings", [{}, {"shuffle": "exact"}, {"shuffle": False}, {"shard_group": 2}])
def test_windows_that_end_before_a_position_are_left_out(settings: dict[str, Any]) -> None:
    whole = order(shard_rows=(50, 33, 70), world_size=2, rank=1, **settings)
    for after in (0, 1, 40, whole.batch_end(3)):
        expected = [(first, rows.tolist()) for first, rows in whole.windows(0) if first + len(rows) > after]
        assert [(first, rows.tolist()) for first, rows in whole.windows(0, after)] == expected


@pytest.mark.parametrize("shuffle", [True, "exact"])
def test_computed_permutation_visits_each_row_once(monkeypatch: pytest.MonkeyPatch, shuffle: Any) -> None:
    table = visited(order(shard_rows=(500, 303), shuffle=shuffle))
    monkeypatch.setattr(permutation_module, "MAX_TABLE", 10)
    computed = visited(order(shard_rows=(500, 303), shuffle=shuffle))
    assert sorted(computed) == sorted(table)
    assert computed != table
    assert computed != visited(order(shard_rows=(500, 303), shuffle=shuffle), epoch=1)


def test_order_of_a_billion_rows_takes_no_table() -> None:
    for settings in ({}, {"shuffle": "exact"}, {"shuffle": False}, {"shard_group": 16}):
        large = order(shard_rows=(100_000,) * 10_000, window_rows=8192, rank=3, world_size=8, **settings)
        tracemalloc.start()
        (_, rows), (_, following) = itertools.islice(large.windows(0), 2)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert large.nbytes == 0
        assert peak < 20e6
        assert len(np.union1d(rows, following)) == len(rows) + len(following)
