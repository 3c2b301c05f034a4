"""Missing raw values are replaced by the median of the training rows."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
import torch

from spinlock_fast.config.schema import FamilyConfig, FeatureCleaningConfig, MLPEncoderParams
from spinlock_fast.data.feature_source import FeatureSource
from spinlock_fast.features import missing as module
from spinlock_fast.features.cleaning import fit_cleaner
from spinlock_fast.features.encode import Encoded, FamilyEncoder, encode_rows, make_encoders

CPU = torch.device("cpu")
ROWS = 200
TRAIN = np.arange(0, ROWS, 2)
IDENTITY = FamilyConfig(encoder="IdentityEncoder", dataset="x")
STANDARDIZED = FamilyConfig(encoder="IdentityEncoder", dataset="x", standardize=True)


def encoded(
    path: Path, family: FamilyConfig = IDENTITY, rows: np.ndarray[Any, Any] | None = TRAIN, budget: int = 10**8
) -> tuple[Encoded, FamilyEncoder]:
    with FeatureSource(str(path), {"x": "x"}) as source:
        encoders = make_encoders(source, {"x": family}, 0, budget, rows)
        return encode_rows(source, encoders, budget, CPU, training_rows=rows), encoders[0]


@pytest.fixture
def table() -> np.ndarray[Any, Any]:
    """[200, 6]: N(300, 1) with 3 % missing; constant with 2 % missing; all missing; whole; missing but for held-out
    rows; skewed, half missing."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((ROWS, 6)).astype(np.float32)
    x[:, 0] += 300.0
    x[rng.permutation(ROWS)[:6], 0] = np.nan
    x[:, 1] = 7.0
    x[:4, 1] = np.nan
    x[:, 2] = np.nan
    x[TRAIN, 4] = np.nan
    x[:, 5] = np.exp(2.0 * x[:, 5])
    x[::4, 5] = np.nan
    return x


def write(path: Path, x: np.ndarray[Any, Any]) -> Path:
    return helpers.write_arrays(path, {"x": x})


def test_a_missing_value_is_the_median_of_the_training_rows(tmp_path: Path, table: np.ndarray[Any, Any]) -> None:
    found = encoded(write(tmp_path / "a.h5", table))[0].columns
    for column in (0, 1, 5):
        missing = np.isnan(table[:, column])
        assert np.unique(found[missing, column]) == np.nanmedian(table[TRAIN, column])
        np.testing.assert_array_equal(found[~missing, column], table[~missing, column])


def test_a_standardised_missing_value_is_the_centre(tmp_path: Path, table: np.ndarray[Any, Any]) -> None:
    found = encoded(write(tmp_path / "a.h5", table), STANDARDIZED)[0].columns
    assert np.abs(found[:, 0]).max() < 6  # 0 in place of 300 was clipped to -10
    np.testing.assert_array_equal(found[np.isnan(table)], 0.0)
    known = table[TRAIN, 0][~np.isnan(table[TRAIN, 0])]
    deviation = 1.4826 * np.median(np.abs(known - np.median(known)))
    whole = ~np.isnan(table[:, 0])
    np.testing.assert_allclose(found[whole, 0], (table[whole, 0] - np.median(known)) / deviation, atol=1e-4)


@pytest.mark.parametrize("family", [IDENTITY, STANDARDIZED])
def test_a_column_without_information_is_dropped(
    tmp_path: Path, table: np.ndarray[Any, Any], family: FamilyConfig
) -> None:
    columns = encoded(write(tmp_path / "a.h5", table), family)[0].columns
    keep = fit_cleaner(columns[TRAIN], FeatureCleaningConfig()).keep
    assert keep.tolist() == [True, False, False, True, False, True]


def test_column_without_a_training_value_does_not_affect_the_encoder(
    tmp_path: Path, table: np.ndarray[Any, Any]
) -> None:
    params = MLPEncoderParams(hidden_dims=[8], output_dim=4)
    mlp = FamilyConfig(encoder="MLPEncoder", encoder_params=params, dataset="x")
    before, family = encoded(write(tmp_path / "a.h5", table), mlp)
    assert family.dropped_columns.tolist() == [False, False, True, False, True, False]
    other = table.copy()
    other[:, 2], other[:, 4] = 1e6, -1e6
    whole = torch.from_numpy(other)
    np.testing.assert_allclose(family(whole).numpy(), before.columns, rtol=1e-5, atol=1e-6)
    whole[:] = torch.randn(whole.shape)  # no value is missing
    zeroed = whole.clone()
    zeroed[:, [2, 4]] = 0.0
    assert torch.equal(family(whole), family(zeroed))


def test_positions_of_a_sequence_have_medians_of_their_own(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((ROWS, 5, 2)) + 100.0 * np.arange(5)[:, None]).astype(np.float32)
    x[rng.random(x.shape) < 0.1] = np.nan
    x[:, 0, 0] = np.nan  # no value at this position: the column's median over all positions
    found = encoded(write(tmp_path / "a.h5", x))[0].columns.reshape(x.shape)
    expected = np.nanmedian(np.where(np.isnan(x[TRAIN]), np.nan, x[TRAIN])[:, 1:], axis=0)
    where = np.argwhere(np.isnan(x[:, 1:]))
    assert len(where) > 50
    for row, step, column in where:
        assert found[row, 1 + step, column] == expected[step, column]
    np.testing.assert_array_equal(found[:, 0, 0], np.nanmedian(x[TRAIN, :, 0]))


def test_rows_that_are_held_out_do_not_matter(tmp_path: Path, table: np.ndarray[Any, Any]) -> None:
    other = table.copy()
    other[1::2] *= 50.0
    for family in (IDENTITY, STANDARDIZED):
        plain, changed = (encoded(write(tmp_path / name, x), family)[1] for name, x in (("a", table), ("b", other)))
        assert plain.fill is not None
        assert changed.fill is not None
        torch.testing.assert_close(plain.fill, changed.fill, rtol=0, atol=0, equal_nan=True)
        if plain.center is not None and changed.center is not None:
            assert torch.equal(plain.center, changed.center)


def test_new_data_may_miss_values_where_training_rows_do_not(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((ROWS, 3)).astype(np.float32) + 5.0
    _, family = encoded(write(tmp_path / "a.h5", x))
    new = torch.full((2, 3), float("nan"))
    np.testing.assert_array_equal(family(new).numpy(), np.tile(np.median(x[TRAIN], 0), (2, 1)))


def test_zero_repeats_the_baseline(tmp_path: Path, table: np.ndarray[Any, Any]) -> None:
    found, family = encoded(write(tmp_path / "a.h5", table), rows=None)
    np.testing.assert_array_equal(found.columns, np.nan_to_num(table))
    assert family.fill is None


@pytest.mark.parametrize("family", [IDENTITY, STANDARDIZED])
def test_the_fill_survives_a_checkpoint(tmp_path: Path, table: np.ndarray[Any, Any], family: FamilyConfig) -> None:
    found, encoder = encoded(write(tmp_path / "a.h5", table), family)
    torch.save(encoder.state(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    again = FamilyEncoder.from_state("x", state)
    np.testing.assert_array_equal(again(torch.from_numpy(table)).numpy(), found.columns)
    del state["fill"]  # as earlier versions wrote it
    older = FamilyEncoder.from_state("x", state)
    zeros = torch.from_numpy(np.nan_to_num(table))
    assert torch.equal(older(torch.from_numpy(table)), older(zeros))


def test_a_large_family_is_sampled_alike_every_time(
    tmp_path: Path, table: np.ndarray[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.h5", np.tile(table, (10, 1)))
    rows = np.arange(0, 10 * ROWS, 3)
    monkeypatch.setattr(module, "_MAX_ROWS", 400)
    read: list[int] = []
    original = FeatureSource.read_rows

    def noted(source: FeatureSource, family: str, rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        read.append(len(rows))
        return original(source, family, rows)

    monkeypatch.setattr(FeatureSource, "read_rows", noted)
    fills = [encoded(path, rows=rows)[1].fill for _ in range(2)]
    assert max(read) <= 400
    assert fills[0] is not None
    assert fills[1] is not None
    torch.testing.assert_close(fills[0], fills[1], rtol=0, atol=0, equal_nan=True)
    assert abs(float(fills[0][0]) - 300.0) < 0.5


def test_filled_values_are_reported_in_one_line(
    tmp_path: Path, table: np.ndarray[Any, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        found = encoded(write(tmp_path / "a.h5", table))[0]
    (line,) = [r.getMessage() for r in caplog.records if "missing" in r.getMessage()]
    assert found.missing == {"x": int(np.isnan(table).sum())}
    assert "60 missing values filled with the median of the training rows" in line
    assert "column 0 (6), column 1 (4), column 5 (50)" in line
    assert "dropped, no value in the training rows: column 2, column 4" in line
    wide = np.full((ROWS, 400), np.nan, np.float32)
    wide[1:] = np.random.default_rng(0).standard_normal((ROWS - 1, 400))
    caplog.clear()
    with caplog.at_level(logging.INFO):
        encoded(write(tmp_path / "b.h5", wide))
    (line,) = [r.getMessage() for r in caplog.records if "missing" in r.getMessage()]
    assert "394 more columns" in line
    assert len(line) < 500
