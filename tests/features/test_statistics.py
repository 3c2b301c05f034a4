import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spinlock_fast.features import blocks
from spinlock_fast.features.statistics import correlation, median_and_mad, robust_scale


def matrix(rows=50, columns=6, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((rows, columns)) * 10.0 ** np.arange(-2, columns - 2)).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rows", [1, 2, 7, 50])
def test_median_and_mad_by_column(dtype, rows):
    x = matrix(rows, dtype=dtype)
    median, mad = median_and_mad(x)
    for j in range(x.shape[1]):
        column = sorted(x[:, j].tolist())
        middle = (column[(rows - 1) // 2] + column[rows // 2]) / 2
        away = sorted(abs(v - middle) for v in column)
        assert median[j] == pytest.approx(middle, rel=1e-6)
        assert mad[j] == pytest.approx((away[(rows - 1) // 2] + away[rows // 2]) / 2, rel=1e-5, abs=1e-9)
    assert median.dtype == mad.dtype == np.float64


def test_robust_scale_is_the_standard_deviation_of_normal_data():
    _, scale = robust_scale(np.random.default_rng(0).normal(3.0, 2.0, (20000, 1)))
    assert scale[0] == pytest.approx(2.0, rel=0.03)


def test_standard_deviation_replaces_a_mad_of_zero():
    binary = np.repeat([[0.0], [1.0]], [75, 25], axis=0)
    constant = np.full((100, 1), 3.0)
    median, scale = robust_scale(np.hstack([binary, constant]))
    assert median.tolist() == [0.0, 3.0]
    assert scale.tolist() == pytest.approx([binary.std(), 0.0])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_correlation_against_numpy(dtype):
    x = matrix(200, dtype=dtype)
    x[:, 1] = -2.0 * x[:, 0] + 0.1 * x[:, 1]
    np.testing.assert_allclose(correlation(x), np.corrcoef(x.astype(np.float64), rowvar=False), atol=1e-12)


@given(st.integers(2, 60), st.integers(1, 8), st.integers(0, 2**31))
def test_correlation_is_symmetric_and_bounded(rows, columns, seed):
    found = correlation(matrix(rows, columns, seed))
    np.testing.assert_allclose(found, found.T, atol=1e-12)
    assert np.abs(found).max() <= 1.0
    assert (np.diag(found) == 1.0).all()


def test_a_constant_column_correlates_with_nothing_but_itself():
    x = matrix(20, 3)
    x[:, 1] = 0.1
    found = correlation(x)
    assert found[1].tolist() == [0.0, 1.0, 0.0]


def test_correlation_in_blocks(monkeypatch):
    x = matrix(101)
    whole = correlation(x)
    monkeypatch.setattr(blocks, "ROWS_AT_ONCE", 10)
    np.testing.assert_allclose(correlation(x), whole, atol=1e-12)


def test_correlation_of_data_far_from_zero():
    x = 1e6 + np.random.default_rng(0).standard_normal((500, 3))
    np.testing.assert_allclose(correlation(x), np.corrcoef(x, rowvar=False), atol=1e-9)


@pytest.mark.parametrize("threads", [1, 2])
def test_column_blocks_cover_every_column_once_on_torchs_threads(monkeypatch, threads):
    monkeypatch.setattr(blocks.torch, "get_num_threads", lambda: threads)
    x = np.arange(3 * 50, dtype=np.float32).reshape(3, 50)
    found = np.zeros_like(x)
    names = set()

    def work(columns, block):
        assert block.flags.c_contiguous
        found[:, columns] += block.T
        names.add(threading.current_thread().name.split("-")[0].split("_")[0])

    blocks.map_column_blocks(x, work)
    np.testing.assert_array_equal(found, x)
    assert names == ({"MainThread"} if threads == 1 else {"ThreadPoolExecutor"})


def test_error_on_a_thread_is_raised(monkeypatch):
    monkeypatch.setattr(blocks.torch, "get_num_threads", lambda: 2)

    def work(item):
        raise ValueError(f"item {item}")

    with pytest.raises(ValueError, match="item 0"):
        blocks.map_on_threads(work, range(4))
