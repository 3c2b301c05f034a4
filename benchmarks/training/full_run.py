"""Times the whole training command at full size.

    python -m benchmarks.training.full_run --output result.json
    python -m benchmarks.training.full_run --output result.json --generate 100000     # real operators

Expands a few hundred operators to --rows (see `benchmarks.data.expand_dataset`), then trains configs/100k.yaml on them
in new processes: first with empty kernel caches, then with the caches of the first run. The data are in the page cache
both times. Early stopping is off. Then an epoch is profiled with the shapes of the run (see `epoch_profile.py`).
Quality on expanded rows is meaningless and only checked for plausible values; with --generate, it is that of real ones.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.commands import ROOT, run_python, simulate_operators
from benchmarks.common.timing import commit
from benchmarks.training.epoch_profile import profile_epoch
from spinlock_fast.checkpoints.directory import load_payload, load_run_config
from spinlock_fast.device import resolve_device
from spinlock_fast.models.metrics import device_name, versions
from spinlock_fast.models.vqvae import CategoricalVQVAEConfig


def timed_training(name: str, chosen: argparse.Namespace, data: str, caches: Path) -> dict[str, Any]:
    """Runs the command once: wall time and seconds per stage, after checking its metrics."""
    checkpoint = chosen.work / name
    shutil.rmtree(checkpoint, ignore_errors=True)
    settings = {
        "dataset_path": data,
        "training.num_epochs": chosen.epochs,
        "training.early_stopping_patience": 1_000_000,
    }
    changes = [f"{key}={json.dumps(value)}" for key, value in settings.items()] + chosen.overrides
    command = ["-m", "spinlock_fast.train", str(chosen.config), "--output", str(checkpoint)]
    command += ["--device", chosen.device]
    for change in changes:
        command += ["--set", change]
    kinds = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH")
    environment = {**os.environ, **{kind: str(caches / kind.lower()) for kind in kinds}}
    wall = run_python(command, chosen.work / f"{name}.log", environment)
    metrics = json.loads((checkpoint / "metrics.json").read_text())
    history = json.loads((checkpoint / "training_history.json").read_text())["epochs"]
    check_plausible(metrics, history, chosen.rows, chosen.epochs)
    stages = {**metrics["seconds"], "outside": wall - metrics["seconds"]["total"]}
    steps = sum(record["seconds"] for record in history)
    return {
        "caches": name,
        "wall_seconds": wall,
        "seconds": stages,
        "seconds_of_steps": steps,
        "seconds_of_first_epoch": history[0]["seconds"],
        "median_epoch_seconds": sorted(record["seconds"] for record in history)[len(history) // 2],
        "categories": len(metrics["categories"]),
        "total_codes": metrics["total_codes"],
        "val_loss": metrics["val_loss"],
        "reconstruction_error": metrics["reconstruction_error"],
        "utilization": metrics["utilization"],
        "log": (chosen.work / f"{name}.log").read_text()[-2000:],
    }


def check_plausible(metrics: dict[str, Any], history: Sequence[dict[str, Any]], rows: int, epochs: int) -> None:
    """Raises AssertionError if rows, epochs, losses or metrics of a run are not as expected."""
    assert metrics["samples"] == rows, f"{metrics['samples']} rows instead of {rows}"
    assert len(history) == metrics["epochs"] == epochs, f"{len(history)} epochs instead of {epochs}"
    assert metrics["val_rows"] == round(rows / 10)
    losses = [record["train_loss"] for record in history]
    assert all(math.isfinite(loss) for loss in losses)
    # Shorter runs end during warm-up, while the loss may still rise.
    assert epochs < 20 or losses[-1] < losses[0], f"the loss rose from {losses[0]} to {losses[-1]}"
    assert 0.0 < metrics["reconstruction_error"] < 1.0, metrics["reconstruction_error"]
    assert 0.0 < metrics["utilization"] <= 1.0


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the command; returns the results."""
    options = argparse.ArgumentParser(description="Times the whole training command with cold and warm kernel caches.")
    options.add_argument("--source", help="HDF5 file of operators to expand; default: simulated")
    options.add_argument("--operators", type=int, default=256, help="operators to simulate without --source")
    options.add_argument("--data", help="data set of --rows rows (path or glob) to use instead of expanding one")
    options.add_argument("--rows", type=int, default=100_000)
    options.add_argument("--generate", type=int, metavar="N", help="simulate all N rows instead of expanding a few")
    options.add_argument("--generate-config", type=Path, default=ROOT / "configs/data/100k.yaml")
    options.add_argument("--epochs", type=int, default=200)
    options.add_argument("--device", default="auto")
    options.add_argument("--config", type=Path, default=ROOT / "configs/100k.yaml")
    options.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    options.add_argument("--warm-runs", type=int, default=1)
    options.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "spinlock_full_run")
    options.add_argument("--output", type=Path, required=True, help="JSON file of results")
    options.add_argument("--no-profile", action="store_true")
    options.add_argument("--commit", help="of the source tree, if it is not a git repository")
    chosen = options.parse_args(arguments)
    chosen.work = chosen.work.resolve()
    chosen.work.mkdir(parents=True, exist_ok=True)
    device = resolve_device(chosen.device)
    result: dict[str, Any] = {
        "device": device_name(device),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {**versions(), "python": platform.python_version(), "cuda": torch.version.cuda},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": chosen.commit or commit(),
        "rows": chosen.generate or chosen.rows,
        "epochs": chosen.epochs,
        "overrides": chosen.overrides,
    }
    started = time.perf_counter()
    data = chosen.data
    if chosen.generate:
        chosen.rows, data = chosen.generate, str(chosen.work / "generated.h5")
        command = ["-m", "spinlock_fast.generate", "--config", str(chosen.generate_config), "--output", data]
        command += ["--operators", str(chosen.generate), "--device", chosen.device, "--overwrite", "--quiet"]
        seconds = run_python(command, chosen.work / "generate.log")
        result |= {"generated": chosen.generate_config.name, "operators_per_second": chosen.generate / seconds}
    elif data is None:
        source = chosen.source or simulate_operators(chosen.work, chosen.operators)
        command = ["-m", "benchmarks.data.expand_dataset", str(source), str(chosen.work / "data")]
        run_python([*command, "--rows", str(chosen.rows)], chosen.work / "expand.log")
        data = str(chosen.work / "data" / "part_*.h5")
    result["seconds_to_make_data"] = time.perf_counter() - started
    _write(chosen.output, result)

    with tempfile.TemporaryDirectory(dir=chosen.work) as caches:
        names = ["cold", *(f"warm{i or ''}" for i in range(chosen.warm_runs))]
        result["runs"] = []
        for name in names:
            result["runs"].append(timed_training(name, chosen, data, Path(caches)))
            _write(chosen.output, result)
    if not chosen.no_profile:
        checkpoint = chosen.work / names[-1]
        shapes = CategoricalVQVAEConfig(**load_payload(checkpoint)["model_config"])
        config = load_run_config(checkpoint)
        result["epoch"] = profile_epoch(config, shapes, chosen.rows, device)
        _write(chosen.output, result)
    sys.stdout.write(summary(result))
    return result


def _write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")


def summary(result: dict[str, Any]) -> str:
    """The main results as text."""
    lines = [f"{result['device']}, {result['rows']:,} rows x {result['epochs']} epochs"]
    if "generated" in result:
        lines.append(f"  simulated: {result['operators_per_second']:.1f} operators/s, {result['generated']}")
    for run in result["runs"]:
        stages = ", ".join(f"{name} {value:.2f}" for name, value in run["seconds"].items())
        lines.append(f"  {run['caches']}: {run['wall_seconds']:.2f} s ({stages}; steps {run['seconds_of_steps']:.2f})")
    if "epoch" in result:
        epoch = result["epoch"]
        for name, way in epoch["ways"].items():
            step = "/".join(f"{value:.3f}" for value in way["step_ms"].values())
            lines.append(
                f"  {name}: step {step} ms (p20/50/80), epoch {way['epoch_ms']['p50']:.1f} ms, "
                f"host {way['launching_an_epoch_ms']['p50']:.1f} ms{'' if way['graphs'] else ', no graphs'}"
            )
        lines.append("  " + ", ".join(f"{name} {value:.2f}" for name, value in epoch["between_epochs"].items()))
        profile = epoch["profile"]
        lines.append(
            f"  profile: {profile['wall_us_per_step']:.0f} us a step, {profile['busy_us_per_step']:.0f} busy, "
            f"{profile['launches_per_step']:.0f} operations"
        )
        lines += [
            f"    {row['us_per_step']:8.1f} us {row['share']:6.1%} x{row['per_step']:<6.1f} {row['name'][:100]}"
            for row in profile["top"][:15]
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
