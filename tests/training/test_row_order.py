import numpy as np
import pytest
import torch

from spinlock_fast.config.random_streams import Stream, generator
from spinlock_fast.training import row_order
from spinlock_fast.training.row_order import training_order, windowed_order

COLUMNS, UNIT, WINDOW = 4, 8, 64


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(row_order, "_UNIT_BYTES", 4 * COLUMNS * UNIT)
    monkeypatch.setattr(row_order, "_WINDOW_BYTES", 4 * COLUMNS * WINDOW)


@pytest.mark.parametrize("rows", [1, 7, 64, 1000])
def test_each_row_once(small, rows):
    assert sorted(windowed_order(rows, COLUMNS, 0, 3).tolist()) == list(range(rows))


def test_a_window_reads_whole_blocks_from_everywhere_in_random_order(small):
    order = windowed_order(4096, COLUMNS, 1, 0).numpy()
    for window in order.reshape(-1, WINDOW):
        units, counts = np.unique(window // UNIT, return_counts=True)
        assert (counts == UNIT).all()
        assert np.ptp(units) > WINDOW // UNIT
        assert np.abs(np.diff(window)).mean() > UNIT


def test_seed_and_epoch_determine_the_order(small):
    order = windowed_order(1000, COLUMNS, 1, 0)
    assert torch.equal(order, windowed_order(1000, COLUMNS, 1, 0))
    for seed, epoch in ((1, 1), (2, 0)):
        assert not torch.equal(order, windowed_order(1000, COLUMNS, seed, epoch))


def test_the_order_of_a_small_matrix_is_that_of_earlier_versions(small, monkeypatch):
    expected = generator(42, Stream.ROW_ORDER, 5).permutation(100)
    assert training_order(100, COLUMNS, 42, 5).tolist() == expected.tolist()
    monkeypatch.setattr(row_order, "_AUTO_BYTES", 4 * COLUMNS * 100)
    assert training_order(99, COLUMNS, 42, 5).tolist() != windowed_order(99, COLUMNS, 42, 5).tolist()
    assert torch.equal(training_order(100, COLUMNS, 42, 5), windowed_order(100, COLUMNS, 42, 5))
    assert training_order(100, COLUMNS, 42, 5, "shuffled").tolist() == expected.tolist()
    assert torch.equal(training_order(50, COLUMNS, 42, 5, "windows"), windowed_order(50, COLUMNS, 42, 5))
