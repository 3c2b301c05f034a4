"""`Trainer.fit` on a raw matrix, and the result applied to more rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import planted_matrix

from spinlock_fast.config.schema import FeatureCleaningConfig, RunConfig
from spinlock_fast.errors import DataError
from spinlock_fast.features.matrix import fit_matrix_normalizer
from spinlock_fast.training.result import TrainResult
from spinlock_fast.training.trainer import Trainer

SIZES = [6, 9, 5]
GROUPS = {"a": list(range(6)), "b": list(range(6, 15)), "c": list(range(15, 20))}
SETTINGS = {
    "device": "cpu",
    "training.batch_size": 64,
    "training.topo_samples": 64,
    "training.num_epochs": 12,
    "training.orthogonality_target": 1.0,
}


def fit(x: Any, groups: Any = GROUPS, settings: dict[str, Any] | None = None, **options: Any) -> TrainResult:
    return Trainer.from_config(RunConfig(), {**SETTINGS, **(settings or {})}).fit(x, groups, **options)


@pytest.fixture(scope="module")
def raw() -> np.ndarray[Any, Any]:
    """[300, 20] in different units, with a constant column."""
    x = planted_matrix(300, SIZES, seed=0) * np.geomspace(1e-3, 1e4, 20) + np.linspace(-500.0, 800.0, 20)
    x[:, 4] = 17.0
    return x


@pytest.fixture(scope="module")
def result(raw: np.ndarray[Any, Any]) -> TrainResult:
    return fit(raw)


def same(a: TrainResult, b: TrainResult) -> bool:
    mine, others = a.final_state["model_state_dict"], b.final_state["model_state_dict"]
    return all(torch.equal(value, others[key]) for key, value in mine.items())


def test_raw_matrix_is_normalised_and_units_are_reported(
    raw: np.ndarray[Any, Any], result: TrainResult, caplog: pytest.LogCaptureFixture
) -> None:
    assert result.metrics["quality"] > 0.4
    assert result.metrics["units"] == "standard deviations of the training rows"
    normalized = result.normalizer
    assert normalized is not None
    z = normalized(raw)
    assert np.abs(z[result.split.train].mean(0)).max() < 1e-3
    deviation = z[result.split.train].std(0)
    np.testing.assert_allclose(np.delete(deviation, 4), 1.0, atol=1e-3)
    assert np.abs(z[:, 4]).max() < 1e-6
    fit(raw, settings={"training.num_epochs": 1})
    assert "x is not standardised" in caplog.text
    unchanged = fit(raw, settings={"training.num_epochs": 1}, normalize=False)
    assert unchanged.normalizer is None
    assert unchanged.metrics["units"] == "those of x"
    assert unchanged.metrics["quality"] == 0.0


def test_result_encodes_and_decodes_raw_rows(raw: np.ndarray[Any, Any], result: TrainResult) -> None:
    tokens = result.encode(raw)
    assert isinstance(tokens, np.ndarray)
    as_torch = result.encode(torch.from_numpy(raw))
    assert isinstance(as_torch, torch.Tensor)
    np.testing.assert_array_equal(as_torch.numpy(), tokens)
    assert result.normalizer is not None
    assert torch.equal(result.model.get_tokens(result.normalizer(raw)), as_torch)
    decoded = result.decode(tokens)
    error = ((decoded - raw) / np.maximum(raw.std(0), 1e-9)) ** 2
    assert np.delete(error, 4, 1).mean() < 0.6
    np.testing.assert_allclose(decoded[:, 4], 17.0, rtol=0.2)
    assert isinstance(result.decode(as_torch), torch.Tensor)
    np.testing.assert_array_equal(result.decode(tokens.astype(np.float32)), decoded)
    for wrong in (tokens + 0.5, np.full(tokens.shape, np.nan), tokens[:, :1], as_torch.float() + 0.5):
        with pytest.raises(DataError, match="tokens: expected"):
            result.decode(wrong)
    with pytest.raises(ValueError, match=r"x must be \[N, 20\]"):
        result.encode(raw[:, :3])


@pytest.mark.parametrize("method", ["standard", "mad"])
def test_standardised_matrix_is_not_normalised(method: str) -> None:
    settings = {"training.num_epochs": 1, "training.normalization_method": method}
    x = planted_matrix(300, SIZES, seed=0)
    if method == "mad":
        x = np.exp(x)
        x -= np.median(x, 0)
        x /= 1.4826 * np.median(np.abs(x), 0)
    found = fit(x, settings=settings)
    assert found.normalizer is None
    assert found.metrics["units"] == "those of x"
    assert same(found, fit(x, settings=settings, normalize=False))
    tokens = found.model.get_tokens(torch.from_numpy(x)).numpy()
    np.testing.assert_array_equal(found.encode(x), tokens)


def test_uncategorised_features_do_not_trigger_normalisation(raw: np.ndarray[Any, Any]) -> None:
    x = planted_matrix(300, SIZES, seed=0)
    x[:, 15:] = 40.0 * x[:, 15:] + 7.0
    groups = {name: GROUPS[name] for name in ("a", "b")}
    assert fit(x, groups, {"training.num_epochs": 1}).normalizer is None
    assert fit(x, None, {"training.num_epochs": 1}).normalizer is not None


def test_memory_map_is_normalised_block_by_block(tmp_path: Path, raw: np.ndarray[Any, Any]) -> None:
    settings = {"training.num_epochs": 2, "training.data_on_device": "never"}
    np.save(tmp_path / "x.npy", raw.astype(np.float32))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    streamed = fit(mapped, settings=settings)
    assert same(streamed, fit(raw.astype(np.float32), settings={"training.num_epochs": 2}))
    assert streamed.normalizer is not None
    np.testing.assert_array_equal(streamed.encode(mapped), streamed.encode(np.asarray(mapped)))


def test_precision_beyond_float32_is_kept() -> None:
    x = planted_matrix(300, SIZES, seed=0).astype(np.float64) + 1.7e9  # nothing is left of it in float32
    found = fit(x, settings={"training.num_epochs": 3})
    assert found.normalizer is not None
    np.testing.assert_allclose(found.normalizer(x).std(0), 1.0, atol=0.3)
    integers = np.round(1000.0 * planted_matrix(300, SIZES, seed=0)).astype(np.int64)
    again = fit(integers, settings={"training.num_epochs": 1})
    assert same(again, fit(torch.from_numpy(integers), settings={"training.num_epochs": 1}))


def test_outliers_are_clipped_as_the_pipeline_does(raw: np.ndarray[Any, Any]) -> None:
    x = raw.copy()
    x[7, 0] = 1e12
    rows = np.arange(300)
    found = fit_matrix_normalizer(x, rows, FeatureCleaningConfig(), "standard")
    assert found is not None
    assert np.abs(found(x)).max() < 8.0
    unclipped = fit_matrix_normalizer(x, rows, FeatureCleaningConfig(enabled=False), "standard")
    assert unclipped is not None
    assert unclipped(x)[7, 0] > 15.0


@pytest.mark.parametrize("x", [np.zeros((300, 20), complex), np.full((300, 20), "a"), np.full((300, 20), None)])
def test_non_numeric_matrix_is_rejected(x: Any) -> None:
    with pytest.raises(ValueError, match="x must hold numbers"):
        fit(x)


def test_masked_array_values_are_not_used(raw: np.ndarray[Any, Any], result: TrainResult) -> None:
    x = np.ma.masked_array(raw)
    np.testing.assert_array_equal(result.encode(x), result.encode(raw))
    x[7, 3] = np.ma.masked
    with pytest.raises(ValueError, match=r"x\[7, 3\] is nan"):
        fit(x)
    with pytest.raises(ValueError, match=r"x\[0, 1\] is nan"):
        fit(np.ma.masked_array(np.arange(6000).reshape(300, 20), np.arange(6000).reshape(300, 20) == 1))


def test_model_rejects_complex_numbers(result: TrainResult) -> None:
    for x in (np.zeros((2, 20), complex), torch.zeros(2, 20, dtype=torch.complex64)):
        with pytest.raises(ValueError, match="x: expected real numbers, got"):
            result.model.get_tokens(x)


def test_model_takes_numpy_and_any_precision(result: TrainResult, raw: np.ndarray[Any, Any]) -> None:
    assert result.normalizer is not None
    z = result.normalizer(raw)
    expected = result.model.get_tokens(torch.from_numpy(z))
    read_only = z.copy()
    read_only.flags.writeable = False
    for same_rows in (
        z,
        z.astype(np.float64),
        torch.from_numpy(z).double(),
        read_only,
        z[::-1][::-1],
        np.asfortranarray(z),
    ):
        assert torch.equal(result.model.get_tokens(same_rows), expected)
    assert result.model.get_tokens(z.tolist()).shape == expected.shape
    features = result.model.decode_from_tokens(expected)
    for tokens in (expected.numpy(), expected.to(torch.int32), expected.numpy().astype(np.uint8)):
        assert torch.equal(result.model.decode_from_tokens(tokens), features)


def test_code_usage_after_fit_is_that_of_the_validation_rows(result: TrainResult) -> None:
    used = [u for category in result.metrics["categories"] for u in category["utilization"]]
    perplexity = [p for category in result.metrics["categories"] for p in category["perplexity"]]
    np.testing.assert_allclose(result.model.quantizer.utilization().numpy(), used, rtol=1e-5)
    np.testing.assert_allclose(result.model.quantizer.perplexity().numpy(), perplexity, rtol=1e-4)
    assert int(result.model.quantizer.nonfinite_rows) == 0
