"""Recognising rows of a run, and rows out of distribution."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spinlock_fast.features.row_keys import row_keys
from spinlock_fast.models.input_check import (
    TEST,
    TRAIN,
    UNKNOWN,
    VALIDATION,
    InputCheck,
    KnownRows,
    RowStatistic,
    TrainingRange,
)


def test_unchanged_data_get_their_split_despite_equal_rows() -> None:
    keys = np.array([5, 5, 7, 8, 5], np.int64)
    known = KnownRows.of(keys, np.array([1]), np.array([3]))
    assert known.splits_of(keys).tolist() == [TRAIN, VALIDATION, TRAIN, TEST, TRAIN]
    assert known.splits_of(np.array([8, 5, 9, 7, -1], np.int64)).tolist() == [TEST, TRAIN, UNKNOWN, TRAIN, UNKNOWN]
    again = KnownRows.from_state(known.state())
    assert again.splits_of(keys).tolist() == known.splits_of(keys).tolist()


@pytest.mark.parametrize("shape", [(4,), (3, 5), (700,), (64, 63)])
def test_key_depends_only_on_the_row(shape: tuple[int, ...]) -> None:
    x = torch.randn(20, *shape)
    keys = row_keys(x, "family")
    assert len(set(keys.tolist())) == 20
    assert torch.equal(row_keys(x.flip(0), "family"), keys.flip(0))
    assert torch.equal(torch.cat([row_keys(part, "family") for part in x.split(7)]), keys)
    assert torch.equal(row_keys(x.double(), "family"), keys)
    assert not torch.equal(row_keys(x, "other"), keys)
    changed = x.clone()
    changed[3].flatten()[-1] += 1e-3
    assert (row_keys(changed, "family") != keys).nonzero().flatten().tolist() == [3]


def test_missing_values_have_the_same_key() -> None:
    x = torch.zeros(2, 3)
    x[0, 1] = torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32)[0]
    x[1, 1] = float("nan")
    keys = row_keys(x, "family")
    assert keys[0] == keys[1] != row_keys(torch.zeros(1, 3), "family")[0]


def test_few_heavy_tailed_rows_are_not_out_of_distribution() -> None:
    rng = np.random.default_rng(0)
    errors = rng.lognormal(-3.0, 1.0, 5000)
    of_the_run = RowStatistic.of(errors[:50])
    for rows in (1, 3, 30, 400):
        alarms = [of_the_run.is_exceeded_by(rng.choice(errors, rows)) for _ in range(500)]
        assert np.mean(alarms) < 0.02
        assert of_the_run.is_exceeded_by(40.0 * rng.choice(errors, rows) + 1.0)
    assert of_the_run.is_exceeded_by(np.array([np.nan]))


def test_no_reference_gives_no_warning() -> None:
    check = InputCheck(None, 10)
    check.add_features(np.zeros((10, 2), np.float32))
    assert check.summary() is None
    assert check.warnings() == []


def test_rows_without_values_are_counted_by_family() -> None:
    check = InputCheck(None, 6)
    gaps = torch.full((3, 4), float("nan"))
    gaps[1, 2] = 0.0  # one value
    gaps[2, 0] = 0.0
    check.add_raw({"summary": gaps, "series": torch.zeros(3, 2, 2), "kinds": torch.ones(3, 1, dtype=torch.int64)})
    check.add_raw({"summary": gaps[:1].repeat(3, 1), "series": torch.zeros(3, 2, 2)})
    (line,) = check.warnings()
    assert line.startswith("4 of 6 rows have no value in family summary: ")


def test_training_range_round_trips() -> None:
    known = TrainingRange(np.zeros(2), np.ones(2), RowStatistic(100, 0.01, 0.02), RowStatistic(10, 0.1, 0.1))
    again = TrainingRange.from_state(known.state())
    assert (again.outside, again.error) == (known.outside, known.error)
    check = InputCheck(again, 4)
    check.add_features(np.array([[0.5, 0.5], [2.0, 0.5], [-1.0, 9.0], [0.0, 1.0]], np.float32))
    summary = check.summary()
    assert summary is not None
    assert summary["outside_range"] == pytest.approx(3 / 8)
    assert summary["far_outside"]
