"""The quantizer at the seed shape (512 rows, 33 codebooks, 484 codes, 172 features), and steps of several shapes.

pytest benchmarks/training/bench_step.py --benchmark-only
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from benchmarks.training.train_step import SHAPES
from spinlock_fast import CategoricalHierarchicalVQVAE, CategoricalVQVAEConfig
from spinlock_fast.benchmark import SEED_FEATURES, training_run
from spinlock_fast.training.step import learning_rates

ROWS = 512


@pytest.fixture(scope="module")
def model() -> CategoricalHierarchicalVQVAE:
    groups, start = {}, 0
    for i, size in enumerate(SEED_FEATURES, start=1):
        groups[f"cluster_{i}"] = list(range(start, start + size))
        start += size
    torch.manual_seed(0)
    return CategoricalHierarchicalVQVAE(CategoricalVQVAEConfig(input_dim=start, group_indices=groups))


def record_environment(benchmark: Any) -> None:
    benchmark.extra_info |= {"rows": ROWS, "threads": torch.get_num_threads(), "torch": torch.__version__}


def bench_quantizer_forward_and_update(benchmark: Any, model: CategoricalHierarchicalVQVAE) -> None:
    quantizer = model.quantizer.train()
    z = torch.randn(ROWS, quantizer.layout.total_dims)
    quantizer.initialize(z)
    codes = quantizer.assign(z).codes
    for g in range(quantizer.layout.groups):
        columns = z[:, quantizer.layout.column_slice(g)].double()
        distance = torch.cdist(columns, quantizer.codebook(g).double())
        chosen = distance.gather(1, codes[:, g : g + 1])[:, 0]
        assert (chosen - distance.min(1).values).max() < 1e-4
    record_environment(benchmark)
    benchmark(quantizer, z)


@pytest.mark.parametrize("batch", [64, 128, 512, 2048])
@pytest.mark.parametrize("shape", list(SHAPES))
def bench_training_step(benchmark: Any, shape: str, batch: int) -> None:
    """The step of `Trainer.fit`."""
    run = training_run(batch, SHAPES[shape], min(batch, 512))
    step = run.training_step

    def one() -> None:
        step.begin_epoch(torch.arange(step.rows), learning_rates(run.training, step.steps_per_epoch, 0), 0)
        run.launcher.run(step.kind(0, reset=False), 1)

    one()
    first = float(step.loss_values[0, 0])
    assert math.isfinite(first)
    for _ in range(20):
        one()
    assert float(step.loss_values[0, 0]) < first
    benchmark.extra_info |= {"rows": batch, "threads": torch.get_num_threads(), "torch": torch.__version__}
    benchmark.pedantic(one, rounds=15, warmup_rounds=2)
