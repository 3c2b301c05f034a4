"""Metrics against direct formulas on a small random model."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from graph_recording import DeviceOnly
from helpers import planted_matrix

from spinlock_fast import CategoricalHierarchicalVQVAE, CategoricalVQVAEConfig
from spinlock_fast.config.schema import TrainingConfig
from spinlock_fast.data import host_rows
from spinlock_fast.features.names import count_families
from spinlock_fast.models import metrics
from spinlock_fast.models.losses import LossWeights, loss_terms

GROUPS = {"cluster_2": [3, 4, 5, 0], "cluster_10": [1, 2, 6, 7, 8, 9]}
NAMES = [f"{'a' if i < 5 else 'b'}::{i}" for i in range(10)]


@pytest.fixture(scope="module")
def model() -> CategoricalHierarchicalVQVAE:
    torch.manual_seed(0)
    config = CategoricalVQVAEConfig(
        input_dim=10, group_indices=GROUPS, group_embedding_dim=8, group_hidden_dim=8, codebook_init="uniform"
    )
    model = CategoricalHierarchicalVQVAE(config)
    model.quantizer.initialize(model.encode(x()).detach())
    return model.train()


def x(rows: int = 120) -> torch.Tensor:
    return torch.from_numpy(planted_matrix(rows, [4, 6], seed=1))


@pytest.fixture(scope="module")
def found(model: CategoricalHierarchicalVQVAE) -> metrics.Metrics:
    return metrics.evaluate(model, x(), TrainingConfig())


def test_evaluation_restores_the_mode_and_keeps_codes(model: CategoricalHierarchicalVQVAE) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    metrics.evaluate(model, x(), TrainingConfig())
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_error_and_quality(model: CategoricalHierarchicalVQVAE, found: metrics.Metrics) -> None:
    with torch.no_grad():
        decoded = model.decode_from_tokens(model.get_tokens(x()))
    error = (decoded.double() - x()).square().mean().item()
    assert found["reconstruction_error"] == pytest.approx(error, rel=1e-5)
    assert found["quality"] == pytest.approx(max(1 - error, 0.0), abs=1e-5 * error)


def test_error_of_a_category_is_that_of_its_features(
    model: CategoricalHierarchicalVQVAE, found: metrics.Metrics
) -> None:
    with torch.no_grad():
        decoded = model.decode_from_tokens(model.get_tokens(x()))
    errors = (decoded.double() - x()).square().mean(0)
    assert [c["mse"] for c in found["categories"]] == pytest.approx(
        [errors[members].mean().item() for members in GROUPS.values()], rel=1e-5
    )
    weighted = sum(c["mse"] * c["features"] for c in found["categories"]) / 10
    assert weighted == pytest.approx(found["reconstruction_error"], rel=1e-6)


def test_code_usage_is_counted_from_tokens(model: CategoricalHierarchicalVQVAE, found: metrics.Metrics) -> None:
    tokens = model.get_tokens(x()).numpy()
    sizes = model.quantizer.num_codes
    distinct = [len(np.unique(tokens[:, g])) for g in range(len(sizes))]
    entropies = []
    for g in range(len(sizes)):
        share = np.unique(tokens[:, g], return_counts=True)[1] / len(tokens)
        entropies.append(np.exp(-(share * np.log(share)).sum()))
    assert found["active_codes"] == sum(distinct)
    assert found["utilization"] == pytest.approx(np.mean([d / k for d, k in zip(distinct, sizes, strict=True)]))
    assert found["perplexity"] == pytest.approx(np.mean(entropies), rel=1e-5)
    expected = np.mean([e / k for e, k in zip(entropies, sizes, strict=True)])
    assert found["perplexity_over_k"] == pytest.approx(expected, rel=1e-5)
    levels = [u for category in found["categories"] for u in category["utilization"]]
    assert levels == pytest.approx([d / k for d, k in zip(distinct, sizes, strict=True)])


def test_validation_loss_is_the_weighted_sum(model: CategoricalHierarchicalVQVAE, found: metrics.Metrics) -> None:
    model.eval()
    with torch.no_grad():
        terms = loss_terms(model, x(), model(x()), 1024)
    model.train()
    assert found["val_loss"] == pytest.approx(float(terms.total(LossWeights.of(TrainingConfig()))), rel=1e-5)
    assert 0.3 * (1 - found["topo_pre"]) + 0.7 * (1 - found["topo_post"]) == pytest.approx(float(terms.topographic))


def test_partial_mse_covers_the_features_of_the_category(
    model: CategoricalHierarchicalVQVAE, found: metrics.Metrics
) -> None:
    with torch.no_grad():
        alone = model.partial_reconstructions(model.quantizer.lookup(model.get_tokens(x())))
    for category, members in zip(found["categories"], GROUPS.values(), strict=True):
        books = model.category_slice(category["name"])
        expected = (alone[books][:, :, members] - x()[:, members]).square().mean().item()
        assert category["partial_mse"] == pytest.approx(expected, rel=1e-5)


def test_metrics_do_not_depend_on_blocks(model: CategoricalHierarchicalVQVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = metrics.evaluate(model, x(), TrainingConfig())
    monkeypatch.setattr(host_rows, "_BLOCK_ROWS", {"cpu": 17})
    blocks = metrics.evaluate(model, x(), TrainingConfig())
    flat: list[tuple[Any, Any]] = [(whole[key], blocks[key]) for key in whole if key != "categories"]
    for a, b in flat:
        assert a == pytest.approx(b, rel=1e-5)


def test_blocks_are_of_nearly_one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_rows, "_BLOCK_ROWS", {"cpu": 8})
    assert [len(block) for block in host_rows.row_blocks(torch.zeros(20, 3))] == [7, 7, 6]
    assert [len(block) for block in host_rows.row_blocks(torch.zeros(8, 3))] == [8]
    assert torch.equal(torch.cat(host_rows.row_blocks(x())), x())


def test_validation_equals_the_scalars_of_evaluate(model: CategoricalHierarchicalVQVAE, found: metrics.Metrics) -> None:
    kept = {key: value for key, value in found.items() if isinstance(value, float)}
    validation = metrics.Validation(model, x(), TrainingConfig())
    validation.run()
    assert validation.result() == kept
    assert list(kept) == ["quality", *metrics.SCALARS]


@pytest.mark.parametrize("training", [True, False])
def test_measure_does_not_synchronise(
    model: CategoricalHierarchicalVQVAE, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run synchronises once per validation, and a CUDA graph can capture it."""
    monkeypatch.setenv("SPINLOCK_FAST_BACKEND", "reference")
    monkeypatch.setattr(host_rows, "_BLOCK_ROWS", {"cpu": 50})
    copied, rows = copy.deepcopy(model).train(training), x()
    validation = metrics.Validation(copied, rows, TrainingConfig())
    validation.run()  # index tensors are made once
    place = validation._scalars.data_ptr()
    with DeviceOnly() as mode:
        validation.run()
    assert validation._scalars.data_ptr() == place
    assert mode.operations > 100
    assert copied.training == training


def test_uncoded_row_makes_only_its_codebooks_nan(model: CategoricalHierarchicalVQVAE) -> None:
    rows = x()
    rows[3, GROUPS["cluster_2"]] = torch.nan
    found = metrics.measure(model, rows, TrainingConfig())
    others = GROUPS["cluster_10"]
    assert found.partial[model.category_slice("cluster_2")].isnan().all()
    assert found.partial[model.category_slice("cluster_10")][:, others].isfinite().all()


def test_topo_metrics_use_the_first_1024_rows(model: CategoricalHierarchicalVQVAE) -> None:
    many = x(1100)  # in blocks of 550
    changed = many.clone()
    changed[1024:] *= 3.0
    a, b = (metrics.evaluate(model, rows, TrainingConfig()) for rows in (many, changed))
    assert a["topo_pre"] == pytest.approx(b["topo_pre"], rel=1e-6)
    assert a["reconstruction_error"] != b["reconstruction_error"]


def test_add_model_metrics_adds_families_purity_and_sizes(
    model: CategoricalHierarchicalVQVAE, found: metrics.Metrics
) -> None:
    metrics.add_model_metrics(found, model, NAMES, 0.25)
    assert [c["families"] for c in found["categories"]] == [{"a": 3, "b": 1}, {"a": 2, "b": 4}]
    assert [c["purity"] for c in found["categories"]] == pytest.approx([3 / 4, 4 / 6])
    assert found["categories"][0]["feature_names"] == ["a::3", "a::4", "b::5", "a::0"]
    assert found["parameters"] == sum(p.numel() for p in model.parameters()) + model.quantizer.embedding.numel()
    assert found["category_correlation_max"] == 0.25
    assert found["features"] == model.config.input_dim
    assert [c["also_reads"] for c in found["categories"]] == [[], []]


def test_names_without_a_family_are_one_family() -> None:
    assert count_families(["x", "y", "a::z"], [0, 1, 2]) == {"features": 2, "a": 1}


def test_scalars_begin_with_the_error() -> None:
    """`evaluate` reads the error there to detect outliers."""
    assert metrics.SCALARS[0] == "reconstruction_error"


def test_nonfinite_row_is_left_out(model: CategoricalHierarchicalVQVAE, caplog: pytest.LogCaptureFixture) -> None:
    rows = x()
    rows[[5, 77]] = 1e35
    keep = torch.ones(len(rows), dtype=torch.bool)
    keep[[5, 77]] = False
    numbers = np.arange(1000, 1000 + len(rows))
    found = metrics.evaluate(model, rows, TrainingConfig(), numbers, "test")
    assert found.pop("rows_left_out") == [1005, 1077]
    assert found == metrics.evaluate(model, rows[keep], TrainingConfig())
    assert "test rows 1005, 1077: the features are too large" in caplog.text
