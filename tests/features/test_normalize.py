import numpy as np
import pytest
import torch

from spinlock_fast.features.normalize import Normalizer, fit_normalizer


def matrix(rows=200):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, 5)) * [1.0, 100.0, 1e-3, 2.0, 1.0] + [0.0, 50.0, 1e3, -2.0, 0.0]
    x[:, 3] = rng.random(rows) < 0.25
    x[:, 4] = 7.0
    return x.astype(np.float32)


def test_standard_normalisation_has_mean_0_and_deviation_1():
    x = matrix()
    z = fit_normalizer(x, "standard")(x).astype(np.float64)
    np.testing.assert_allclose(z.mean(0), 0.0, atol=1e-5)
    np.testing.assert_allclose(z[:, :4].std(0), 1.0, rtol=1e-4)


def test_mad_normalisation_has_median_0_and_mad_1():
    x = matrix()
    z = fit_normalizer(x, "mad")(x).astype(np.float64)
    np.testing.assert_allclose(np.median(z, 0), 0.0, atol=1e-4)
    np.testing.assert_allclose(1.4826 * np.median(np.abs(z[:, :2]), 0), 1.0, rtol=1e-4)
    # The binary column has MAD 0, so its standard deviation divides.
    assert z[:, 3].std() == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("method", ["standard", "mad"])
def test_a_constant_column_becomes_zero(method):
    x = matrix()
    normalizer = fit_normalizer(x, method)
    assert not normalizer(x)[:, 4].any()
    assert normalizer.scale[4] == 1.0


@pytest.mark.parametrize("method", ["standard", "mad"])
def test_inverse(method):
    x = matrix()
    normalizer = fit_normalizer(x, method)
    np.testing.assert_allclose(normalizer.inverse(normalizer(x)), x, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("method", ["standard", "mad"])
def test_new_data_use_the_fitted_numbers(method):
    x = matrix()
    normalizer = fit_normalizer(x[:100], method)
    np.testing.assert_array_equal(normalizer(x)[100:], normalizer(x[100:]))
    expected = (x[150] - normalizer.center) / normalizer.scale
    np.testing.assert_allclose(normalizer(x[150:151])[0], expected, rtol=1e-6)


@pytest.mark.parametrize(("method", "center", "scale"), [("standard", "mean", "std"), ("mad", "median", "mad")])
def test_arrays_by_category(method, center, scale):
    normalizer = fit_normalizer(matrix(), method)
    arrays = normalizer.by_category({"cluster_9": [3, 0], "cluster_10": [4]})
    assert list(arrays) == [
        f"cluster_9_{center}",
        f"cluster_9_{scale}",
        f"cluster_10_{center}",
        f"cluster_10_{scale}",
        "_normalization_method",
    ]
    np.testing.assert_allclose(arrays[f"cluster_9_{center}"], normalizer.center[[3, 0]], rtol=1e-6)
    np.testing.assert_allclose(arrays[f"cluster_10_{scale}"], normalizer.scale[[4]], rtol=1e-6)
    assert arrays["_normalization_method"].tolist() == [method]


@pytest.mark.parametrize("method", ["standard", "mad"])
def test_state_survives_a_checkpoint(tmp_path, method):
    x = matrix()
    normalizer = fit_normalizer(x, method)
    torch.save(normalizer.state(), tmp_path / "state.pt")
    again = Normalizer.from_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert again.method == method
    np.testing.assert_array_equal(again(x), normalizer(x))
