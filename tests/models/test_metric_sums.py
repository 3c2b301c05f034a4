"""Metrics measured by several ranks equal those of one process."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import planted_matrix
from processes import run_ranks

from spinlock_fast import CategoricalHierarchicalVQVAE, CategoricalVQVAEConfig
from spinlock_fast.config.schema import TrainingConfig
from spinlock_fast.data.host_rows import HostRows
from spinlock_fast.data.row_view import RowView
from spinlock_fast.distributed import Ranks, current_ranks
from spinlock_fast.models.metric_sums import MetricSums
from spinlock_fast.models.metrics import Metrics, Validation, evaluate

WORLD = 3
TRAINING = TrainingConfig()


def make_model() -> CategoricalHierarchicalVQVAE:
    torch.manual_seed(0)
    groups = {"cluster_1": [3, 4, 5, 0], "cluster_2": [1, 2, 6, 7, 8, 9]}
    config = CategoricalVQVAEConfig(
        input_dim=10, group_indices=groups, group_embedding_dim=8, group_hidden_dim=8, codebook_init="uniform"
    )
    model = CategoricalHierarchicalVQVAE(config)
    model.quantizer.initialize(model.encode(x(100)).detach())
    return model


def x(rows: int) -> torch.Tensor:
    return torch.from_numpy(planted_matrix(rows, [4, 6], seed=1))


def assert_close(found: Metrics, expected: Metrics) -> None:
    """Float32 sums depend on the sizes of blocks."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name == "categories":
            for a, b in zip(found[name], value, strict=True):
                assert a.keys() == b.keys()
                assert all(a[key] == pytest.approx(b[key], rel=1e-4) for key in b if key != "name")
        else:
            assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


@contextmanager
def group(rank: int, store: str) -> Iterator[Ranks]:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD, timeout=timedelta(seconds=60)
    )
    try:
        yield current_ranks()
    finally:
        dist.destroy_process_group()


def check_ranks(rank: int, store: str) -> None:
    with group(rank, store) as ranks:
        model = make_model()
        for rows in (120, 1100, 2):  # 1,100: the topographic sample is spread over ranks; 2: rank 0 has no row
            whole = x(rows)
            expected = evaluate(model, whole, TRAINING)
            mine = whole[ranks.share(rows)]
            found = evaluate(model, mine, TRAINING, ranks=ranks)
            assert_close(found, expected)
            assert ranks.gather_objects(found) == [found] * WORLD
            validation = Validation(model, mine, TRAINING, ranks)
            for _ in range(2):
                validation.run()
            assert validation.result() == {name: found[name] for name in validation.result()}
            sums = MetricSums(model, ranks.share(rows).start)
            for block in mine.split(50):
                sums.add(block)
            sums.merge(ranks)
            assert_close(sums.metrics(TRAINING), expected)
        check_outliers(ranks, model)


def check_outliers(ranks: Ranks, model: CategoricalHierarchicalVQVAE) -> None:
    rows = x(60)
    rows[[0, 1, 25]] = 1e35
    keep = rows[:, 0] < 1.0e30
    found = evaluate(model, rows[ranks.share(60)], TRAINING, ranks=ranks)
    assert found.pop("rows_left_out") == [0, 1, 25]
    assert_close(found, evaluate(model, rows[keep], TRAINING))


def test_ranks_measure_like_one_process(tmp_path: Path) -> None:
    run_ranks(check_ranks, (str(tmp_path / "store"),), WORLD)


def test_outliers_of_transformed_rows_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    """Rows in host memory keep the transform of their view."""
    caplog.set_level(logging.ERROR)
    matrix = x(40).numpy()

    def shifted(rows: Any) -> Any:
        return rows - np.float32(5.0)

    rows = HostRows(RowView(matrix + np.float32(5.0), transform=shifted), torch.device("cpu"))
    matrix_with_outlier = matrix.copy()
    matrix_with_outlier[3] = 1e35
    outlier = HostRows(RowView(matrix_with_outlier + np.float32(5.0), transform=shifted), torch.device("cpu"))
    model = make_model()
    found = evaluate(model, outlier, TRAINING)
    assert found.pop("rows_left_out") == [3]
    expected = evaluate(model, HostRows(rows.rows.select(np.delete(np.arange(40), 3)), rows.device), TRAINING)
    assert found == expected
    assert found["reconstruction_error"] < 10.0
