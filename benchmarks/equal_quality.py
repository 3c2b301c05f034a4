"""Whether the trainer learns as well as the same mathematics in plain PyTorch: validation error after equal epochs.

    python benchmarks/equal_quality.py DATA --frame 42 --seeds 0 1 2 3 4 --device cuda

DATA holds `original_frames/seed*.npz`: features, categories, codes and validation rows of an earlier run. Per seed the
`Trainer`'s own run and `baseline_model.py` start from the same weights and codes and see the same rows in the same
order at the same rates, by the recipe of `configs/baseline-100k.yaml` with batches of 128 rows. They part by dropout,
whose masks come from other generators, and by rounding. Both are scored after the last epoch, so that nothing is picked
by its score. Neither replaces dead codes, of which the baseline has no form, nor stops early.

The errors are equal within the noise of seeds if the mean of the differences is less than twice its standard error.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from baseline_model import BaselineModel, baseline_of
from timing import environment

from spinlock_fast.config.loading import load_config
from spinlock_fast.config.random_streams import Stream, generator
from spinlock_fast.config.schema import RunConfig
from spinlock_fast.device import resolve_device
from spinlock_fast.models.initialization import initialize_codebooks
from spinlock_fast.models.vqvae import CategoricalHierarchicalVQVAE, CategoricalVQVAEConfig
from spinlock_fast.training.loop import TrainingRun
from spinlock_fast.training.observer import SilentObserver
from spinlock_fast.training.step import learning_rates

RECIPE = Path(__file__).parents[1] / "configs" / "baseline-100k.yaml"


class Data(NamedTuple):
    """Features [N, F] on a device, and the model that a frame describes."""

    train: Tensor
    val: Tensor
    groups: dict[str, list[int]]
    levels: Any


def load_frame(directory: Path, frame: int, device: torch.device) -> Data:
    with np.load(directory / "original_frames" / f"seed{frame}.npz") as file:
        x, val_rows, meta = file["x"], file["val_rows"], json.loads(str(file["meta"]))
    held_out = np.zeros(len(x), dtype=bool)
    held_out[val_rows] = True
    rows = torch.from_numpy(x).to(device, torch.float32)
    chosen = torch.from_numpy(held_out).to(device)
    return Data(rows[~chosen], rows[chosen], meta["group_indices"], meta["levels"])


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
    """The epochs of `TrainingRun`, in its order of rows and at its rates."""
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
    """Mean squared error of the reconstruction, without dropout."""
    model.eval()
    out = model(x)
    reconstruction = out["reconstruction"] if isinstance(out, dict) else out[0]
    return float(torch.nn.functional.mse_loss(reconstruction, x))


def compare(data: Data, epochs: int, seed: int, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Both errors of one seed; `settings` change the recipe."""
    config = recipe(epochs, seed, settings or {})
    shape = {"input_dim": data.train.shape[1], "group_indices": data.groups, "levels": data.levels}
    torch.manual_seed(seed)
    model = CategoricalHierarchicalVQVAE(CategoricalVQVAEConfig(**{**config.model.model_dump(), **shape})).to(
        data.train.device
    )
    run = TrainingRun(config, SilentObserver(), lambda: None, model, data.train, data.val)
    initialize_codebooks(model, run.x_train)
    baseline = baseline_of(model)
    before = score(model, data.val), score(baseline, data.val)
    assert abs(before[0] - before[1]) <= 1e-4 * before[1], f"the start is not the same: {before}"
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
        "error_at_start": before[0],
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
    found: dict[str, Any] = {
        "error": statistics.mean(ours),
        "baseline_error": statistics.mean(theirs),
        "difference": statistics.mean(differences),
    }
    if len(rows) > 1:
        found["error_deviation"] = statistics.stdev(ours)
        found["baseline_error_deviation"] = statistics.stdev(theirs)
        found["standard_error"] = statistics.stdev(differences) / len(rows) ** 0.5
        found["equal"] = abs(found["difference"]) <= 2.0 * found["standard_error"]
    return found


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
    data = load_frame(chosen.data, chosen.frame, device)
    rows = []
    for seed in chosen.seeds:
        rows.append(compare(data, chosen.epochs, seed))
        row = rows[-1]
        print(  # noqa: T201
            f"seed {seed}: validation error {row['error']:.4f}, baseline {row['baseline_error']:.4f} "
            f"(training rows {row['train_error']:.4f}, {row['baseline_train_error']:.4f}); "
            f"{row['seconds']:.1f} s, {row['baseline_seconds']:.1f} s",
            flush=True,
        )
    found = summary(rows)
    print(f"mean {found['error']:.4f}, baseline {found['baseline_error']:.4f}", end="")  # noqa: T201
    if len(rows) > 1:
        print(  # noqa: T201
            f"; deviation over seeds {found['error_deviation']:.4f}, {found['baseline_error_deviation']:.4f}; "
            f"difference {found['difference']:+.4f} +- {found['standard_error']:.4f}: "
            + ("equal within the noise of seeds" if found["equal"] else "NOT EQUAL")
        )
    else:
        print()  # noqa: T201
    if chosen.output:
        told = {"frame": chosen.frame, "epochs": chosen.epochs, **environment(str(device))}
        chosen.output.write_text(json.dumps({**told, "summary": found, "runs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
