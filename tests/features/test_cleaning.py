import numpy as np
import pytest
import torch

from spinlock_fast.config.schema import FeatureCleaningConfig
from spinlock_fast.errors import DataError
from spinlock_fast.features.cleaning import FeatureCleaner, clip_bounds, fit_cleaner, informativeness

CONFIG = FeatureCleaningConfig()


def normal(rows=400, columns=5, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def test_constant_columns_are_dropped():
    x = normal()
    x[:, 1] = 3.0
    x[:, 3] = np.nan
    x[:, 4] *= 1e-9
    assert fit_cleaner(x, CONFIG).keep.tolist() == [True, False, True, False, False]


def test_the_variance_threshold_can_be_set():
    x = normal()
    x[:, 2] *= 0.01
    assert fit_cleaner(x, FeatureCleaningConfig(variance_threshold=0.1)).keep.tolist() == [
        True,
        True,
        False,
        True,
        True,
    ]


@pytest.mark.parametrize("fill", [3.0, np.nan, 0.0])
def test_nothing_but_constant_columns_is_an_error(fill):
    with pytest.raises(DataError, match="all 4 columns are constant"):
        fit_cleaner(np.full((20, 4), fill, np.float32), CONFIG)


def test_one_row_is_constant():
    with pytest.raises(DataError, match="constant"):
        fit_cleaner(normal(1), CONFIG)


def test_missing_values_become_the_median():
    x = normal()
    x[::3, 1] = np.nan
    cleaner = fit_cleaner(x, CONFIG)
    median = np.nanmedian(x[:, 1])
    assert cleaner.fill[1] == pytest.approx(median)
    np.testing.assert_allclose(cleaner(x)[::3, 1], median)
    assert not np.isnan(cleaner(x)).any()


def test_missing_values_of_new_data_become_the_median_of_the_old():
    x = normal()
    cleaner = fit_cleaner(x, CONFIG)
    new = np.full((2, 5), np.nan, np.float32)
    np.testing.assert_allclose(cleaner(new), np.tile(np.median(x, 0), (2, 1)), rtol=1e-6)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_of_two_duplicates_the_more_informative_stays(sign):
    x = normal(2000, 3)
    x[:, 2] = sign * 3.0 * x[:, 0] + 0.01 * x[:, 2]  # a larger interquartile range
    assert fit_cleaner(x, CONFIG).keep.tolist() == [False, True, True]
    assert fit_cleaner(x[:, ::-1], CONFIG).keep.tolist() == [True, True, False]


def test_equal_columns_leave_one():
    x = np.repeat(normal(300, 1), 4, axis=1)
    assert fit_cleaner(x, CONFIG).keep.sum() == 1


@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.99])
def test_no_kept_pair_is_above_the_threshold_and_every_dropped_one_has_a_reason(threshold):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((500, 3)) @ rng.standard_normal((3, 40)) + 0.2 * rng.standard_normal((500, 40))
    keep = fit_cleaner(x, FeatureCleaningConfig(deduplicate_threshold=threshold)).keep
    strength = np.abs(np.corrcoef(x, rowvar=False))
    np.fill_diagonal(strength, 0.0)
    assert strength[np.ix_(keep, keep)].max() <= threshold
    score = informativeness(x)
    for column in np.flatnonzero(~keep):
        rivals = np.flatnonzero(keep & (strength[column] > threshold))
        assert rivals.size
        assert score[rivals].max() >= score[column]


def test_a_threshold_of_one_keeps_duplicates():
    x = np.repeat(normal(300, 1), 2, axis=1)
    assert fit_cleaner(x, FeatureCleaningConfig(deduplicate_threshold=1.0)).keep.all()


def test_informativeness_against_the_formula():
    x = normal(1000, 3).astype(np.float64)
    x[:30, 1] = 50.0
    x[:, 2] = x[:, 2] > 0.6
    for column, score in zip(x.T, informativeness(x), strict=True):
        counts = np.histogram(column, bins=50)[0] / 1000
        entropy = -(counts[counts > 0] * np.log(counts[counts > 0])).sum()
        first, third = np.percentile(column, [25, 75])
        median = np.median(column)
        reach = 5 * 1.4826 * np.median(np.abs(column - median))
        outliers = (np.abs(column - median) > reach).mean() if reach > 0 else 0.0
        assert score == pytest.approx(entropy * (third - first) * (1 - outliers), rel=1e-9)


def test_values_are_clipped_at_five_sigma():
    x = normal(1000)
    x[0, 0], x[1, 0] = 1e4, -1e4
    cleaner = fit_cleaner(x, CONFIG)
    median = np.median(x[:, 0])
    reach = 5 * 1.4826 * np.median(np.abs(x[:, 0] - median))
    assert cleaner(x)[:2, 0] == pytest.approx([median + reach, median - reach], rel=1e-5)
    inside = np.abs(x[:, 0] - median) < reach
    np.testing.assert_array_equal(cleaner(x)[inside, 0], x[inside, 0])


def test_the_scale_of_the_mad_can_be_that_of_the_original():
    x = normal(1000)
    narrow, wide = (clip_bounds(x, FeatureCleaningConfig(mad_scale=s))[1] - np.median(x, 0) for s in (1.0, 1.4826))
    np.testing.assert_allclose(wide / narrow, 1.4826, rtol=1e-6)


def test_a_column_without_mad_is_not_clipped():
    x = normal(400)
    x[:, 2] = np.arange(400) % 4 == 0  # 75/25 binary
    cleaner = fit_cleaner(x, CONFIG)
    np.testing.assert_array_equal(cleaner(x)[:, 2], x[:, 2])
    assert cleaner.low[2] == -np.inf
    assert cleaner.high[2] == np.inf


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"outlier_method": "percentile", "percentile_range": [10, 90]}, lambda c: np.percentile(c, [10, 90])),
        (
            {"outlier_method": "iqr", "iqr_multiplier": 2.0},
            lambda c: np.percentile(c, [25, 75]) + 2.0 * np.subtract(*np.percentile(c, [75, 25])) * np.array([-1, 1]),
        ),
        ({"outlier_method": "none"}, lambda c: [-np.inf, np.inf]),
    ],
)
def test_other_outlier_methods(options, expected):
    x = normal(300, 2).astype(np.float64)
    low, high = clip_bounds(x, FeatureCleaningConfig(**options))
    for j in range(2):
        assert [low[j], high[j]] == pytest.approx(list(expected(x[:, j])))


@pytest.mark.parametrize("method", ["mad", "iqr", "none"])
def test_rare_binary_column_keeps_both_values(method):
    x = normal(1000)
    x[:, 2] = np.arange(1000) < 2
    cleaned = fit_cleaner(x, FeatureCleaningConfig(outlier_method=method))(x)
    assert np.unique(cleaned[:, 2]).tolist() == [0.0, 1.0]


def test_disabled_keeps_every_column_and_clips_nothing():
    x = normal()
    x[:, 1], x[0, 0], x[0, 2] = 3.0, 1e6, np.nan
    cleaner = fit_cleaner(x, FeatureCleaningConfig(enabled=False))
    assert cleaner.keep.all()
    cleaned = cleaner(x)
    assert cleaned[0, 0] == 1e6
    assert not np.isnan(cleaned).any()


def test_new_data_are_cleaned_identically(tmp_path):
    x = normal(600, 8)
    x[:, 2], x[5:9, 4], x[0, 6] = x[:, 1], np.nan, 1e3
    cleaner = fit_cleaner(x[:300], CONFIG)
    torch.save(cleaner.state(), tmp_path / "state.pt")
    again = FeatureCleaner.from_state(torch.load(tmp_path / "state.pt", weights_only=True))
    np.testing.assert_array_equal(again(x), cleaner(x))
    np.testing.assert_array_equal(cleaner(x)[300:], cleaner(x[300:]))
    assert cleaner(x).dtype == np.float32
    assert cleaner(x).shape == (600, 7)


def test_cleaning_leaves_its_input_alone():
    x = normal()
    x[0, 0], x[1, 1] = np.nan, 1e6
    before = x.copy()
    fit_cleaner(x, CONFIG)(x)
    np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize("shape", [(4, 6), (5,), (2, 5, 1)])
def test_another_number_of_columns_is_an_error(shape):
    cleaner = fit_cleaner(normal(), CONFIG)
    with pytest.raises(DataError, match="expected 5 columns"):
        cleaner(np.zeros(shape, np.float32))


def test_a_rare_value_survives_percentile_clipping():
    x = np.zeros((1000, 2))
    x[:2, 0] = 1.0
    x[:, 1] = np.arange(1000)
    cleaner = fit_cleaner(x, FeatureCleaningConfig(outlier_method="percentile"))
    assert cleaner(x)[:, 0].max() == 1.0
    assert cleaner(x)[:, 1].max() < 999.0


def test_cleaning_does_not_depend_on_threads(monkeypatch):
    x = np.random.default_rng(0).standard_normal((200, 80)).astype(np.float32)
    x[:, 40:] = 2.0 * x[:, :40]
    x[::7, 3] = np.nan
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    expected = vars(fit_cleaner(x, FeatureCleaningConfig()))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    found = vars(fit_cleaner(x, FeatureCleaningConfig()))
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)
    assert expected["keep"].sum() in range(40, 42)
