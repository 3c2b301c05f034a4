import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spinlock_fast.config.schema import FeatureCleaningConfig
from spinlock_fast.data.row_view import RowView
from spinlock_fast.features import order_statistics as module
from spinlock_fast.features import statistics
from spinlock_fast.features.cleaning import fit_cleaner, informativeness
from spinlock_fast.features.normalize import fit_normalizer
from spinlock_fast.features.order_statistics import order_statistics


def wide_range(rows, columns, seed, dtype=np.float32):
    """Both signs, ties, both zeros, subnormal and huge values."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, columns)) * 10.0 ** rng.integers(-44, 38, (rows, columns))
    x[rng.random(x.shape) < 0.2] = -0.0
    x[rng.random(x.shape) < 0.2] = 1.5
    with np.errstate(over="ignore"):
        return x.astype(dtype)


@pytest.fixture
def from_blocks(monkeypatch):
    """Statistics of any matrix are computed as those of one too large to be sorted in memory, in small blocks."""
    monkeypatch.setattr(statistics, "_SORTED_BYTES", 0)
    monkeypatch.setattr(module, "_BLOCK_BYTES", 1)


@given(st.integers(1, 300), st.integers(1, 4), st.integers(0, 2**31), st.sampled_from([np.float32, np.float64]))
def test_every_place_of_a_column(rows, columns, seed, dtype):
    x = wide_range(rows, columns, seed, dtype)
    places = np.random.default_rng(seed).integers(0, rows, (3, columns))
    found = order_statistics(x, places)
    assert found.dtype == dtype
    assert not np.signbit(found[found == 0]).any()
    np.testing.assert_array_equal(found, np.take_along_axis(np.sort(x, axis=0), places, 0))


def test_nan_are_last(from_blocks):
    x = wide_range(3000, 3, 1)
    x[::3, 1], x[:, 2] = np.nan, -np.float32(np.nan)
    known = (~np.isnan(x)).sum(0)
    found = statistics.median(x, counts=known)
    np.testing.assert_array_equal(found[:2], np.nanmedian(x[:, :2], axis=0))
    assert np.isnan(found[2])


@pytest.mark.parametrize("rows", [1, 2, 2048, 5001])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_medians_and_percentiles_have_the_bits_of_numpy(from_blocks, rows, dtype):
    x = wide_range(rows, 5, rows, dtype)
    x = np.where(np.abs(x) < 1e30, x, 1).astype(dtype)
    center, mad = statistics.median_and_mad(x)
    np.testing.assert_array_equal(center, np.median(x, axis=0))
    np.testing.assert_array_equal(mad, np.median(np.abs(x - center.astype(dtype)), axis=0))
    shares = (0.0, 0.5, 25.0, 60.0, 75.0, 99.5, 100.0)
    np.testing.assert_array_equal(statistics.percentiles(x, shares), np.percentile(x, shares, axis=0))


@pytest.mark.parametrize("method", ["mad", "percentile", "iqr"])
def test_cleaner_and_normalizer_do_not_depend_on_where_the_rows_are(from_blocks, monkeypatch, tmp_path, method):
    x = np.random.default_rng(0).standard_cauchy((20_000, 6)).astype(np.float32)
    x[:, 3], x[:, 4] = 2.0 * x[:, 0] + 1e-3 * x[:, 1], x[:, 4] > 3.0
    mapped = np.memmap(tmp_path / "x", np.float32, "w+", shape=x.shape)
    mapped[:] = x
    train = np.flatnonzero(np.random.default_rng(1).random(len(x)) < 0.9)
    config = FeatureCleaningConfig(outlier_method=method)
    found = fit_cleaner(RowView(mapped, train), config), fit_normalizer(RowView(mapped, train), "mad")
    score = informativeness(x.astype(np.float64))
    monkeypatch.undo()
    expected = fit_cleaner(x[train], config), fit_normalizer(x[train], "mad")
    assert not expected[0].keep.all()
    for one, other in zip(found, expected, strict=True):
        for name, value in vars(other).items():
            np.testing.assert_array_equal(vars(one)[name], value)
    np.testing.assert_array_equal(score, informativeness(x.astype(np.float64)))
