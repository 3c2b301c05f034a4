"""The model card reports what was measured."""

from __future__ import annotations

import re
from typing import Any

from spinlock_fast.checkpoints.model_card import model_card
from spinlock_fast.config.schema import RunConfig

METRICS: dict[str, Any] = {
    "quality": 0.8,
    "reconstruction_error": 0.2,
    "utilization": 0.5,
    "perplexity_over_k": 0.4,
    "topo_pre": 0.95,
    "topo_post": 0.91,
    "active_codes": 9,
    "total_codes": 12,
    "category_correlation_max": 0.21,
    "parameters": 12345,
    "epochs": 7,
    "best_epoch": 5,
    "samples": 1600,
    "features": 30,
    "val_rows": 160,
    "device": "cpu",
    "seconds": {"total": 61.4},
    "versions": {"spinlock_fast": "0.1.0", "torch": "2.11.0"},
    "categories": [
        {
            "name": "cluster_1",
            "features": 30,
            "also_reads": [],
            "families": {"summary": 30},
            "mse": 0.2,
            "partial_mse": 0.4,
            "utilization": [0.5, 0.75],
            "codes": [8, 4],
        }
    ],
}


def test_card_has_the_metrics_of_the_run() -> None:
    card = model_card(METRICS, RunConfig(dataset_path=["/home/someone/a.h5", "b.h5"], random_seed=7))
    for text in ("1,600 operators of `a.h5`, `b.h5`", "Seed 7", "12,345 parameters", "| 0.8000 |", "epoch 5 of 7"):
        assert text in card
    assert "| cluster_1 | 30 | summary 30 | 0.2000 | 0.4000 | 0.50 / 0.75 | 8 / 4 |" in card
    assert "# [N, 2], from raw HDF5" in card
    assert "3 of the codes were\n  used by no held-out operator" in card
    assert "/home" not in card


def test_uncategorised_features_are_reported() -> None:
    assert "in no category" not in model_card(METRICS, RunConfig())
    card = model_card({**METRICS, "features": 33}, RunConfig())
    assert "\n\n3 more of the features are in no category: they are reconstructed from all codes.\n\n" in card
    assert "[N, 33]" in card
    read = [{**METRICS["categories"][0], "also_reads": ["a::x", "a::y"]}]
    card = model_card({**METRICS, "features": 33, "categories": read}, RunConfig())
    assert "no category (cluster_1 reads 2 of them as well):" in card


def test_card_tables_are_well_formed() -> None:
    card = model_card(METRICS, RunConfig(dataset_path="a.h5"))
    blocks = re.findall(r"(?:^\|.*\n)+", card, re.MULTILINE)
    assert len(blocks) == 3
    for block in blocks:
        assert len({line.count("|") for line in block.splitlines()}) == 1


def test_a_matrix_given_in_python_has_no_files() -> None:
    assert "of a matrix given in Python" in model_card(METRICS, RunConfig())


def test_names_from_the_data_are_not_markup() -> None:
    hostile = "<script>alert(1)</script> | `x` [a](b) \x1b[31m\n# top"
    metrics = {**METRICS, "categories": [{**METRICS["categories"][0], "name": hostile, "families": {hostile: 3}}]}
    card = model_card(metrics, RunConfig(dataset_path=f"/data/{hostile}.h5"))
    assert "<script>" not in card.replace("`<script>", "")
    assert "\x1b" not in card
    row = next(line for line in card.splitlines() if "&lt;script&gt;" in line and line.startswith("|"))
    assert row.count("|") - row.count("\\|") == 8
    assert "# top" not in card.splitlines()
