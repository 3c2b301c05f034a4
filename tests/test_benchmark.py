"""The benchmark times the step of the Trainer."""

from __future__ import annotations

import math

import numpy as np
import torch
from helpers import planted_matrix

from spinlock_fast.benchmark import step_seconds, train_step, training_run
from spinlock_fast.config.loading import apply_overrides
from spinlock_fast.config.random_streams import Stream, generator
from spinlock_fast.config.schema import RunConfig
from spinlock_fast.training.step import learning_rates
from spinlock_fast.training.trainer import Trainer

SIZES = [4, 6]
SETTINGS = {"training.batch_size": 32, "training.topo_samples": 16, "training.num_epochs": 2, "model.dropout": 0.0}


def test_losses_are_those_of_the_trainer() -> None:
    x = torch.from_numpy(planted_matrix(160, SIZES, seed=0))
    config = apply_overrides(RunConfig.model_validate({"dataset_path": "none.h5"}), SETTINGS)
    groups = {"cluster_1": [0, 1, 2, 3], "cluster_2": [4, 5, 6, 7, 8, 9]}
    rows = np.arange(128, 160)
    history = Trainer(config).fit(x, groups, val_rows=rows).history

    run = training_run(32, SIZES, 16, x=x[:128], training__num_epochs=2, model__dropout=0.0)
    step = run.training_step
    losses = []
    for epoch in range(2):
        order = generator(config.random_seed, Stream.ROW_ORDER, epoch).permutation(128)
        step.begin_epoch(torch.from_numpy(order), learning_rates(run.training, step.steps_per_epoch, epoch), 0)
        for position in range(step.steps_per_epoch):
            run.launcher.run(step.kind(position, reset=False), 1)
        losses.append(step.summary().loss)
    assert losses == [record.train_loss for record in history]


def test_a_step_is_timed() -> None:
    assert 0.0 < train_step(16, [3, 5], 8, steps=3) < 60_000.0


def test_every_step_is_a_step_of_training() -> None:
    run = training_run(16, [3, 5], 8)
    before = [p.detach().clone() for p in run.model.parameters()]
    seconds = step_seconds(run, 9)
    assert len(seconds) == 9
    assert all(s > 0.0 and math.isfinite(s) for s in seconds)
    assert all(not torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))
