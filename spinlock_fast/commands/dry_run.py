"""`--dry-run`: plan, sizes, memory and time estimate of a run, without writing anything."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

import torch

from spinlock_fast.config.random_streams import seed_torch
from spinlock_fast.config.schema import RunConfig
from spinlock_fast.data.feature_matrix import is_kept_on_disk
from spinlock_fast.data.split import split_rows
from spinlock_fast.device import resolve_device
from spinlock_fast.distributed import current_ranks
from spinlock_fast.errors import OutputError
from spinlock_fast.features.encode import block_rows, encode_seconds, make_encoders
from spinlock_fast.features.family_layout import resolve_families
from spinlock_fast.messages import format_bytes
from spinlock_fast.models.losses import LossWeights, loss_terms
from spinlock_fast.models.vqvae import CategoricalHierarchicalVQVAE, CategoricalVQVAEConfig
from spinlock_fast.training.initial_model import initial_model
from spinlock_fast.training.preparation import open_source
from spinlock_fast.training.run import output_directory
from spinlock_fast.training.token_decoder_fit import joint_search_epochs

# Measured, see docs/scale.md.
_PROCESS_BYTES = 350_000_000  # Python, torch and buffers
_MAPPED_BYTES = 1 << 27  # resident pages of the file of features
_STATISTICS_BYTES = 250_000_000  # columns while their medians are found
_INDEX_BYTES = 60  # row numbers, keys and permutations of a row

_PROBE_STEPS = 4
_PROBE_CATEGORY = 15  # features per category in the probe; the actual number comes from discovery


def print_plan(config: RunConfig) -> None:
    """Checks settings and data, and prints sizes, memory, disk space and an estimate of the time.

    Under torchrun, memory is that of one rank, and the time is that of all ranks together.

    Raises:
        ConfigError, DataError: as a run does, as far as file headers and one block of data show.
        OutputError: the features will be kept on disk, and the disk has too little space.
    """
    device = resolve_device(config.device)
    ranks = current_ranks()
    directory = output_directory(config)
    initial = initial_model(config)
    config = resolve_families(config if initial is None else initial.settings(config))
    lines = []
    with open_source(config) as source:
        rows = source.rows
        split = split_rows(rows, config.training, config.random_seed)
        training_rows = split.train if config.feature_cleaning.nan_fill == "median" else None
        encoders = (
            make_encoders(source, config.families, config.random_seed, config.memory_budget, training_rows)
            if initial is None
            else initial.encoders(source, config.families)
        )
        seconds = encode_seconds(source, encoders, config.memory_budget, device)
        for family in encoders:
            info = source.datasets[family.name]
            lines.append(
                f"  {family.name}: {info.path} {[rows, *info.row_shape]} "
                f"({format_bytes(rows * info.row_bytes)}) -> {family.encoder_name}, {family.encoder.output_dim} columns"
            )
        block_bytes = max(
            4 * block_rows(info, config.memory_budget) * info.row_bytes for info in source.datasets.values()
        )
        files = len(source.files)
    columns = sum(family.encoder.output_dim for family in encoders)
    training = config.training
    batch = min(training.batch_size, split.train.size)
    steps = -(-split.train.size // batch)
    joint_epochs = joint_search_epochs(training, split.train.size)
    step_seconds = probe_step(config, columns, -(-batch // ranks.size), device)
    encoding, stepping = seconds / ranks.size, training.num_epochs * steps * step_seconds
    on_disk = is_kept_on_disk(rows, columns, config.data.feature_matrix, config.memory_budget, ranks)
    memory = expected_memory(rows, columns, on_disk and config.data.feature_matrix != "memory", device) + block_bytes
    text = [
        f"data: {rows:,} samples in {files} file{'s' * (files > 1)}",
        *lines,
        *([] if initial is None else initial.plan(training.freeze)),
        f"split: {split.train.size:,} training, {split.val.size:,} validation, {split.test.size:,} test samples",
        f"training: {training.num_epochs} epochs of {steps} steps, batch {batch}, on {device}"
        + (f", by {ranks.size} ranks" if ranks.size > 1 else ""),
        *([f"token decoder: fitted in {joint_epochs} epochs after training"] if joint_epochs else []),
        f"memory: about {format_bytes(memory)}{' per rank' if ranks.size > 1 else ''}, of which "
        f"{format_bytes(block_bytes)} for raw features (memory_budget {format_bytes(config.memory_budget)})",
        _disk_text(directory, 4 * rows * columns, on_disk, columns),
        f"time: about {encoding:.0f} s to encode, {stepping:.0f} s to train, "
        "extrapolated from one block and four steps" + ", without the token decoder" * bool(joint_epochs),
        f"output: {directory}",
    ]
    sys.stdout.write("\n".join(text) + "\n")


def expected_memory(rows: int, columns: int, on_disk: bool, device: torch.device) -> int:
    """Largest resident memory of a run besides raw features, in bytes, without the model's activations.

    Args:
        on_disk: whether the encoded features are kept in a file during training.
    """
    features = 4 * rows * columns
    training = features if device.type == "cpu" else 0  # a copy of the rows that are in memory
    kept = _MAPPED_BYTES if on_disk else features + training
    return _PROCESS_BYTES + kept + min(features, _STATISTICS_BYTES) + _INDEX_BYTES * rows


def _disk_text(directory: Path, size: int, on_disk: bool, columns: int) -> str:
    """Where the features are kept; raises OutputError if their disk has too little space."""
    text = f"features: {columns} columns, {format_bytes(size)}, "
    if not on_disk:
        return text + "in memory (data.feature_matrix)"
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if shutil.disk_usage(existing).free < size:
        raise OutputError(
            f"{directory}: the encoded features need {format_bytes(size)} of disk: No space left on device"
        )
    return text + f"on disk in {directory} while the command runs (data.feature_matrix)"


def probe_step(config: RunConfig, features: int, batch: int, device: torch.device) -> float:
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
        model.quantizer.sync = False  # rank 0 alone measures
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
