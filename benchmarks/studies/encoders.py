"""What tokens tell with random networks, and with named columns, as encoders of the behaviour.

    python -m benchmarks.studies.encoders TRAIN.h5 UNSEEN.h5 [--seeds 3] [--jobs 2] [--output study.json]

A tokenizer is trained on the summary and temporal families of TRAIN.h5, without the parameters, for each pair of
encoders and each seed, and encodes the operators of UNSEEN.h5. Linear probes from their one-hot tokens are fitted to
one half of these and scored on the other: accuracy of labels, R2 of the parameters theta (mean over those that vary).
Errors of different encoders are not compared, since they are errors of different features.
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from benchmarks.studies.quality import probe_scores
from spinlock_fast import Tokenizer

SUMMARY = ("MLPEncoder", "IdentityEncoder")
TEMPORAL = ("TemporalCNNEncoder", "StatisticsEncoder")


def study(arguments: tuple[str, str, str, str, int, int]) -> dict[str, Any]:
    """The result of one pair of encoders and one seed."""
    train, unseen, summary, temporal, seed, epochs = arguments
    torch.set_num_threads(1)
    families = {"summary": {"encoder": summary}, "temporal": {"encoder": temporal}}
    settings = {"random_seed": seed, "device": "cpu", "training.num_epochs": epochs}
    tokenizer = Tokenizer("configs/quickstart.yaml", {**settings, "families": families}).fit(train)
    tokens = np.asarray(tokenizer.encode(unseen))
    with h5py.File(unseen) as file:
        targets = {
            "evolution_policy": file["metadata/evolution_policies"][:].astype(str),
            "initial_condition": file["metadata/ic_types"][:].astype(str),
            "theta": file["parameters/params"][:],
        }
    rows = np.random.default_rng(0).permutation(len(tokens))
    scores = probe_scores(tokens, rows[: len(rows) // 2], rows[len(rows) // 2 :], targets)
    metrics = tokenizer.metrics
    return {
        "summary": summary,
        "temporal": temporal,
        "seed": seed,
        "features": len(tokenizer.feature_names),
        "codebooks": tokens.shape[1],
        "bits": float(np.log2(tokenizer.model.quantizer.num_codes).sum()),
        "error": metrics["reconstruction_error"],
        "utilization": metrics["utilization"],
        **scores,
    }


def main() -> None:
    """The command."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("train")
    options.add_argument("unseen")
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--epochs", type=int, default=200)
    options.add_argument("--jobs", type=int, default=2)
    options.add_argument("--output", type=Path)
    chosen = options.parse_args()
    runs = [
        (chosen.train, chosen.unseen, summary, temporal, 42 + seed, chosen.epochs)
        for seed, summary, temporal in product(range(chosen.seeds), SUMMARY, TEMPORAL)
    ]
    with ProcessPoolExecutor(chosen.jobs, get_context("spawn")) as pool:
        rows = list(pool.map(study, runs))
    if chosen.output:
        chosen.output.write_text(json.dumps(rows, indent=1) + "\n")
    for summary, temporal in product(SUMMARY, TEMPORAL):
        mine = [row for row in rows if (row["summary"], row["temporal"]) == (summary, temporal)]
        texts = []
        for name in [key for key in mine[0] if key not in ("summary", "temporal", "seed")]:
            values = np.array([row[name] for row in mine], float)
            texts.append(f"{name} {values.mean():.3f} +- {values.std(ddof=1) if len(values) > 1 else 0.0:.3f}")
        sys.stdout.write(f"{summary}, {temporal}: {', '.join(texts)}\n")


if __name__ == "__main__":
    main()
