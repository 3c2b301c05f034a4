"""The quantizer and a whole training step at the seed shape: 512 rows, 33 codebooks, 484 codes, 172 features.

pytest benchmarks/training/bench_step.py --benchmark-only
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from spinlock_fast import CategoricalHierarchicalVQVAE, CategoricalVQVAEConfig
from spinlock_fast.benchmark import SEED_FEATURES
from spinlock_fast.config.schema import TrainingConfig
from spinlock_fast.models.losses import LossWeights, loss_terms

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


def bench_training_step(benchmark: Any, model: CategoricalHierarchicalVQVAE) -> None:
    model.train()
    training = TrainingConfig()
    weights = LossWeights.of(training)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    x = torch.randn(ROWS, sum(SEED_FEATURES))

    def step() -> float:
        total = loss_terms(model, x, model(x), training.topo_samples).total(weights)
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        optimizer.step()
        return float(total.detach())

    first = step()
    assert math.isfinite(first)
    assert min(step() for _ in range(20)) < first
    record_environment(benchmark)
    benchmark.pedantic(step, rounds=15, warmup_rounds=2)
