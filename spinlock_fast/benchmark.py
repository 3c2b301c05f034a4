"""Times training steps on random data."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spinlock_fast.config.loading import apply_overrides
from spinlock_fast.config.random_streams import seed_torch
from spinlock_fast.config.schema import RunConfig
from spinlock_fast.data.host_rows import place_rows
from spinlock_fast.data.row_view import RowView
from spinlock_fast.device import resolve_device
from spinlock_fast.distributed import SINGLE, Ranks
from spinlock_fast.models.initialization import initialize_codebooks
from spinlock_fast.models.vqvae import CategoricalHierarchicalVQVAE, CategoricalVQVAEConfig
from spinlock_fast.training.cuda_graphs import dedicated_stream
from spinlock_fast.training.loop import TrainingRun
from spinlock_fast.training.observer import SilentObserver
from spinlock_fast.training.step import learning_rates

SEED_FEATURES = (4, 16, 15, 13, 32, 28, 20, 10, 11, 14, 9)

_BATCHES = 8  # batches of random rows, which the timed steps repeat as epochs do
_WARM_UP = 5


def train_step(
    batch: int = 512,
    features: Sequence[int] = SEED_FEATURES,
    topo_samples: int = 512,
    device: str = "cpu",
    steps: int = 15,
) -> float:
    """Median duration of a training step in milliseconds, on random data.

    The step is that of `Trainer.fit`, with optimizer, moving averages of the codes and, on a CUDA device, CUDA graphs.
    On a CPU it uses `torch.get_num_threads()` threads.

    Args:
        batch: rows per step.
        features: number of features of each category.
        topo_samples: rows whose pairwise distances enter the topographic loss.
        device: "cpu", "cuda" or "cuda:N".
        steps: number of timed steps, after warm-up.
    """
    return statistics.median(step_seconds(training_run(batch, features, topo_samples, device), steps)) * 1e3


def training_run(
    batch: int = 512,
    features: Sequence[int] = SEED_FEATURES,
    topo_samples: int = 512,
    device: str = "cpu",
    x: Tensor | None = None,
    ranks: Ranks = SINGLE,
    **settings: Any,
) -> TrainingRun:
    """The training run of `Trainer.fit`, before its first step.

    Args:
        batch, features, topo_samples, device: see `train_step`.
        x: [N, sum features] training rows; random by default.
        ranks: processes that share each batch.
        settings: configuration overrides, with "training__learning_rate" for `training.learning_rate`.
    """
    rows = sum(features)
    if x is None:
        x = torch.randn(_BATCHES * batch, rows, generator=torch.Generator().manual_seed(0))
    fixed = {"training.batch_size": batch, "training.topo_samples": topo_samples, "training.num_epochs": 1_000_000}
    chosen = {name.replace("__", "."): value for name, value in settings.items()}
    config = apply_overrides(RunConfig.model_validate({"dataset_path": "none.h5"}), {**fixed, **chosen})
    groups: dict[str, list[int]] = {}
    for i, size in enumerate(features, start=1):
        start = sum(features[: i - 1])
        groups[f"cluster_{i}"] = list(range(start, start + size))
    model_config = CategoricalVQVAEConfig(**{**config.model.model_dump(), "input_dim": rows, "group_indices": groups})
    place = resolve_device(device)
    with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []):
        seed_torch(config.random_seed, place)
        model = CategoricalHierarchicalVQVAE(model_config).to(place)
        model.quantizer.sync = False
        matrix, where = x.numpy(), config.training.data_on_device
        x_train, x_val = (place_rows(RowView(rows), place, where) for rows in (matrix, matrix[:1]))
        run = TrainingRun(config, SilentObserver(), lambda: None, model, x_train, x_val, ranks=ranks)
        initialize_codebooks(model, x_train)
    model.train()
    return run


def step_seconds(run: TrainingRun, steps: int) -> list[float]:
    """Seconds of each of `steps` steps; a launch of several steps is divided evenly."""
    seconds: list[float] = []
    step = run.training_step
    with dedicated_stream(run.device):
        done = 0
        while done < _WARM_UP + steps:
            if done % step.full_batches == 0:
                order = run.row_order(done // step.full_batches)
                step.begin_epoch(order, learning_rates(run.training, step.steps_per_epoch, 0), 0)
            most = min(
                step.full_batches - done % step.full_batches, step.feed.steps_available(done % step.full_batches)
            )
            started = _clock(run.device)
            count = run.launcher.run(step.kind(done % step.full_batches, reset=False), most)
            each = (_clock(run.device) - started) / count
            if done >= _WARM_UP:
                seconds += [each] * count
            done += count
    return seconds[:steps]


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
