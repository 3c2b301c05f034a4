"""When does it pay to start from a checkpoint? Fine-tuning against training from scratch, with few and many rows.

    python -m benchmarks.studies.transfer --source A.h5 B.h5 --target C.h5 [--seeds 2] [--output transfer.csv]

A tokenizer of the summary family (means over realizations) is trained on the files of --source. Then, with each
share of the rows of --target, another one is trained from scratch, and the first one is trained further with each
choice of --freeze. All are measured on the same held-out rows of --target: mean squared error of the reconstruction
from tokens, in standard deviations of all training rows of --target, over the columns that every tokenizer of a seed
has.

Runs of few rows have more epochs, so that all make 200 to 250 steps. Seeds that are in the output are not run again.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.studies.sweep import Row, study_parser, sweep
from benchmarks.studies.variants import COMBINATIONS
from spinlock_fast import Tokenizer
from spinlock_fast.config.families import DEFAULT_DATASETS
from spinlock_fast.config.schema import FeatureCleaningConfig
from spinlock_fast.data.feature_source import FeatureSource
from spinlock_fast.errors import DataError
from spinlock_fast.features.cleaning import FeatureCleaner, fit_cleaner
from spinlock_fast.features.normalize import Normalizer, fit_normalizer
from spinlock_fast.output.atomic_files import write_text

FAMILY = "summary"
FREEZE = ("none", "codes", "tokens")
FINE_RATE = 0.0005
SETTINGS: Row = {
    **COMBINATIONS["combined"],
    "device": "cpu",
    "families": {FAMILY: {"encoder": "IdentityEncoder"}},
    "model.unassigned_features": "nearest",
    "training.decoder_refit": 0.0,
    "training.batch_size": 128,
    "training.topo_samples": 128,
    "training.num_categories_auto": 6,
    "training.orthogonality_target": 10.0,
}
COLUMNS = ("method", "share", "rows", "seed", "error", "utilization", "equal_tokens_source", "bits", "seconds")

Columns = NDArray[np.float32]


class Reference:
    """Cleaning and normalisation of the target's training rows, in which all errors are measured."""

    def __init__(self, pool: Columns) -> None:
        self.cleaner: FeatureCleaner = fit_cleaner(pool, FeatureCleaningConfig(deduplicate_threshold=1.0))
        self.normalizer: Normalizer = fit_normalizer(self.cleaner(pool), "standard")

    def __call__(self, columns: Columns) -> Columns:
        """Raw columns [N, C] -> normalised ones [N, C]; NaN for those that do not vary."""
        full = np.full(columns.shape, np.nan, np.float32)
        full[:, self.cleaner.keep] = self.normalizer(self.cleaner(columns))
        return full


def read(files: list[str]) -> Columns:
    """Columns [N, C] of the summary family: means over realizations."""
    with FeatureSource(files, {FAMILY: DEFAULT_DATASETS[FAMILY]}) as source:
        names = source.feature_names(FAMILY) or []
        means = [i for i, name in enumerate(names) if name.endswith("_mean")]
        return source.read(FAMILY, 0, source.rows)[:, means] if means else source.read(FAMILY, 0, source.rows)


def epochs_of(rows: int) -> int:
    """Epochs of about 250 steps, at most 200."""
    return min(200, -(-250 // -(-rows // 128)))


def fit(rows: Columns, seed: int, **more: Any) -> tuple[Tokenizer, float]:
    """A trained tokenizer, and the CPU seconds of its training."""
    epochs = epochs_of(len(rows))
    settings = {**more, "random_seed": seed, "training.num_epochs": epochs, "training.warmup_epochs": epochs // 20}
    started = time.process_time()
    return Tokenizer(settings=settings).fit({FAMILY: rows}), time.process_time() - started


def decoded(tokenizer: Tokenizer, rows: Columns) -> Columns:
    """Raw columns [N, C] reconstructed from tokens; NaN for columns that cleaning dropped."""
    full = np.full(rows.shape, np.nan, np.float32)
    full[:, tokenizer.cleaner.keep] = tokenizer.decode(tokenizer.encode({FAMILY: rows}))
    return full


def study(
    source: Columns, pool: Columns, test: Columns, shares: Sequence[float], seed: int, directory: Path
) -> list[Row]:
    """The rows of one seed."""
    start, _ = fit(source, seed, **SETTINGS)
    start.save(directory)
    seen = source[:: max(1, len(source) // 512)]
    made = [("checkpoint alone", 0.0, 0, start, 0.0)]
    for share in shares:
        rows = np.random.default_rng(seed).permutation(len(pool))[: round(share * len(pool))]
        try:
            tokenizer, seconds = fit(pool[rows], seed, **SETTINGS)
            made.append(("from scratch", share, len(rows), tokenizer, seconds))
        except DataError as error:
            print(f"seed {seed}, {share:g} of the rows, from scratch: {error}", flush=True)
        for frozen in FREEZE:
            kept = {key: value for key, value in SETTINGS.items() if key.startswith(("training.", "device"))}
            more = {"training.learning_rate": FINE_RATE, "init_from": str(directory), "freeze": frozen}
            tokenizer, seconds = fit(pool[rows], seed, **{**kept, **more})
            made.append((f"freeze {frozen}", share, len(rows), tokenizer, seconds))
    common = np.logical_and.reduce([tokenizer.cleaner.keep for _, _, _, tokenizer, _ in made])
    reference = Reference(pool)
    common &= reference.cleaner.keep
    truth = reference(test)[:, common]
    before = start.encode({FAMILY: seen})
    results = []
    for method, share, count, tokenizer, seconds in made:
        columns = np.where(common, decoded(tokenizer, test), 0.0).astype(np.float32)
        error = np.square(reference(columns)[:, common] - truth).mean()
        tokens, codes = tokenizer.encode({FAMILY: test}), tokenizer.model.quantizer.num_codes
        used = [len(np.unique(tokens[:, g])) / k for g, k in enumerate(codes)]
        equal = (tokenizer.encode({FAMILY: seen}) == before).mean() if method != "from scratch" else float("nan")
        measures = (error, np.mean(used), equal, np.log2(codes).sum(), seconds)
        values = (method, share, count, seed, *map(float, measures))
        results.append(dict(zip(COLUMNS, values, strict=True)))
    return results


def measure(seed: int, chosen: argparse.Namespace) -> list[Row]:
    """The rows of one seed, from the files."""
    source, target = read(chosen.source), read(chosen.target)
    order = np.random.default_rng(0).permutation(len(target))
    test, pool = target[np.sort(order[: chosen.test_rows])], target[np.sort(order[chosen.test_rows :])]
    with tempfile.TemporaryDirectory() as directory:
        return study(source, pool, test, chosen.shares, seed, Path(directory) / "checkpoint")


def finished(output: Path, shares: Sequence[float]) -> list[Row]:
    """Rows of a results file; those of other shares end the command."""
    if not output.exists():
        return []
    with output.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            sys.exit(f"{output}: has other columns than {', '.join(COLUMNS)}: choose another --output")
        rows: list[Row] = [{**row, "seed": int(row["seed"])} for row in reader]
    for seed in {row["seed"] for row in rows}:
        found = {row["share"] for row in rows if row["seed"] == seed} - {"0"}
        if found != set(map(text_of, shares)):
            sys.exit(f"{output}: has shares {sorted(found)}, not {sorted(shares)}: choose another --output")
    return rows


def text_of(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main(argv: Sequence[str] | None = None) -> int:
    parser = study_parser(__doc__, required=False)
    parser.set_defaults(output=Path("transfer.csv"))
    parser.add_argument("--source", nargs="+", required=True, metavar="FILE")
    parser.add_argument("--target", nargs="+", required=True, metavar="FILE")
    parser.add_argument("--test-rows", type=int, default=500, help="held-out rows of --target")
    parser.add_argument("--shares", nargs="+", type=float, default=[0.01, 0.1, 1.0], help="of the other rows")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--first-seed", type=int, default=42)
    chosen = parser.parse_args(argv)
    rows = finished(chosen.output, chosen.shares)

    def keep(*more: Row) -> None:
        rows.extend(more)
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in sorted(rows, key=lambda row: row["seed"]):
            writer.writerow({name: text_of(value) for name, value in row.items()})
        write_text(chosen.output, text.getvalue())

    present = {row["seed"] for row in rows}
    seeds = range(chosen.first_seed, chosen.first_seed + chosen.seeds)
    failed = sweep(
        {f"seed {seed}": seed for seed in seeds if seed not in present},
        partial(measure, chosen=chosen),
        keep,
        ["method", "rows", "error", "utilization", "equal_tokens_source"],
        jobs=chosen.jobs,
    )
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
