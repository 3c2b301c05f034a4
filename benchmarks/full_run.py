"""The whole command at full size, timed: `python benchmarks/full_run.py --output result.json`.

Expands a few hundred operators to --rows (see make_100k.py), then trains configs/100k.yaml on them, each time in a new
process: first with empty kernel caches, then with the caches that the first run left. The data come from the page
cache of the operating system both times. Early stopping is off, so that every epoch is run. After that an epoch is
profiled in the shapes that the run found (see epoch_profile.py). Quality on these rows means nothing and is only
checked for being sane.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from epoch_profile import measured

from spinlock_fast.checkpoints.directory import load_payload, load_run_config
from spinlock_fast.device import resolve_device
from spinlock_fast.models.metrics import device_name, versions
from spinlock_fast.models.vqvae import CategoricalVQVAEConfig

ROOT = Path(__file__).resolve().parents[1]


def generated(directory: Path, operators: int) -> Path:
    """A file of simulated operators, made by the command."""
    path = directory / f"operators_{operators}.h5"
    if not path.exists():
        settings = ["--config", str(ROOT / "configs/data/quickstart.yaml"), "--operators", str(operators), "--quiet"]
        _run(["-m", "spinlock_fast.generate", *settings, "--output", str(path)], os.environ, directory / "generate.log")
    return path


def _run(command: Sequence[str], environment: Any, log: Path) -> float:
    """Seconds of a Python process; what it says goes to a file, and here if it fails."""
    started = time.perf_counter()
    with open(log, "w") as said:
        done = subprocess.run(
            [sys.executable, *command], env=environment, cwd=ROOT, stdout=said, stderr=said, check=False
        )
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed ({done.returncode}):\n{log.read_text()[-4000:]}")
    return seconds


def trained(name: str, chosen: argparse.Namespace, data: str, caches: Path) -> dict[str, Any]:
    """One run of the command: wall time, seconds by stage, and whether what it made is sane."""
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
    wall = _run(command, environment, chosen.work / f"{name}.log")
    metrics = json.loads((checkpoint / "metrics.json").read_text())
    history = json.loads((checkpoint / "training_history.json").read_text())["epochs"]
    check_sane(metrics, history, chosen.rows, chosen.epochs)
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
        "log": (chosen.work / f"{name}.log").read_text()[-2000:],
    }


def check_sane(metrics: dict[str, Any], history: Sequence[dict[str, Any]], rows: int, epochs: int) -> None:
    """Raises AssertionError where a run did not do what it was timed for."""
    assert metrics["samples"] == rows, f"{metrics['samples']} rows instead of {rows}"
    assert len(history) == metrics["epochs"] == epochs, f"{len(history)} epochs instead of {epochs}"
    assert metrics["val_rows"] == round(rows / 10)
    losses = [record["train_loss"] for record in history]
    assert all(math.isfinite(loss) for loss in losses)
    # Shorter runs end in the warm-up, while rows are mixed more with every epoch.
    assert epochs < 20 or losses[-1] < losses[0], f"the loss rose from {losses[0]} to {losses[-1]}"
    assert 0.0 < metrics["reconstruction_error"] < 1.0, metrics["reconstruction_error"]
    assert 0.0 < metrics["utilization"] <= 1.0


def commit() -> str:
    """Of the working tree, "unknown" outside of a repository."""
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """The command; returns what it writes."""
    options = argparse.ArgumentParser(description="Times the whole training command, cold and warm.")
    options.add_argument("--source", help="HDF5 file of operators to expand; simulated when not given")
    options.add_argument("--operators", type=int, default=256, help="operators to simulate without --source")
    options.add_argument("--data", help="a data set of --rows rows (a path or a glob) instead of expanding one")
    options.add_argument("--rows", type=int, default=100_000)
    options.add_argument("--epochs", type=int, default=200)
    options.add_argument("--device", default="auto")
    options.add_argument("--config", type=Path, default=ROOT / "configs/100k.yaml")
    options.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    options.add_argument("--warm-runs", type=int, default=1)
    options.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "spinlock_full_run")
    options.add_argument("--output", type=Path, required=True, help="JSON file of results")
    options.add_argument("--no-profile", action="store_true")
    options.add_argument("--profile-compiled", action="store_true", help="also time steps under torch.compile")
    options.add_argument("--commit", help="of this tree, where git does not know it")
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
        "rows": chosen.rows,
        "epochs": chosen.epochs,
        "overrides": chosen.overrides,
    }
    started = time.perf_counter()
    data = chosen.data
    if data is None:
        source = chosen.source or generated(chosen.work, chosen.operators)
        command = [str(ROOT / "benchmarks" / "make_100k.py"), str(source), str(chosen.work / "data")]
        _run([*command, "--rows", str(chosen.rows)], os.environ, chosen.work / "make.log")
        data = str(chosen.work / "data" / "part_*.h5")
    result["seconds_to_make_data"] = time.perf_counter() - started
    _write(chosen.output, result)

    with tempfile.TemporaryDirectory(dir=chosen.work) as caches:
        names = ["cold", *(f"warm{i or ''}" for i in range(chosen.warm_runs))]
        result["runs"] = []
        for name in names:
            result["runs"].append(trained(name, chosen, data, Path(caches)))
            _write(chosen.output, result)  # what is measured is kept, whatever comes next
    if not chosen.no_profile:
        checkpoint = chosen.work / names[-1]
        shapes = CategoricalVQVAEConfig(**load_payload(checkpoint)["model_config"])
        config = load_run_config(checkpoint)
        result["epoch"] = measured(config, shapes, chosen.rows, device, compiled=chosen.profile_compiled)
        _write(chosen.output, result)
    sys.stdout.write(summary(result))
    return result


def _write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")


def summary(result: dict[str, Any]) -> str:
    """A few lines of what matters."""
    lines = [f"{result['device']}, {result['rows']:,} rows x {result['epochs']} epochs"]
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
        found = epoch["profile"]
        lines.append(
            f"  profile: {found['wall_us_per_step']:.0f} us a step, {found['busy_us_per_step']:.0f} busy, "
            f"{found['launches_per_step']:.0f} operations"
        )
        lines += [
            f"    {row['us_per_step']:8.1f} us {row['share']:6.1%} x{row['per_step']:<6.1f} {row['name'][:100]}"
            for row in found["top"][:15]
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
