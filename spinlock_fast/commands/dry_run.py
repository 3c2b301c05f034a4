"""`--dry-run`: plan, sizes, memory and time estimate of a run, without writing anything."""

from __future__ import annotations

import sys
import time

import torch

from spinlock_fast.config.random_streams import seed_torch
from spinlock_fast.config.schema import RunConfig
from spinlock_fast.data.split import split_rows
from spinlock_fast.device import resolve_device
from spinlock_fast.features.encode import block_rows, encode_seconds, make_encoders
from spinlock_fast.features.family_layout import resolve_families
from spinlock_fast.messages import format_bytes
from spinlock_fast.models.losses import LossWeights, loss_terms
from spinlock_fast.models.vqvae import CategoricalHierarchicalVQVAE, CategoricalVQVAEConfig
from spinlock_fast.training.preparation import open_source
from spinlock_fast.training.run import output_directory

_PROBE_STEPS = 4
_PROBE_CATEGORY = 15  # features per category in the probe; the actual number comes from discovery


def print_plan(config: RunConfig) -> None:
    """Checks settings and data, and prints sizes, memory and an estimate of the time.

    Raises:
        ConfigError, DataError: as a run does, as far as file headers and one block of data show.
    """
    device = resolve_device(config.device)
    directory = output_directory(config)
    config = resolve_families(config)
    lines = []
    with open_source(config) as source:
        rows = source.rows
        split = split_rows(rows, config.training, config.random_seed)
        training_rows = split.train if config.feature_cleaning.nan_fill == "median" else None
        encoders = make_encoders(source, config.families, config.random_seed, config.memory_budget, training_rows)
        seconds = encode_seconds(source, encoders, config.memory_budget, device)
        for family in encoders:
            info = source.datasets[family.name]
            lines.append(
                f"  {family.name}: {info.path} {[rows, *info.row_shape]} "
                f"({format_bytes(rows * info.row_bytes)}) -> {family.encoder_name}, {family.encoder.output_dim} columns"
            )
        blocks = (4 * block_rows(info, config.memory_budget) * info.row_bytes for info in source.datasets.values())
        block_bytes = max(blocks)
        files = len(source.files)
    columns = sum(family.encoder.output_dim for family in encoders)
    training = config.training
    batch = min(training.batch_size, split.train.size)
    steps = -(-split.train.size // batch)
    step_seconds = _probe_step(config, columns, batch, device)
    total = seconds + training.num_epochs * steps * step_seconds
    text = [
        f"data: {rows:,} samples in {files} file{'s' * (files > 1)}",
        *lines,
        f"split: {split.train.size:,} training, {split.val.size:,} validation, {split.test.size:,} test samples",
        f"training: {training.num_epochs} epochs of {steps} steps, batch {batch}, on {device}",
        f"memory: {format_bytes(4 * rows * columns * 5)} for {columns} columns while cleaning, "
        f"{format_bytes(block_bytes)} for raw features (memory_budget {format_bytes(config.memory_budget)})",
        f"time: about {seconds:.0f} s to encode, {total - seconds:.0f} s to train, "
        "extrapolated from one block and four steps",
        f"output: {directory}",
    ]
    sys.stdout.write("\n".join(text) + "\n")


def _probe_step(config: RunConfig, features: int, batch: int, device: torch.device) -> float:
    """Seconds of a training step without the optimizer, on random data with categories of equal size."""
    groups = {
        f"cluster_{i}": list(range(start, min(start + _PROBE_CATEGORY, features)))
        for i, start in enumerate(range(0, features, _PROBE_CATEGORY), start=1)
    }
    settings = {**config.model.model_dump(), "codebook_init": "uniform", "levels": []}
    with torch.random.fork_rng(devices=[]):
        seed_torch(config.random_seed, device)
        model = CategoricalHierarchicalVQVAE(
            CategoricalVQVAEConfig(**settings, input_dim=features, group_indices=groups)
        ).to(device)
        x = torch.randn(batch, features, device=device)
        weights = LossWeights.of(config.training)
        best = float("inf")
        for _ in range(_PROBE_STEPS):
            started = time.perf_counter()
            terms = loss_terms(model, x, model(x), config.training.topo_samples)
            terms.total(weights).backward()
            model.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = min(best, time.perf_counter() - started)
    return best
