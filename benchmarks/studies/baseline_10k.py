"""Schedules and seeds on a data set of many operators: quality and time of SUMMARY alone and of all families.

    python -m benchmarks.studies.baseline_10k data/10k_*.h5 --output runs.jsonl [--schedules 10 20 50 200]

Trains `configs/10k.yaml` with its encoders, on the family `summary` alone (the 10K baseline of the original project)
and on all three. A line per families, seed and schedule: metrics of the validation rows (a tenth, drawn by the seed)
with both searches of tokens, and CPU seconds of one thread. The features are prepared once per families and seed.
Each schedule is a complete run without early stopping; warm-up takes at most 10 epochs and at most half of it. Runs
that have a line in the output are skipped.
"""

from __future__ import annotations

import argparse
import glob
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.commands import ROOT
from benchmarks.common.timing import commit
from benchmarks.studies.feature_matrix import prepared_features
from benchmarks.studies.sweep import append, lines_of
from spinlock_fast import Trainer
from spinlock_fast.config.loading import apply_overrides, load_config
from spinlock_fast.config.schema import RunConfig
from spinlock_fast.models.joint_metrics import joint_metrics
from spinlock_fast.training.preparation import PreparedFeatures

SCHEDULES = (5, 10, 20, 50, 200)
METRICS = ("quality", "reconstruction_error", "utilization", "perplexity_over_k", "topo_post", "total_codes")


def run_config(config: Path, data: Sequence[str], families: str, seed: int, overrides: Sequence[str]) -> RunConfig:
    loaded = load_config(config, [f"random_seed={seed}", *overrides])
    chosen = {name: family for name, family in loaded.families.items() if families in ("all", name)}
    return loaded.model_copy(update={"dataset_path": list(data), "families": chosen})


def measure(config: RunConfig, prepared: PreparedFeatures, epochs: int) -> dict[str, Any]:
    """Trains a schedule on prepared features; metrics of the validation rows."""
    config = apply_overrides(
        config,
        {
            "training.num_epochs": epochs,
            "training.warmup_epochs": min(10, epochs // 2),
            "training.val_every_n_epochs": min(config.training.val_every_n_epochs, epochs),
            "training.early_stopping_patience": epochs + 1,
        },
    )
    started = time.process_time()
    result = Trainer(config).fit(prepared.x, prepared.groups, feature_names=prepared.feature_names, normalize=False)
    seconds = time.process_time() - started
    validation = torch.from_numpy(prepared.x[result.split.val]).to(result.model.feature_order.device)
    joint = joint_metrics(result.model, validation)
    return {
        "epochs": epochs,
        "batch_size": config.training.batch_size,
        "seconds": seconds,
        **{name: result.metrics[name] for name in METRICS},
        "joint_error": joint["reconstruction_error"],
        "joint_utilization": joint["utilization"],
        "best_epoch": result.best_epoch,
        "val_rows": result.metrics["val_rows"],
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", metavar="FILE.h5", help="data files or globs")
    parser.add_argument("--output", type=Path, required=True, help="JSON lines file, continued if it exists")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "10k.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="overrides a setting")
    parser.add_argument("--families", nargs="+", choices=["summary", "all"], default=["summary", "all"])
    parser.add_argument("--schedules", type=int, nargs="+", default=list(SCHEDULES), metavar="EPOCHS")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    chosen = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.getLogger("spinlock_fast").setLevel(logging.ERROR)
    files = [path for pattern in chosen.data for path in (sorted(glob.glob(pattern)) or [pattern])]
    done = {(row["families"], row["seed"], row["epochs"]) for row in lines_of(chosen.output)}
    for seed in chosen.seeds:
        for families in chosen.families:
            schedules = [epochs for epochs in chosen.schedules if (families, seed, epochs) not in done]
            if not schedules:
                continue
            config = run_config(chosen.config, files, families, seed, chosen.set)
            started = time.process_time()
            prepared, _ = prepared_features(config)
            facts = {
                "families": families,
                "seed": seed,
                "rows": len(prepared.x),
                "columns": prepared.columns,
                "features": prepared.x.shape[1],
                "categories": len(prepared.groups),
                "prepare_seconds": time.process_time() - started,
                "commit": commit(),
            }
            for epochs in schedules:
                row = facts | measure(config, prepared, epochs)
                append(chosen.output, row)
                print(
                    "{families} seed {seed}, {features} features, {categories} categories, {epochs} epochs: "
                    "error {reconstruction_error:.4f}, joint {joint_error:.4f}, utilization {utilization:.3f}, "
                    "{seconds:.0f} s".format(**row),
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
