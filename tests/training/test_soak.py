"""A long run has constant memory and a finite loss."""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path

import numpy as np
import pytest
from helpers import planted_matrix

from spinlock_fast.config.schema import RunConfig
from spinlock_fast.training.observer import EpochRecord, SilentObserver
from spinlock_fast.training.trainer import Trainer

STEPS = 10_000

log = logging.getLogger(__name__)


class MemoryRecorder(SilentObserver):
    """Resident memory of the process after each epoch, in bytes."""

    def __init__(self) -> None:
        self.resident: list[int] = []
        self.losses: list[float] = []

    def epoch_finished(self, record: EpochRecord) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.resident.append(pages * os.sysconf("SC_PAGE_SIZE"))
        self.losses.append(record.train_loss)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory from /proc")
def test_long_run_has_constant_memory_and_finite_loss() -> None:
    batch, rows = 64, 1800
    per_epoch = -(-round(rows * 0.9) // batch)
    epochs = -(-STEPS // per_epoch)
    training = {
        "batch_size": batch,
        "topo_samples": 64,
        "num_epochs": epochs,
        "early_stopping_patience": epochs,
        "orthogonality_target": 10.0,
        "dead_code_reset_interval": 5,
        "scheduler": "cosine",
    }
    memory = MemoryRecorder()
    config = RunConfig.model_validate({"device": "cpu", "training": training})
    groups = {f"c{i}": list(range(8 * i, 8 * i + 8)) for i in range(4)}
    result = Trainer(config, memory).fit(planted_matrix(rows, [8] * 4, seed=1), groups)
    assert len(result.history) * per_epoch >= STEPS
    assert all(math.isfinite(loss) for loss in memory.losses)
    quarter = len(memory.resident) // 4
    early, late = (
        float(np.median(part)) for part in (memory.resident[quarter : 2 * quarter], memory.resident[-quarter:])
    )
    log.info(
        "%d steps, %.1f MiB early, %.1f MiB late, loss %.4f -> %.4f",
        len(result.history) * per_epoch,
        early / 2**20,
        late / 2**20,
        memory.losses[0],
        memory.losses[-1],
    )
    assert late - early < 4 * 2**20, f"{(late - early) / 2**20:.1f} MiB more"
