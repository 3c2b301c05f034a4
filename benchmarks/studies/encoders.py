"""What tokens tell with random networks, and with named columns, as encoders of the behaviour.

    python -m benchmarks.studies.encoders TRAIN.h5 UNSEEN.h5 --output study.jsonl [--seeds 3] [--jobs 2]

A tokenizer is trained on the summary and temporal families of TRAIN.h5, without the parameters, for each pair of
encoders and each seed, and encodes the operators of UNSEEN.h5. Linear probes from their one-hot tokens are fitted to
one half of these and scored on the other: accuracy of labels, R2 of the parameters theta (mean over those that vary).
Errors of different encoders are not compared, since they are errors of different features.

Runs that have a line in the output are skipped. At the end the tables of `ablate` are printed: means over seeds, and
differences to the random networks, paired by seed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import h5py
import numpy as np

from benchmarks.common.commands import ROOT
from benchmarks.studies.quality import probe_scores
from benchmarks.studies.sweep import Row, lines_of, perform, study_parser, tables
from spinlock_fast import Tokenizer

SUMMARY = ("MLPEncoder", "IdentityEncoder")
TEMPORAL = ("TemporalCNNEncoder", "StatisticsEncoder")
MEASURES = ("features", "bits", "utilization", "probe_evolution_policy", "probe_initial_condition", "probe_theta")


class Run(NamedTuple):
    """One pair of encoders and one seed, a line of the output."""

    summary: str
    temporal: str
    seed: int


def measure(run: Run, chosen: argparse.Namespace) -> Row:
    families = {"summary": {"encoder": run.summary}, "temporal": {"encoder": run.temporal}}
    settings = {"random_seed": run.seed, "device": "cpu", "training.num_epochs": chosen.epochs, "families": families}
    tokenizer = Tokenizer(str(ROOT / "configs" / "quickstart.yaml"), settings).fit(chosen.train)
    tokens = np.asarray(tokenizer.encode(chosen.unseen))
    with h5py.File(chosen.unseen) as file:
        targets = {
            "evolution_policy": file["metadata/evolution_policies"][:].astype(str),
            "initial_condition": file["metadata/ic_types"][:].astype(str),
            "theta": file["parameters/params"][:],
        }
    rows = np.random.default_rng(0).permutation(len(tokens))
    return {
        "features": len(tokenizer.feature_names),
        "codebooks": tokens.shape[1],
        "bits": float(np.log2(tokenizer.model.quantizer.num_codes).sum()),
        "error": tokenizer.metrics["reconstruction_error"],
        "utilization": tokenizer.metrics["utilization"],
        **probe_scores(tokens, rows[: len(rows) // 2], rows[len(rows) // 2 :], targets),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = study_parser(__doc__)
    parser.add_argument("train", metavar="TRAIN.h5")
    parser.add_argument("unseen", metavar="UNSEEN.h5")
    parser.add_argument("--seeds", type=int, default=3, metavar="N")
    parser.add_argument("--epochs", type=int, default=200)
    chosen = parser.parse_args(argv)
    runs = [Run(*pair, 42 + seed) for seed in range(chosen.seeds) for pair in product(SUMMARY, TEMPORAL)]
    status = perform(chosen, runs, measure, MEASURES)
    rows = [{**row, "variant": f"{row['summary']}, {row['temporal']}"} for row in lines_of(chosen.output)]
    if rows:
        print(tables(rows, MEASURES, f"{SUMMARY[0]}, {TEMPORAL[0]}", "half of the unseen operators"), flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
