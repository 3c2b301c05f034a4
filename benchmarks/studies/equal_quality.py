"""Validation error of the trainer and of the same mathematics in plain PyTorch, after equal epochs.

    python -m benchmarks.studies.equal_quality DATA --frame 42 --seeds 0 1 2 3 4 --device cuda

DATA contains `original_frames/seed*.npz`: features, categories, codebook sizes and validation rows of runs of the
original project. Per seed, the `Trainer`'s run and `baseline_model.py` start from the same weights and codes, and use
the same rows in the same order at the same learning rates: those of `configs/baseline-100k.yaml` with batches of 128
rows. They differ by dropout masks, which come from different generators, and by rounding. Both are scored after the
last epoch. Dead codes are not replaced (the baseline cannot), and training does not stop early.

The errors are equal within seed noise if the mean difference is below twice its standard error. Seeds that are in the
output are not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.common.baseline_model import BaselineModel, baseline_of
from benchmarks.common.commands import ROOT
from benchmarks.common.timing import environment
from benchmarks.studies.quality import load_split
from benchmarks.studies.sweep import study_parser, sweep
from spinlock_fast.ablation.statistics import summarize
from spinlock_fast.config.loading import load_config
from spinlock_fast.config.random_streams import Stream, generator
from spinlock_fast.config.schema import RunConfig
from spinlock_fast.device import resolve_device
from spinlock_fast.models.initialization import initialize_codebooks
from spinlock_fast.models.vqvae import CategoricalHierarchicalVQVAE, CategoricalVQVAEConfig
from spinlock_fast.output.atomic_files import write_json
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


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means and standard deviations over seeds, and the mean difference with its standard error."""
    differences = [row["error"] - row["baseline_error"] for row in rows]
    columns = {name: [row[name] for row in rows] for name in ("error", "baseline_error")} | {"difference": differences}
    summaries = {name: found for name, values in columns.items() if (found := summarize(values)) is not None}
    result: dict[str, Any] = {name: found.mean for name, found in summaries.items()}
    if (spread := summaries["difference"].spread) is not None:
        result |= {f"{name}_deviation": summaries[name].spread for name in ("error", "baseline_error")}
        result["standard_error"] = spread / len(rows) ** 0.5
        result["equal"] = abs(result["difference"]) <= 2.0 * result["standard_error"]
    return result


def measure(seed: int, chosen: argparse.Namespace) -> list[dict[str, Any]]:
    return [compare(load_data(chosen.data, chosen.frame, resolve_device(chosen.device)), chosen.epochs, seed)]


def finished(output: Path | None, facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows in a results file; those of other settings end the command."""
    if output is None or not output.exists():
        return []
    found = json.loads(output.read_text(encoding="utf-8"))
    for name in ("frame", "epochs", "device", "torch"):
        if found[name] != facts[name]:
            sys.exit(f"{output}: has {name} {found[name]}, not {facts[name]}: choose another --output")
    return list(found["runs"])


def main(argv: Sequence[str] | None = None) -> int:
    parser = study_parser(__doc__, required=False)
    parser.add_argument("data", type=Path)
    parser.add_argument("--frame", type=int, default=42)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--device", default="auto")
    chosen = parser.parse_args(argv)
    facts = {"frame": chosen.frame, "epochs": chosen.epochs, **environment(str(resolve_device(chosen.device)))}
    rows = finished(chosen.output, facts)

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        rows.sort(key=lambda row: row["seed"])
        if chosen.output:
            write_json(chosen.output, {**facts, "summary": summary(rows), "runs": rows})

    present = {row["seed"] for row in rows}
    failed = sweep(
        {f"seed {seed}": seed for seed in chosen.seeds if seed not in present},
        partial(measure, chosen=chosen),
        keep,
        ["error", "baseline_error", "train_error", "baseline_train_error", "seconds", "baseline_seconds"],
        jobs=chosen.jobs,
        threads=max(1, torch.get_num_threads() // chosen.jobs),
    )
    if rows:
        result = summary(rows)
        print(f"mean {result['error']:.4f}, baseline {result['baseline_error']:.4f}")
        if len(rows) > 1:
            outcome = "equal within seed noise" if result["equal"] else "NOT EQUAL"
            print(
                f"deviation over seeds {result['error_deviation']:.4f}, {result['baseline_error_deviation']:.4f}; "
                f"difference {result['difference']:+.4f} +- {result['standard_error']:.4f}: {outcome}"
            )
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
