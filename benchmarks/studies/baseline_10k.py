"""Schedules and seeds on a data set of many operators: quality and time of SUMMARY alone and of all families.

    python -m benchmarks.studies.baseline_10k data/10k_*.h5 --output runs.jsonl [--schedules 10 20 50 200]

Trains `configs/10k.yaml` with its encoders, on the family `summary` alone (the 10K baseline of the original project)
and on all three. A line per families, seed and schedule: metrics of the validation rows (a tenth, drawn by the seed)
with both searches of tokens, and CPU seconds of one thread. The features are prepared once per families and seed.
Each schedule is a complete run without early stopping; warm-up takes at most 10 epochs and at most half of it. Runs
that have a line in the output are skipped. With `--jobs 2`, two runs are trained side by side.
"""

from __future__ import annotations

import argparse
import glob
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.common.commands import ROOT
from benchmarks.common.timing import commit
from benchmarks.studies.feature_matrix import prepared_features
from benchmarks.studies.sweep import Row, perform, study_parser
from spinlock_fast import Trainer
from spinlock_fast.config.loading import apply_overrides, load_config
from spinlock_fast.config.schema import RunConfig
from spinlock_fast.models.joint_metrics import joint_metrics
from spinlock_fast.training.preparation import PreparedFeatures

SCHEDULES = (5, 10, 20, 50, 200)
METRICS = ("quality", "reconstruction_error", "utilization", "perplexity_over_k", "topo_post", "total_codes")
SHOWN = ("features", "categories", "reconstruction_error", "joint_error", "utilization", "seconds")


class Run(NamedTuple):
    """One schedule, a line of the output."""

    families: str
    seed: int
    epochs: int


def config_of(run: Run, chosen: argparse.Namespace) -> RunConfig:
    loaded = load_config(chosen.config, [f"random_seed={run.seed}", *chosen.set])
    files = [path for pattern in chosen.data for path in (sorted(glob.glob(pattern)) or [pattern])]
    families = {name: family for name, family in loaded.families.items() if run.families in ("all", name)}
    return loaded.model_copy(update={"dataset_path": files, "families": families})


def prepare_run(run: Run, chosen: argparse.Namespace) -> tuple[PreparedFeatures, Row]:
    """The features of the runs with the same families and seed, and the entries of their lines."""
    started = time.process_time()
    prepared, _ = prepared_features(config_of(run, chosen))
    return replace(prepared, encoders=[]), {
        "rows": len(prepared.x),
        "columns": prepared.columns,
        "features": prepared.x.shape[1],
        "categories": len(prepared.groups),
        "prepare_seconds": time.process_time() - started,
        "commit": commit(),
    }


def measure(run: Run, shared: tuple[PreparedFeatures, Row], chosen: argparse.Namespace) -> Row:
    """Trains a schedule on prepared features; metrics of the validation rows."""
    prepared, facts = shared
    config = config_of(run, chosen)
    schedule = {
        "training.num_epochs": run.epochs,
        "training.warmup_epochs": min(10, run.epochs // 2),
        "training.val_every_n_epochs": min(config.training.val_every_n_epochs, run.epochs),
        "training.early_stopping_patience": run.epochs + 1,
    }
    trainer = Trainer(apply_overrides(config, schedule))
    started = time.process_time()
    result = trainer.fit(prepared.x, prepared.groups, feature_names=prepared.feature_names, normalize=False)
    seconds = time.process_time() - started
    validation = torch.from_numpy(prepared.x[result.split.val]).to(result.model.feature_order.device)
    joint = joint_metrics(result.model, validation)
    return {
        **facts,
        "batch_size": config.training.batch_size,
        "seconds": seconds,
        **{name: result.metrics[name] for name in METRICS},
        "joint_error": joint["reconstruction_error"],
        "joint_utilization": joint["utilization"],
        "best_epoch": result.best_epoch,
        "val_rows": result.metrics["val_rows"],
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = study_parser(__doc__)
    parser.add_argument("data", nargs="+", metavar="FILE.h5", help="data files or globs")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "10k.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="overrides a setting")
    parser.add_argument("--families", nargs="+", choices=["summary", "all"], default=["summary", "all"])
    parser.add_argument("--schedules", type=int, nargs="+", default=list(SCHEDULES), metavar="EPOCHS")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    chosen = parser.parse_args(argv)
    order = product(chosen.seeds, chosen.families, chosen.schedules)
    runs = [Run(families, seed, epochs) for seed, families, epochs in order]
    return perform(chosen, runs, measure, SHOWN, prepare=prepare_run, alike=lambda run: run[:2])


if __name__ == "__main__":
    sys.exit(main())
