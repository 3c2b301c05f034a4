"""Time to quality: training seconds and epochs against the error and code use of held-out rows.

    python -m benchmarks.training.time_to_quality FRAME.npz ... --output time.json [--plot time.png] [--device cuda]
    python -m benchmarks.training.time_to_quality --synthetic 4096 --output time.json

FRAME holds features x [N, F], val_rows and a JSON text `meta` (group_indices, levels, feature_names, and the error of
a run of the original project), as in `original_frames` of `studies/quality.py`. `--synthetic` trains on generated rows
instead, for timings where no data are at hand.

Each recipe (`configs/100k.yaml`; the original's settings in this implementation, `configs/baseline-100k.yaml`) trains
with schedules of different lengths, each a complete run: warm-up of at most 10 epochs and at most half of the schedule
(none in the original's recipe), one validation at the end, no early stopping. The error is that of the last epoch, with
the trained decoder: without `training.joint_search_epochs`.

Seconds are those of `Trainer.fit`: codebook initialisation, training, and the metrics of the held-out rows, without
imports and without reading the data. On a CPU they are CPU seconds of one thread (`time.process_time`), which other
processes on the machine hardly change; on a GPU wall seconds. An untimed run of two epochs comes first.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.common.commands import ROOT
from benchmarks.common.timing import write
from spinlock_fast import Trainer
from spinlock_fast.models.joint_metrics import joint_metrics

Array = np.ndarray[Any, np.dtype[Any]]
SCHEDULES = (2, 5, 10, 20, 50, 200)
RECIPES = {"ours": "configs/100k.yaml", "original": "configs/baseline-100k.yaml"}
LABELS = {"ours": "this recipe", "original": "the original's recipe in this implementation"}


class Frame(NamedTuple):
    """Features [N, F] and held-out rows of one data set; the original's error if its run is known."""

    name: str
    x: Array
    val_rows: Array
    groups: dict[str, list[int]] | None
    levels: dict[str, Any] | None
    original_error: float | None


def load_frame(path: Path) -> Frame:
    with np.load(path) as file:
        x, val_rows, meta = file["x"], file["val_rows"], json.loads(str(file["meta"]))
    original = meta.get("original", {})
    error = original.get("error_final", original.get("error_best_epoch"))
    return Frame(path.stem, x, val_rows, meta["group_indices"], meta["levels"], error)


def synthetic_frame(rows: int, categories: int = 8, features: int = 16, seed: int = 0) -> Frame:
    """Rows whose categories are nonlinear functions of a few latent variables each."""
    rng = np.random.default_rng(seed)
    blocks = []
    for _ in range(categories):
        hidden = np.tanh(rng.standard_normal((rows, 3)) @ rng.standard_normal((3, 12)))
        blocks.append(hidden @ rng.standard_normal((12, features)) + 0.2 * rng.standard_normal((rows, features)))
    x = np.concatenate(blocks, 1)
    x = ((x - x.mean(0)) / x.std(0)).astype(np.float32)
    groups = {f"cluster_{c}": list(range(c * features, (c + 1) * features)) for c in range(categories)}
    return Frame("synthetic", x, np.arange(0, rows, 10), groups, None, None)


def settings(recipe: str, epochs: int, seed: int, batch_size: int, device: str) -> dict[str, Any]:
    """Overrides of a recipe's configuration for a schedule of `epochs`."""
    warmup = {"training.warmup_epochs": min(10, epochs // 2)} if recipe == "ours" else {}
    return {
        "random_seed": seed,
        "device": device,
        "training.batch_size": batch_size,
        "training.topo_samples": batch_size,
        "training.num_epochs": epochs,
        "training.val_every_n_epochs": epochs,
        "training.early_stopping_patience": epochs + 1,
        "training.joint_search_epochs": 0,
        **warmup,
    }


def clock(device: str) -> Callable[[], float]:
    """Seconds of the CPU time of this process, or of wall time after the device's work."""
    if torch.device(device).type == "cpu":
        return time.process_time

    def wall() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return wall


def measure(frame: Frame, recipe: str, epochs: int, seed: int, batch_size: int, device: str) -> dict[str, Any]:
    """Trains once; seconds, and metrics of the held-out rows."""
    trainer = Trainer.from_config(str(ROOT / RECIPES[recipe]), settings(recipe, epochs, seed, batch_size, device))
    now = clock(device)
    started = now()
    result = trainer.fit(frame.x, frame.groups, frame.levels, None, frame.val_rows, normalize=False)
    seconds = now() - started
    metrics = result.metrics
    assert metrics["epochs"] == epochs
    held_out = torch.from_numpy(frame.x[frame.val_rows]).to(result.model.feature_order.device)
    joint = joint_metrics(result.model, held_out)
    assert joint["reconstruction_error"] <= metrics["reconstruction_error"] * (1 + 1e-5)
    return {
        "frame": frame.name,
        "recipe": recipe,
        "epochs": epochs,
        "seed": seed,
        "seconds": seconds,
        "error": metrics["reconstruction_error"],
        "error_joint": joint["reconstruction_error"],
        "utilization": metrics["utilization"],
        "topo_post": metrics["topo_post"],
        "original_error": frame.original_error,
    }


def summaries(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Means over seeds per frame, recipe and schedule, and the standard deviation of the error."""
    keys = dict.fromkeys((row["frame"], row["recipe"], row["epochs"]) for row in rows)
    for key in keys:
        runs = [row for row in rows if (row["frame"], row["recipe"], row["epochs"]) == key]
        means = {
            name: statistics.mean(row[name] for row in runs)
            for name in ("seconds", "error", "error_joint", "utilization", "topo_post")
        }
        deviation = statistics.stdev(row["error"] for row in runs) if len(runs) > 1 else None
        yield {
            **dict(zip(("frame", "recipe", "epochs"), key, strict=True)),
            "seeds": len(runs),
            **means,
            "error_deviation": deviation,
            "original_error": runs[0]["original_error"],
        }


def plot(rows: Sequence[dict[str, Any]], path: Path, unit: str) -> None:
    """Error and utilization against seconds, a column of panels per frame."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    means = list(summaries(rows))
    frames = list(dict.fromkeys(row["frame"] for row in means))
    figure, panels = plt.subplots(
        2, len(frames), figsize=(1.2 + 2.6 * len(frames), 5.0), dpi=130, sharex=True, sharey="row", squeeze=False,
        layout="constrained", height_ratios=(3, 2),
    )  # fmt: skip
    for (error_axes, use_axes), frame in zip(panels.T, frames, strict=True):
        for recipe, color in (("ours", "#1f6fb4"), ("original", "#c4571a")):
            points = sorted(
                (row for row in means if row["frame"] == frame and row["recipe"] == recipe), key=lambda r: r["epochs"]
            )
            seconds = [row["seconds"] for row in points]
            error_axes.plot(seconds, [row["error"] for row in points], "o-", color=color, ms=4, label=LABELS[recipe])
            if recipe == "ours":
                joint = [row["error_joint"] for row in points]
                error_axes.plot(seconds, joint, "o--", color=color, ms=4, mfc="white", label="the same, joint search")
            use_axes.plot(seconds, [row["utilization"] for row in points], "o-", color=color, ms=4)
            for row in points:
                if recipe == "ours" and row["epochs"] in (2, 10, 50, 200):
                    at = (row["seconds"], row["error"])
                    error_axes.annotate(
                        str(row["epochs"]), at, (2, 4), textcoords="offset points", fontsize=7, color=color
                    )
        original = next(row["original_error"] for row in means if row["frame"] == frame)
        if original is not None:
            error_axes.axhline(original, color="0.35", ls=":", label="the original project, 200 epochs")
        error_axes.set(xscale="log", yscale="log", title=frame)
        error_axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        error_axes.yaxis.set_minor_formatter(NullFormatter())
        for axis in (error_axes.yaxis, use_axes.xaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        use_axes.set(xlabel=unit, ylim=(0, 1))
        for axes in (error_axes, use_axes):
            axes.grid(color="0.9")
            axes.set_axisbelow(True)
    panels[0, 0].set_ylabel("held-out mean squared error")
    panels[1, 0].set_ylabel("utilization")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize="small")
    figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("frames", type=Path, nargs="*", metavar="FRAME.npz")
    parser.add_argument("--synthetic", type=int, metavar="ROWS", help="also train on this number of generated rows")
    parser.add_argument(
        "--output", type=Path, required=True, help="JSON file, written after every run; runs that it has are skipped"
    )
    parser.add_argument("--plot", type=Path, help="image file to write")
    parser.add_argument("--schedules", type=int, nargs="+", default=list(SCHEDULES), metavar="EPOCHS")
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    chosen = parser.parse_args(argv)
    frames = [load_frame(path) for path in chosen.frames]
    if chosen.synthetic:
        frames.append(synthetic_frame(chosen.synthetic))
    if not frames:
        parser.error("at least one FRAME.npz, or --synthetic ROWS")
    if chosen.device == "cpu":
        torch.set_num_threads(1)
    logging.getLogger("spinlock_fast").setLevel(logging.ERROR)  # no warnings about the categories of the frames
    unit = "CPU seconds of one thread" if chosen.device == "cpu" else "seconds"
    rows: list[dict[str, Any]] = []
    if chosen.output.exists():
        rows = json.loads(chosen.output.read_text(encoding="utf-8"))["rows"]
    done = {(row["frame"], row["recipe"], row["epochs"], row["seed"]) for row in rows}
    warm: set[tuple[str, str]] = set()
    for seed, frame, recipe, epochs in product(chosen.seeds, frames, chosen.recipes, chosen.schedules):
        if (frame.name, recipe, epochs, seed) in done:
            continue
        if (frame.name, recipe) not in warm:
            measure(frame, recipe, 2, 0, chosen.batch_size, chosen.device)
            warm.add((frame.name, recipe))
        row = measure(frame, recipe, epochs, seed, chosen.batch_size, chosen.device)
        rows.append(row)
        print(
            "{frame} {recipe} seed {seed}: {epochs} epochs, {seconds:.2f} s: error {error:.4f}, "
            "joint {error_joint:.4f}, utilization {utilization:.3f}".format(**row),
            flush=True,
        )
        means = list(summaries(rows))
        write(chosen.output, rows, chosen.device, clock=unit, batch_size=chosen.batch_size, means=means)
    if chosen.plot:
        plot(rows, chosen.plot, unit)
    return 0


if __name__ == "__main__":
    sys.exit(main())
