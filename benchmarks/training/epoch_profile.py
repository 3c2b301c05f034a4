"""Profile of a training epoch: step times per launch mode, work between epochs, and the longest operations."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from spinlock_fast.checkpoints.directory import save_torch
from spinlock_fast.checkpoints.host_copies import PinnedStaging
from spinlock_fast.config.loading import apply_overrides
from spinlock_fast.config.schema import RunConfig
from spinlock_fast.models.initialization import initialize_codebooks
from spinlock_fast.models.vqvae import CategoricalHierarchicalVQVAE, CategoricalVQVAEConfig
from spinlock_fast.training.cuda_graphs import WARM_UP_STEPS, dedicated_stream
from spinlock_fast.training.loop import TrainingRun
from spinlock_fast.training.observer import SilentObserver

_TOP = 25
_EPOCHS = 5
_PROFILED_STEPS = 48


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p20, p50 and p80 of measurements."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return {f"p{p}": ordered[round(p / 100 * last)] for p in (20, 50, 80)}


def random_run(
    config: RunConfig, model_config: CategoricalVQVAEConfig, rows: int, device: torch.device, steps_per_launch: int
) -> TrainingRun:
    """A run on random features with one factor per category; `steps_per_launch=0` disables CUDA graphs."""
    torch.manual_seed(0)
    model = CategoricalHierarchicalVQVAE(model_config).to(device)
    x = torch.randn(rows, model_config.input_dim, device=device)
    for members in model_config.group_indices.values():
        x[:, members] = 0.5 * x[:, members] + torch.randn(rows, 1, device=device)
    held_out = max(rows // 10, 2)
    config = apply_overrides(config, {"training.cuda_graphs": steps_per_launch > 0, "training.num_epochs": 10_000})
    run = TrainingRun(config, SilentObserver(), lambda: None, model, x[held_out:], x[:held_out])
    run.launcher.steps_per_launch = max(steps_per_launch, 1)
    initialize_codebooks(model, run.x_train)
    return run


def one_epoch(run: TrainingRun, after_launch: Callable[[int], None] = lambda steps: None) -> None:
    """Runs the steps of the next epoch; `after_launch` is called with the number of steps of each launch."""
    original = run.launcher.run

    def launch(kind: Any, most: int) -> int:
        steps = original(kind, most)
        after_launch(steps)
        return steps

    run.launcher.run = launch  # type: ignore[method-assign]
    try:
        run._run_steps()
    finally:
        run.launcher.run = original  # type: ignore[method-assign]
    run.epoch, run.step = run.epoch + 1, 0
    assert run.training_step.summary().first_nonfinite is None, "the loss is not finite"


def step_times(run: TrainingRun) -> dict[str, Any]:
    """Milliseconds per step, per epoch, and of launching an epoch on the host."""
    for _ in range(WARM_UP_STEPS + 1 if run.launcher.capturing else 1):
        one_epoch(run)
    steps_ms: list[float] = []
    epochs_ms: list[float] = []
    launching_ms: list[float] = []
    for _ in range(_EPOCHS):
        events, counts, host_times = [_timestamp(run.device)], [], [time.perf_counter()]

        def record(steps: int, events: Any = events, counts: Any = counts, host_times: Any = host_times) -> None:
            events.append(_timestamp(run.device))
            counts.append(steps)
            host_times.append(time.perf_counter())

        one_epoch(run, record)
        epochs_ms.append(1e3 * (time.perf_counter() - host_times[0]))
        launching_ms.append(1e3 * (host_times[-1] - host_times[0]))
        full_launches = len(counts) - (run.training_step.remainder > 0)
        steps_ms += [
            _milliseconds(events[i], events[i + 1]) / counts[i] for i in range(full_launches) for _ in range(counts[i])
        ]
    return {
        "step_ms": percentiles(steps_ms),
        "epoch_ms": percentiles(epochs_ms),
        "launching_an_epoch_ms": percentiles(launching_ms),
        "steps_per_epoch": run.training_step.steps_per_epoch,
        "graphs": run.launcher.capturing,
    }


def _timestamp(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _milliseconds(start: Any, end: Any) -> float:
    return 1e3 * (end - start) if isinstance(start, float) else start.elapsed_time(end)


def between_epochs(run: TrainingRun) -> dict[str, float]:
    """Median milliseconds (of five) of the work between epochs."""

    def median(action: Callable[[], object]) -> float:
        times = []
        for _ in range(6):
            started = time.perf_counter()
            action()
            if run.device.type == "cuda":
                torch.cuda.synchronize(run.device)
            times.append(1e3 * (time.perf_counter() - started))
        return statistics.median(times[1:])

    staging = PinnedStaging(run.device.type)
    for _ in range(WARM_UP_STEPS + 1):  # until the validation is captured as a CUDA graph
        run._validate()
    with tempfile.TemporaryDirectory() as directory:
        return {
            "validation_ms": median(run._validate),
            "keeping_the_best_ms": median(lambda: run.selection.save_weights(run.model)),
            "summary_and_record_ms": median(
                lambda: run._epoch_record(run._check_finite(run.training_step.summary(), 0), 0, 0.0)
            ),
            "order_of_rows_ms": median(lambda: run.row_order(run.epoch + (run._row_order or (0,))[0] % 2 + 1)),
            "state_to_host_ms": median(lambda: staging(run.state())),
            "saving_a_state_ms": median(
                lambda: save_torch(Path(directory) / "state.pt", {"run": staging(run.state())})
            ),
        }


def top_operations(run: TrainingRun) -> dict[str, Any]:
    """Device time per kernel (on a CPU, host time per operation) over some steps, and launches per step."""
    on_cuda = run.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    kind = run.training_step.kind(0, reset=False)
    steps = min(_PROFILED_STEPS if on_cuda else 8, run.training_step.full_batches)
    run.model.train()
    run.training_step.begin_epoch(run.row_order(run.epoch), torch.full((run.training_step.steps_per_epoch,), 1e-3), 0)
    with profile(activities=activities) as profiler:
        started, done = time.perf_counter(), 0
        while done < steps:
            done += run.launcher.run(kind, steps - done)
        if on_cuda:
            torch.cuda.synchronize(run.device)
        wall = time.perf_counter() - started
    rows = []
    for event in profiler.key_averages():
        if on_cuda and event.device_type != DeviceType.CUDA:
            continue
        micros = event.self_device_time_total if on_cuda else event.self_cpu_time_total
        rows.append((micros, event.count, event.key))
    rows.sort(reverse=True)
    total = sum(row[0] for row in rows)
    return {
        "steps": done,
        "wall_us_per_step": 1e6 * wall / done,
        "busy_us_per_step": total / done,
        "launches_per_step": sum(row[1] for row in rows) / done,
        "top": [
            {"name": key[:160], "us_per_step": micros / done, "share": micros / total, "per_step": count / done}
            for micros, count, key in rows[:_TOP]
        ],
    }


def profile_epoch(
    config: RunConfig,
    model_config: CategoricalVQVAEConfig,
    rows: int,
    device: torch.device,
    launches: Sequence[int] = (0, 1, 4, 16),
) -> dict[str, Any]:
    """Step times per number of steps in a launch (0: no CUDA graphs), and a profile of the fastest mode.

    Args:
        config: of the run.
        model_config: of the model.
        rows: number of rows; a tenth is used for validation.
        device: of the run.
        launches: steps per launch; only 0 on a CPU.
    """
    modes: dict[str, Any] = {}
    fastest: TrainingRun | None = None
    best = float("inf")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for count in launches if device.type == "cuda" else (0,):
        with dedicated_stream(device):
            run = random_run(config, model_config, rows, device, count)
            times = step_times(run)
        modes[f"graphs of {count}" if count else "one by one"] = times
        if times["step_ms"]["p50"] < best:
            best, fastest = times["step_ms"]["p50"], run
    assert fastest is not None
    with dedicated_stream(device):
        return {
            "rows": rows,
            "features": model_config.input_dim,
            "codebooks": fastest.model.num_codebooks,
            "codes": fastest.model.quantizer.layout.total_codes,
            "batch": fastest.training_step.batch_size,
            "topo_samples": config.training.topo_samples,
            "ways": modes,
            "between_epochs": between_epochs(fastest),
            "profile": top_operations(fastest),
            "peak_gpu_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        }
