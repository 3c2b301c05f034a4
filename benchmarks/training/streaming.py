"""Steps per second with training rows streamed from host memory, beside rows that are resident on the device.

    python -m benchmarks.training.streaming --output streaming.json              # 1,000,000 rows on a CUDA device
    python -m benchmarks.training.streaming --device cpu --rows 20000 --batches 512

Both train 172 features and 33 codebooks on the same batches. Epochs alternate; the result is the median ratio of
neighbouring epochs. `ready` is the fraction of an epoch in which the host copied rows, waited for a copy, or waited for
the device to free a buffer. Before anything is timed, every step is checked to read its own rows, with steps launched
ahead of the device as in training.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.timing import write
from benchmarks.training.epoch_profile import one_epoch
from spinlock_fast.benchmark import SEED_FEATURES, training_run
from spinlock_fast.device import resolve_device
from spinlock_fast.training.cuda_graphs import WARM_UP_STEPS, dedicated_stream
from spinlock_fast.training.loop import TrainingRun

PLACEMENTS = {"resident": "always", "streamed": "never"}  # values of training.data_on_device


def check_rows(run: TrainingRun, x: Tensor) -> None:
    """Raises AssertionError if a step of an epoch reads other rows than those of the shuffled order."""
    step = run.training_step
    order, there = torch.randperm(len(x)), x.to(run.device)
    places, numbers = step.feed.begin_epoch(order, 0).to(run.device), order.to(run.device)
    differences = torch.zeros(step.steps_per_epoch, dtype=torch.int64, device=run.device)
    for i in range(step.steps_per_epoch):
        assert step.feed.steps_available(i) >= 1
        mine = slice(i * step.batch_size, (i + 1) * step.batch_size)
        differences[i] = (step.x[places[mine]] != there[numbers[mine]]).any(1).sum()
    assert not differences.any(), f"steps {differences.nonzero()[:, 0].tolist()[:5]} read other rows than their own"


def epoch_seconds(run: TrainingRun) -> tuple[float, float]:
    """Seconds of an epoch, and those that the host spent in `feed.steps_available`."""
    feed, spent = run.training_step.feed, 0.0
    original = feed.steps_available

    def timed(step: int) -> int:
        nonlocal spent
        started = time.perf_counter()
        steps = original(step)
        spent += time.perf_counter() - started
        return steps

    feed.steps_available = timed  # type: ignore[method-assign]
    try:
        started = time.perf_counter()
        one_epoch(run)  # its summary synchronises with the device
        return time.perf_counter() - started, spent
    finally:
        del feed.steps_available


def measure(rows: int, batch: int, device: str, epochs: int) -> dict[str, Any]:
    """Times both placements at one batch size: a row of the results."""
    x = torch.randn(rows, sum(SEED_FEATURES), generator=torch.Generator().manual_seed(0))
    runs = {
        way: training_run(batch, device=device, x=x, training__data_on_device=where)
        for way, where in PLACEMENTS.items()
    }
    seconds: dict[str, list[float]] = {way: [] for way in PLACEMENTS}
    ready_fractions: list[float] = []
    for run in runs.values():
        with dedicated_stream(run.device):
            check_rows(run, x)
            for _ in range(WARM_UP_STEPS + 1 if run.launcher.capturing else 1):
                one_epoch(run)
    for _ in range(epochs):
        for way, run in runs.items():
            with dedicated_stream(run.device):
                total, spent = epoch_seconds(run)
            seconds[way].append(total)
            if way == "streamed":
                ready_fractions.append(spent / total)
    steps = runs["resident"].training_step.steps_per_epoch
    assert all(math.isfinite(run.training_step.summary().loss) for run in runs.values())
    ratios = [a / b for a, b in zip(seconds["resident"], seconds["streamed"], strict=True)]
    streamed = statistics.median(seconds["streamed"])
    return {
        "rows": rows,
        "batch": batch,
        "steps": steps,
        **{
            f"{way}_steps_per_second": steps / statistics.median(epochs_seconds)
            for way, epochs_seconds in seconds.items()
        },
        "streamed_over_resident": statistics.median(ratios),
        "ratios": ratios,
        "streamed_gb_per_second": x.nbytes / streamed / 1e9,
        "ready": statistics.median(ready_fractions),
        "graphs": runs["streamed"].launcher.capturing,
    }


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Runs the command; returns the rows of the results file."""
    options = argparse.ArgumentParser(
        description="Steps per second with rows streamed from host memory and resident on the device."
    )
    options.add_argument("--device", default="auto")
    options.add_argument("--rows", type=int, default=1_000_000)
    options.add_argument("--batches", type=int, nargs="+", default=[512, 4096, 65_536])
    options.add_argument("--epochs", type=int, default=5)
    options.add_argument("--output", type=Path, help="JSON file of results")
    chosen = options.parse_args(arguments)
    device = str(resolve_device(chosen.device))
    rows = []
    for batch in chosen.batches:
        row = measure(chosen.rows, batch, device, chosen.epochs)
        rows.append(row)
        sys.stdout.write(
            f"batch {batch}: {row['resident_steps_per_second']:.1f} steps/s resident, "
            f"{row['streamed_steps_per_second']:.1f} streamed ({row['streamed_over_resident']:.3f}; "
            f"{row['streamed_gb_per_second']:.2f} GB/s of rows, ready {row['ready']:.1%})\n"
        )
        if chosen.output is not None:
            write(chosen.output, rows, device)
    return rows


if __name__ == "__main__":
    main()
