"""Validation error of the trainer and of the same mathematics in plain PyTorch, after equal epochs.

    python -m benchmarks.studies.equal_quality DATA --frame 42 --seeds 0 1 2 3 4 --device cuda

DATA contains `original_frames/seed*.npz`: features, categories, codebook sizes and validation rows of runs of the
original project. Per seed, the `Trainer`'s run and `baseline_model.py` start from the same weights and codes, and use
the same rows in the same order at the same learning rates: those of `configs/baseline-100k.yaml` with batches of 128
rows. They differ by dropout masks, which come from different generators, and by rounding. Both are scored after the
last epoch. Dead codes are not replaced (the baseline cannot), and training does not stop early.

The errors are equal within seed noise if the mean difference is below twice its standard error.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.common.baseline_model import BaselineModel, baseline_of
from benchmarks.common.commands import ROOT
from benchmarks.common.timing import environment
from benchmarks.studies.quality import load_split
from spinlock_fast.config.loading import load_config
from spinlock_fast.config.random_streams import Stream, generator
from spinlock_fast.config.schema import RunConfig
from spinlock_fast.device import resolve_device
from spinlock_fast.models.initialization import initialize_codebooks
from spinlock_fast.models.vqvae import CategoricalHierarchicalVQVAE, CategoricalVQVAEConfig
from spinlock_fast.training.loop import TrainingRun
from spinlock_fast.training.observer import SilentObserver
from spinlock_fast.training.step import learning_rates

RECIPE = ROOT / "configs" / "baseline-100k.yaml"


class Data(NamedTuple):
    """Training and validation features [N, F], and the categories and codebook sizes of the model."""

    train: Tensor
    val: Tensor
    groups: dict[str, list[int]]
    levels: Any


def load_data(directory: Path, frame: int, device: torch.device) -> Data:
    """Data of one run of the original project; `frame` is its seed."""
    split = load_split(directory, frame)
    x = torch.from_numpy(split.x).to(device, torch.float32)
    validation = torch.zeros(len(x), dtype=torch.bool, device=device)
    validation[torch.from_numpy(split.val_rows)] = True
    return Data(x[~validation], x[validation], split.meta["group_indices"], split.meta["levels"])


def recipe(epochs: int, seed: int, settings: Mapping[str, Any]) -> RunConfig:
    return load_config(
        RECIPE,
        {
            "random_seed": seed,
            "training.num_epochs": epochs,
            "training.batch_size": 128,
            "training.topo_samples": 128,
            "training.dead_code_reset_interval": 0,
            "training.early_stopping_patience": epochs + 1,
            "training.val_every_n_epochs": epochs,
            "training.use_torch_compile": False,
            **settings,
        },
    )


def train_baseline(baseline: BaselineModel, config: RunConfig, x: Tensor) -> None:
    """Trains with the row order and learning rates of `TrainingRun`."""
    training = config.training
    optimizer = torch.optim.Adam(baseline.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay)
    batch = min(training.batch_size, len(x))
    steps = -(-len(x) // batch)
    baseline.train()
    for epoch in range(training.num_epochs):
        order = torch.from_numpy(generator(config.random_seed, Stream.ROW_ORDER, epoch).permutation(len(x)))
        rates = learning_rates(training, steps, epoch).tolist()
        for rows, rate in zip(order.to(x.device).split(batch), rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate
            optimizer.zero_grad()
            baseline.loss(x[rows], training.topo_samples).backward()
            optimizer.step()


@torch.no_grad()
def score(model: CategoricalHierarchicalVQVAE | BaselineModel, x: Tensor) -> float:
    """Mean squared reconstruction error in eval mode."""
    model.eval()
    out = model(x)
    reconstruction = out["reconstruction"] if isinstance(out, dict) else out[0]
    return float(torch.nn.functional.mse_loss(reconstruction, x))


def compare(data: Data, epochs: int, seed: int, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Errors of model and baseline for one seed; `settings` override the recipe."""
    config = recipe(epochs, seed, settings or {})
    shape = {"input_dim": data.train.shape[1], "group_indices": data.groups, "levels": data.levels}
    torch.manual_seed(seed)
    model = CategoricalHierarchicalVQVAE(CategoricalVQVAEConfig(**{**config.model.model_dump(), **shape})).to(
        data.train.device
    )
    run = TrainingRun(config, SilentObserver(), lambda: None, model, data.train, data.val)
    initialize_codebooks(model, run.x_train)
    baseline = baseline_of(model)
    initial = score(model, data.val), score(baseline, data.val)
    assert abs(initial[0] - initial[1]) <= 1e-4 * initial[1], f"the initial errors differ: {initial}"
    seconds = []
    started = time.perf_counter()
    run.train()
    error = score(model, data.val)
    seconds.append(time.perf_counter() - started)
    started = time.perf_counter()
    train_baseline(baseline, config, data.train)
    baseline_error = score(baseline, data.val)
    seconds.append(time.perf_counter() - started)
    return {
        "seed": seed,
        "error_at_start": initial[0],
        "error": error,
        "baseline_error": baseline_error,
        "train_error": score(model, data.train),
        "baseline_train_error": score(baseline, data.train),
        "seconds": seconds[0],
        "baseline_seconds": seconds[1],
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means and standard deviations over seeds, and the mean difference with its standard error."""
    ours, theirs = [row["error"] for row in rows], [row["baseline_error"] for row in rows]
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    result: dict[str, Any] = {
        "error": statistics.mean(ours),
        "baseline_error": statistics.mean(theirs),
        "difference": statistics.mean(differences),
    }
    if len(rows) > 1:
        result["error_deviation"] = statistics.stdev(ours)
        result["baseline_error_deviation"] = statistics.stdev(theirs)
        result["standard_error"] = statistics.stdev(differences) / len(rows) ** 0.5
        result["equal"] = abs(result["difference"]) <= 2.0 * result["standard_error"]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--frame", type=int, default=42)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path)
    chosen = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    device = resolve_device(chosen.device)
    data = load_data(chosen.data, chosen.frame, device)
    rows = []
    for seed in chosen.seeds:
        row = compare(data, chosen.epochs, seed)
        rows.append(row)
        print(
            f"seed {seed}: validation error {row['error']:.4f}, baseline {row['baseline_error']:.4f} "
            f"(training rows {row['train_error']:.4f}, {row['baseline_train_error']:.4f}); "
            f"{row['seconds']:.1f} s, {row['baseline_seconds']:.1f} s",
            flush=True,
        )
    result = summary(rows)
    print(f"mean {result['error']:.4f}, baseline {result['baseline_error']:.4f}")
    if len(rows) > 1:
        outcome = "equal within seed noise" if result["equal"] else "NOT EQUAL"
        print(
            f"deviation over seeds {result['error_deviation']:.4f}, {result['baseline_error_deviation']:.4f}; "
            f"difference {result['difference']:+.4f} +- {result['standard_error']:.4f}: {outcome}"
        )
    if chosen.output:
        facts = {"frame": chosen.frame, "epochs": chosen.epochs, **environment(str(device))}
        chosen.output.write_text(json.dumps({**facts, "summary": result, "runs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
