"""Effect of training settings on the tokens, with equal codes, epochs and rows.

    python -m benchmarks.studies.quality DATA --output study.jsonl [--variants NAME ...] [--mode report]

DATA contains `original_frames/seed*.npz` (features, categories, codebook sizes and validation rows of runs of the
original project, called frames here) and the raw `operators_real.h5`. Every run trains with `Trainer` and is scored
after its last epoch. Mode `select` removes the frame's validation rows and scores a tenth of the remaining rows, drawn
with the frame's seed; settings are chosen there. Mode `report` trains on all other rows and scores the frame's
validation rows.

`--choose` runs the whole study: `variants.COMBINATIONS` and the baseline in `select` (three seeds, until the time
limit), the choice of one by `choose`, then that one and the baseline in `report` with all seeds.

Each finished run is a line of the output. Runs that have a line are skipped, so that an interrupted study can be
continued. `--table` prints, for each mode and frame, the tables of `ablate`: means over seeds of the finished runs, and
differences to the baseline, paired by seed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.studies.sweep import Row, lines_of, pending, perform, study_parser, tables
from benchmarks.studies.variants import COMBINATIONS, COMMON, VARIANTS
from spinlock_fast import Trainer
from spinlock_fast.config.schema import RunConfig
from spinlock_fast.models.decoder_refit import refit_decoder
from spinlock_fast.models.metrics import evaluate
from spinlock_fast.training.result import TrainResult

Array = np.ndarray[Any, np.dtype[Any]]
SELECT_SHARE = 0.1
SELECT_SEEDS = 3
# Targets of the scored rows in every frame, and the penalty on the log error per unit below a target.
TARGETS = {"utilization": 0.86, "perplexity_over_k": 0.58, "topo_post": 0.975}
PENALTY = 3.0
COLUMNS = ["error", "error_over_original", "train_error", "utilization", "perplexity_over_k", "topo_pre", "topo_post"]
TABLE = [*COLUMNS, "probe_ic_type", "probe_evolution_policy", "probe_theta", "probe_raw", "seconds"]
SHOWN = [*COLUMNS, "seconds"]
BASE = "baseline"


class EvaluationSplit(NamedTuple):
    """Features [N, F], validation rows and metadata of one run of the original project."""

    seed: int
    x: Array
    val_rows: Array
    meta: dict[str, Any]


class Run(NamedTuple):
    """One run of the study, a line of the output."""

    mode: str
    variant: str
    frame: int
    seed: int


@cache
def load_frame(path: Path) -> tuple[Array, Array, dict[str, Any]]:
    """Features [N, F], validation rows and metadata in a file of `original_frames`."""
    with np.load(path) as file:
        return file["x"], file["val_rows"], json.loads(str(file["meta"]))


def load_split(data: Path, seed: int) -> EvaluationSplit:
    return EvaluationSplit(seed, *load_frame(data / "original_frames" / f"seed{seed}.npz"))


def rows_of(frame: EvaluationSplit, mode: str) -> tuple[Array, Array]:
    """The rows of a run, and the positions among them that are scored."""
    rows = np.arange(len(frame.x))
    if mode == "report":
        return rows, frame.val_rows
    rows = np.setdiff1d(rows, frame.val_rows)
    scored = np.random.default_rng([frame.seed, 1]).permutation(len(rows))[: round(SELECT_SHARE * len(rows))]
    return rows, np.sort(scored)


def fit_last(trainer: Trainer, x: Array, meta: dict[str, Any], scored: Array) -> TrainResult:
    """Trains without the scored rows; the model of the result is that of the last epoch."""
    result = trainer.fit(x, meta["group_indices"], meta["levels"], meta["feature_names"], scored)
    result.model.load_state_dict(result.final_state["model_state_dict"])
    result.model.eval()
    return result


def measure(run: Run, chosen: argparse.Namespace) -> Row:
    """Trains and scores one run."""
    frame = load_split(chosen.data, run.frame)
    rows, scored = rows_of(frame, run.mode)
    settings = {**COMMON, **VARIANTS[run.variant], "random_seed": run.seed, "device": chosen.device}
    if chosen.epochs is not None:
        settings["training.num_epochs"] = chosen.epochs
    trainer = Trainer.from_config(RunConfig(), settings)
    x, meta = frame.x[rows], frame.meta
    started = time.perf_counter()
    result = fit_last(trainer, x, meta, scored)
    seconds, model = time.perf_counter() - started, result.model
    features = torch.from_numpy(x).to(model.feature_order.device)
    trained = np.setdiff1d(np.arange(len(x)), scored)
    training = trainer.config.training
    metrics = evaluate(model, features[scored], training)
    error_before_refit = metrics["reconstruction_error"]
    if training.decoder_refit:
        refit_decoder(model, features[trained], training.decoder_refit)
        metrics = evaluate(model, features[scored], training)
    with torch.no_grad():
        out = model(features)
    squared = (out["reconstruction"] - features).square().cpu().numpy()
    encoded = [i for members in meta["group_indices"].values() for i in members]
    parts = {**meta["group_indices"], "(in no category)": np.setdiff1d(np.arange(x.shape[1]), encoded)}
    return {
        "error": metrics["reconstruction_error"],
        "error_over_original": metrics["reconstruction_error"] / meta["original"]["error_final"],
        "train_error": float(squared[trained].mean()),
        "best_error": result.metrics["reconstruction_error"],
        "error_before_refit": error_before_refit,
        **{name: metrics[name] for name in ("utilization", "perplexity_over_k", "topo_pre", "topo_post", "val_loss")},
        "category_error": {k: float(squared[scored][:, i].mean()) for k, i in parts.items() if len(i)},
        **probe_scores(out["tokens"].cpu().numpy(), trained, scored, targets_of(chosen.data, tuple(rows.tolist()))),
        "epochs": len(result.history),
        "rows": [len(trained), len(scored)],
        "seconds": seconds,
        "device": result.metrics["device"],
        "versions": result.metrics["versions"],
    }


@cache
def targets_of(data: Path, rows: tuple[int, ...]) -> dict[str, Array]:
    """Probe targets per operator: two labels [N], and columns [N, T] that are not among the encoded features."""
    import h5py

    with h5py.File(data / "operators_real.h5") as file:
        temporal = np.nan_to_num(file["features/temporal/features"][:])
        raw = np.concatenate([file["features/summary/aggregated/features"][:], temporal.mean(1), temporal.std(1)], 1)
        raw = raw[:, ~np.isnan(raw).any(0)]
        varies = raw.std(0) > 1e-8
        targets = {
            "ic_type": file["metadata/ic_types"][:].astype(str),
            "evolution_policy": file["metadata/evolution_policies"][:].astype(str),
            "theta": file["parameters/params"][:],
            "raw": _ranks(raw[:, varies]),
        }
    return {name: values[np.array(rows)] for name, values in targets.items()}


def _ranks(values: Array) -> Array:
    """Columns as ranks in [0, 1): some raw features have outliers of thousands of standard deviations."""
    ranks: Array = values.argsort(0, kind="stable").argsort(0, kind="stable") / len(values)
    return ranks


def probe_scores(tokens: Array, trained: Array, scored: Array, targets: dict[str, Array]) -> dict[str, float]:
    """Scores of linear probes from one-hot tokens [N, G], fitted to the training rows.

    Accuracy for labels; for columns the mean over columns of R2, clipped at -1.
    """
    inputs = np.concatenate([column[:, None] == np.unique(column) for column in tokens.T], 1).astype(np.float64)
    return {f"probe_{name}": _probe(inputs, values, trained, scored) for name, values in targets.items()}


def _probe(inputs: Array, values: Array, trained: Array, scored: Array, penalty: float = 10.0) -> float:
    """Ridge regression; labels are predicted as the largest of their one-hot columns."""
    labels = values.ndim == 1
    outputs = (values[:, None] == np.unique(values)).astype(np.float64) if labels else values
    mean_in, mean_out = inputs[trained].mean(0), outputs[trained].mean(0)
    a, b = inputs[trained] - mean_in, outputs[trained] - mean_out
    weights = np.linalg.solve(a.T @ a + penalty * np.eye(a.shape[1]), a.T @ b)
    predicted = (inputs[scored] - mean_in) @ weights + mean_out
    true = outputs[scored]
    if labels:
        return float((predicted.argmax(1) == true.argmax(1)).mean())
    variance = np.square(true - mean_out).sum(0)
    varies = variance > 1e-12
    r2 = 1.0 - np.square(true - predicted).sum(0)[varies] / variance[varies]
    return float(r2.clip(min=-1.0).mean())


def original_probes(data: Path, frames: Iterable[int], mode: str) -> dict[str, Any]:
    """Probe scores of the original project's tokens (in `report`, its training rows are the same)."""
    scores = {}
    for seed in frames:
        frame = load_split(data, seed)
        rows, scored = rows_of(frame, mode)
        with np.load(data / "original_frames" / f"seed{seed}.npz") as file:
            tokens = file["tokens"][rows].astype(np.int64)
        trained = np.setdiff1d(np.arange(len(rows)), scored)
        scores[str(seed)] = probe_scores(tokens, trained, scored, targets_of(data, tuple(rows.tolist())))
    return scores


def choose(rows: Iterable[dict[str, Any]]) -> tuple[str, dict[str, float]]:
    """The combination with the lowest score, and all scores, from runs of mode `select`.

    Score: mean over frames of log(mean error / mean error of the baseline) + PENALTY x the sum of the shortfalls of the
    mean metrics from `TARGETS`. Combinations without two seeds in each frame of the baseline are ignored.
    """
    runs: defaultdict[tuple[str, int], dict[int, Row]] = defaultdict(dict)
    for row in rows:
        if row["mode"] == "select":
            runs[row["variant"], row["frame"]][row["seed"]] = row
    frames = sorted(frame for variant, frame in runs if variant == "baseline")
    scores = {}
    for variant in COMBINATIONS:
        if not frames or any(len(runs[variant, frame]) < 2 for frame in frames):
            continue
        scores[variant] = float(np.mean([_score(runs[variant, f], runs["baseline", f]) for f in frames]))
    if not scores:
        raise SystemExit("nothing to choose from: no combination has two seeds in each frame that the baseline has")
    return min(scores, key=scores.__getitem__), scores


def _score(runs: Mapping[int, Row], baseline: Mapping[int, Row]) -> float:
    def mean(rows: Mapping[int, Row], column: str) -> float:
        return float(np.mean([row[column] for row in rows.values()]))

    shortfall = sum(max(0.0, target - mean(runs, column)) for column, target in TARGETS.items())
    return math.log(mean(runs, "error") / mean(baseline, "error")) + PENALTY * shortfall


def print_table(rows: Iterable[dict[str, Any]]) -> None:
    """Prints the tables of `ablate` for each mode and frame."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["mode"], row["frame"]].append(row)
    for (mode, frame), own in sorted(groups.items()):
        print(f"{mode}, frame {frame}\n\n{tables(own, TABLE, BASE)}", flush=True)


def runs_of(mode: str, variants: Iterable[str], seeds: Sequence[int], chosen: argparse.Namespace) -> list[Run]:
    """All variants with the first seed, then with the second."""
    return [Run(mode, *rest) for seed in seeds for rest in itertools.product(variants, chosen.frames, [seed])]


def choose_and_report(arguments: argparse.Namespace, deadline: float) -> int:
    """Runs the combinations, chooses one, and runs it and the baseline in mode `report`."""
    output, seeds = arguments.output, arguments.seeds
    candidates = runs_of("select", [BASE, *COMBINATIONS], seeds[:SELECT_SEEDS], arguments)
    status = perform(arguments, candidates, measure, SHOWN, deadline=deadline)
    chosen, scores = choose(lines_of(output))
    for variant, score in sorted(scores.items(), key=lambda item: item[1]):
        print(f"score {score:.3f} {variant}", flush=True)
    print(f"chosen: {chosen}", flush=True)
    status |= perform(arguments, runs_of("report", [chosen, BASE], seeds, arguments), measure, SHOWN)
    print_table(row for row in lines_of(output) if row["mode"] == "report")
    return status


def main(argv: Sequence[str] | None = None) -> int:
    parser = study_parser(__doc__)
    parser.add_argument("data", type=Path, help="directory of the data, see above")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="NAME")
    parser.add_argument("--frames", nargs="+", type=int, default=[42, 43, 44])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--mode", choices=["select", "report"], default="select")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--epochs", type=int, help="overrides the epochs of the settings, for a trial")
    parser.add_argument("--time-limit", type=float, default=float("inf"), help="seconds after which no run is started")
    parser.add_argument("--choose", action="store_true", help="select among the combinations, then report one")
    parser.add_argument("--table", action="store_true", help="only print the means over finished runs")
    parser.add_argument("--list", action="store_true", help="only print what would run")
    arguments = parser.parse_args(argv)
    runs = runs_of(arguments.mode, arguments.variants, arguments.seeds, arguments)
    if arguments.list:
        print("\n".join("/".join(map(str, run)) for run in pending(arguments.output, runs)), flush=True)
    elif arguments.table:
        print_table(lines_of(arguments.output))
        probes = original_probes(arguments.data, arguments.frames, "report")
        print("probes from the original's tokens: " + json.dumps(probes), flush=True)
    else:
        deadline = time.time() + arguments.time_limit
        if arguments.choose:
            return choose_and_report(arguments, deadline)
        return perform(arguments, runs, measure, SHOWN, deadline=deadline)
    return 0


if __name__ == "__main__":
    sys.exit(main())
