"""Permutations of many elements without a table."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spinlock_fast.data.permutation import Feistel, Identity, Permutation, Table


@given(count=st.integers(0, 700), seed=st.integers(0, 2**60))
def test_feistel_network_is_a_permutation_and_its_inverse(count: int, seed: int) -> None:
    order = Feistel(count, [seed])
    numbers = order[np.arange(count)]
    assert sorted(numbers.tolist()) == list(range(count))
    assert order.positions_of(numbers).tolist() == list(range(count))


def test_feistel_network_of_a_large_range_is_invertible() -> None:
    order = Feistel(10**15 + 7, [3])
    positions = np.arange(10**15 - 1000, 10**15 + 7)
    numbers = order[positions]
    assert len(np.unique(numbers)) == len(positions)
    assert (order.positions_of(numbers) == positions).all()


@pytest.mark.parametrize("order", [Identity(50), Table(50, [1]), Feistel(50, [1])], ids=lambda order: type(order))
def test_positions_of_numbers(order: Permutation) -> None:
    assert sorted(order.positions_of(order[np.array([4, 30, 11])]).tolist()) == [4, 11, 30]


def test_feistel_network_is_stable_across_versions() -> None:
    """Resuming with another version of NumPy must give the same rows."""
    assert Feistel(1000, [0])[np.arange(8)].tolist() == FIRST


def test_feistel_network_mixes_as_well_as_random_numbers() -> None:
    """Chi-squared of (position block, number block), and of differences of neighbours, over 20 keys."""
    count, cells = 4096, 16
    for statistic in (lambda numbers: numbers, lambda numbers: (numbers - np.roll(numbers, 1)) % count):
        values = []
        for key in range(20):
            numbers = statistic(Feistel(count, [key])[np.arange(count)])
            table = np.histogram2d(np.arange(count), numbers, bins=cells, range=[[0, count]] * 2)[0]
            values.append(((table - count / cells**2) ** 2).sum() / (count / cells**2))
        degrees = (cells - 1) ** 2
        assert abs(np.mean(values) - degrees) < 4 * (2 * degrees / 20) ** 0.5 + 0.1 * degrees


FIRST = [709, 637, 638, 887, 145, 293, 109, 645]
