"""What each setting does to the tokens, at the same codes, epochs and rows.

    python benchmarks/study_quality.py DATA --output study.jsonl [--variants NAME ...] [--mode select|report] [--jobs 4]

DATA holds `original_frames/seed*.npz` (the features, categories, codes and validation rows of other tokenizers' runs,
so that errors compare) and the raw `operators_real.h5`. Every run trains with `Trainer` and is scored after its last
epoch, so that nothing is picked by its score. In the mode `select` the validation rows of the frame are taken out and
a tenth of the rest, drawn by the frame, is scored: settings are chosen there. The mode `report` trains on all the rest
and scores the frame's own validation rows.

`--choose` does the whole: it tries `study_variants.COMBINATIONS` and the baseline in `select` (three seeds, until the
time limit), picks one by the rule of `choose`, and runs that one and the baseline in `report` with all seeds.

Each finished run is one line of the output; runs that have their line are skipped, so a study that was stopped goes
on. `--table` prints means over what is there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import math
import multiprocessing
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cache
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from study_variants import COMBINATIONS, COMMON, VARIANTS

from spinlock_fast import Trainer
from spinlock_fast.config.schema import RunConfig
from spinlock_fast.errors import SpinlockFastError
from spinlock_fast.models.decoder_refit import refit_decoder
from spinlock_fast.models.metrics import evaluate

Array = np.ndarray[Any, np.dtype[Any]]
SELECT_SHARE = 0.1
SELECT_SEEDS = 3
# What the scored rows should show in every frame, and what it costs in the log of the error to lack 1 of it.
WANTED = {"utilization": 0.86, "perplexity_over_k": 0.58, "topo_post": 0.975}
PRICE = 3.0
SHOWN = ["error", "error_over_original", "train_error", "utilization", "perplexity_over_k", "topo_pre", "topo_post"]


class Frame(NamedTuple):
    """Features [N, F] that runs are compared in, and what belongs to them."""

    seed: int
    x: Array
    val_rows: Array
    meta: dict[str, Any]


class Run(NamedTuple):
    """One line of the output."""

    mode: str
    variant: str
    frame: int
    seed: int

    @property
    def key(self) -> str:
        return "/".join(map(str, self))


@cache
def load_frame(data: Path, seed: int) -> Frame:
    with np.load(data / "original_frames" / f"seed{seed}.npz") as file:
        return Frame(seed, file["x"], file["val_rows"], json.loads(str(file["meta"])))


def rows_of(frame: Frame, mode: str) -> tuple[Array, Array]:
    """The rows that a run gets, and those among them that are scored (positions in the first)."""
    everything = np.arange(len(frame.x))
    if mode == "report":
        return everything, frame.val_rows
    rest = np.setdiff1d(everything, frame.val_rows)
    chosen = np.random.default_rng([frame.seed, 1]).permutation(len(rest))[: round(SELECT_SHARE * len(rest))]
    return rest, np.sort(chosen)


def train(
    run: Run, data: Path, device: str, epochs: int | None, levels: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Trains and scores one run; `levels` instead of the frame's own."""
    frame = load_frame(data, run.frame)
    rows, scored = rows_of(frame, run.mode)
    settings = {**COMMON, **VARIANTS[run.variant], "random_seed": run.seed, "device": device}
    if epochs is not None:
        settings["training.num_epochs"] = epochs
    trainer = Trainer.from_config(RunConfig(), settings)
    x, meta = frame.x[rows], frame.meta
    started = time.perf_counter()
    result = trainer.fit(x, meta["group_indices"], levels or meta["levels"], meta["feature_names"], scored)
    seconds = time.perf_counter() - started
    model = result.model
    model.load_state_dict(result.final_state["model_state_dict"])
    model.eval()
    features = torch.from_numpy(x).to(model.feature_order.device)
    trained = np.setdiff1d(np.arange(len(x)), scored)
    training = trainer.config.training
    found = evaluate(model, features[scored], training)
    before = found["reconstruction_error"]
    if training.decoder_refit:
        refit_decoder(model, features[trained], training.decoder_refit)
        found = evaluate(model, features[scored], training)
    with torch.no_grad():
        out = model(features)
    squared = (out["reconstruction"] - features).square().cpu().numpy()
    encoded = [i for members in meta["group_indices"].values() for i in members]
    parts = {**meta["group_indices"], "(in no category)": np.setdiff1d(np.arange(x.shape[1]), encoded)}
    return {
        **run._asdict(),
        "error": found["reconstruction_error"],
        "error_over_original": found["reconstruction_error"] / meta["original"]["error_final"],
        "train_error": float(squared[trained].mean()),
        "best_error": result.metrics["reconstruction_error"],
        "error_before_refit": before,
        **{name: found[name] for name in ("utilization", "perplexity_over_k", "topo_pre", "topo_post", "val_loss")},
        "category_error": {k: float(squared[scored][:, i].mean()) for k, i in parts.items() if len(i)},
        **usefulness(out["tokens"].cpu().numpy(), trained, scored, targets_of(data, tuple(rows.tolist()))),
        "epochs": len(result.history),
        "rows": [len(trained), len(scored)],
        "seconds": seconds,
        "device": result.metrics["device"],
        "versions": result.metrics["versions"],
    }


@cache
def targets_of(data: Path, rows: tuple[int, ...]) -> dict[str, Array]:
    """What tokens should tell of an operator: two kinds of labels [N], and columns [N, T] that no encoder has seen."""
    import h5py

    with h5py.File(data / "operators_real.h5") as file:
        temporal = np.nan_to_num(file["features/temporal/features"][:])
        raw = np.concatenate([file["features/summary/aggregated/features"][:], temporal.mean(1), temporal.std(1)], 1)
        raw = raw[:, ~np.isnan(raw).any(0)]
        varies = raw.std(0) > 1e-8
        found = {
            "ic_type": file["metadata/ic_types"][:].astype(str),
            "evolution_policy": file["metadata/evolution_policies"][:].astype(str),
            "theta": file["parameters/params"][:],
            "raw": _ranks(raw[:, varies]),
        }
    return {name: values[np.array(rows)] for name, values in found.items()}


def _ranks(values: Array) -> Array:
    """Columns as ranks in 0..1: some raw features have tails of many thousand sigma."""
    ranks: Array = values.argsort(0, kind="stable").argsort(0, kind="stable") / len(values)
    return ranks


def usefulness(tokens: Array, trained: Array, scored: Array, targets: dict[str, Array]) -> dict[str, float]:
    """Linear probes from one-hot tokens [N, G], fitted to the training rows, scored on the others.

    Accuracy for labels; for columns the mean over columns of R2, at least -1 each.
    """
    inputs = np.concatenate([column[:, None] == np.unique(column) for column in tokens.T], 1).astype(np.float64)
    return {f"probe_{name}": _probe(inputs, values, trained, scored) for name, values in targets.items()}


def _probe(inputs: Array, values: Array, trained: Array, scored: Array, penalty: float = 10.0) -> float:
    """Ridge regression; labels are regressed as one-hot columns and the largest wins."""
    labels = values.ndim == 1
    wanted = (values[:, None] == np.unique(values)).astype(np.float64) if labels else values
    centre_in, centre_out = inputs[trained].mean(0), wanted[trained].mean(0)
    a, b = inputs[trained] - centre_in, wanted[trained] - centre_out
    weights = np.linalg.solve(a.T @ a + penalty * np.eye(a.shape[1]), a.T @ b)
    predicted = (inputs[scored] - centre_in) @ weights + centre_out
    true = wanted[scored]
    if labels:
        return float((predicted.argmax(1) == true.argmax(1)).mean())
    spread = np.square(true - centre_out).sum(0)
    varies = spread > 1e-12
    share = 1.0 - np.square(true - predicted).sum(0)[varies] / spread[varies]
    return float(share.clip(min=-1.0).mean())


def references(data: Path, frames: Iterable[int], mode: str) -> dict[str, Any]:
    """The same probes from the original's tokens (its training rows and ours are the same in `report`)."""
    found = {}
    for seed in frames:
        frame = load_frame(data, seed)
        rows, scored = rows_of(frame, mode)
        with np.load(data / "original_frames" / f"seed{seed}.npz") as file:
            tokens = file["tokens"][rows].astype(np.int64)
        trained = np.setdiff1d(np.arange(len(rows)), scored)
        found[str(seed)] = usefulness(tokens, trained, scored, targets_of(data, tuple(rows.tolist())))
    return found


def finished(output: Path) -> dict[str, dict[str, Any]]:
    """Lines by their run; the torn last line of a killed process does not count."""
    found = {}
    for line in output.read_text(encoding="utf-8").splitlines() if output.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[Run(row["mode"], row["variant"], row["frame"], row["seed"]).key] = row
    return found


def append(output: Path, row: dict[str, Any]) -> None:
    """One write of one whole line, which other processes' lines cannot split."""
    output.parent.mkdir(parents=True, exist_ok=True)
    torn = output.exists() and not output.read_bytes().endswith(b"\n") and output.stat().st_size > 0
    line = ("\n" if torn else "") + json.dumps(row) + "\n"
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(handle, line.encode())
    finally:
        os.close(handle)


def choose(rows: Iterable[dict[str, Any]]) -> tuple[str, dict[str, float]]:
    """The combination of the lowest score, and all scores; only runs of the mode `select` count.

    Score: the mean over frames of log(mean error / the baseline's mean error) + PRICE x the sum of what the means of
    `WANTED` lack. Combinations without two seeds in each frame of the baseline do not take part.
    """
    runs = defaultdict(list)
    for row in rows:
        if row["mode"] == "select":
            runs[row["variant"], row["frame"]].append(row)
    frames = sorted(frame for variant, frame in runs if variant == "baseline")
    scores = {}
    for variant in COMBINATIONS:
        if not frames or any(len(runs[variant, frame]) < 2 for frame in frames):
            continue
        scores[variant] = float(np.mean([_score(runs[variant, f], runs["baseline", f]) for f in frames]))
    if not scores:
        raise SystemExit("nothing to choose from: no combination has two seeds in each frame that the baseline has")
    return min(scores, key=scores.__getitem__), scores


def _score(runs: Sequence[dict[str, Any]], baseline: Sequence[dict[str, Any]]) -> float:
    def mean(rows: Sequence[dict[str, Any]], column: str) -> float:
        return float(np.mean([row[column] for row in rows]))

    lacks = sum(max(0.0, least - mean(runs, column)) for column, least in WANTED.items())
    return math.log(mean(runs, "error") / mean(baseline, "error")) + PRICE * lacks


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def print_table(rows: Iterable[dict[str, Any]]) -> None:
    """Means over seeds and, in brackets, their standard deviation: one line per mode, variant and frame."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["mode"], row["variant"], row["frame"]].append(row)
    columns = [*SHOWN, "probe_ic_type", "probe_evolution_policy", "probe_theta", "probe_raw", "seconds"]
    say("mode variant frame runs " + " ".join(columns))
    for (mode, variant, frame), runs in sorted(groups.items()):
        cells = [
            f"{np.mean([r[c] for r in runs]):.3g}" + (f"({np.std([r[c] for r in runs]):.2g})" if c == "error" else "")
            for c in columns
        ]
        say(" ".join([mode, variant, str(frame), str(len(runs)), *cells]))


def _start_worker() -> None:
    torch.set_num_threads(1)  # a step is small: processes use cores better than threads
    logging.getLogger("spinlock_fast").setLevel(logging.ERROR)


def _job(arguments: tuple[Run, Path, str, int | None, float]) -> dict[str, Any] | None:
    run, data, device, epochs, deadline = arguments
    if time.time() > deadline:
        return None
    try:
        return train(run, data, device, epochs)
    except (SpinlockFastError, ValueError, RuntimeError) as error:  # one setting must not end the study of the others
        return {**run._asdict(), "failed": f"{type(error).__name__}: {error}"}


def runs_of(mode: str, variants: Iterable[str], frames: Sequence[int], seeds: Sequence[int], output: Path) -> list[Run]:
    """The runs that have no line yet; all variants get a first seed before any gets a second one."""
    present = finished(output)
    order = itertools.product(seeds, variants, frames)
    runs = [Run(mode, variant, frame, seed) for seed, variant, frame in order]
    return [run for run in runs if run.key not in present]


def work(runs: Sequence[Run], arguments: argparse.Namespace, pool: Pool, deadline: float = float("inf")) -> int:
    """Makes the runs; the number of those that failed."""
    started = time.time()
    jobs = [(run, arguments.data, arguments.device, arguments.epochs, deadline) for run in runs]
    failed = done = 0
    for row in pool.imap_unordered(_job, jobs):
        if row is None:
            continue
        done += 1
        name = Run(row["mode"], row["variant"], row["frame"], row["seed"]).key
        said = f"[{done}/{len(jobs)}, {time.time() - started:.0f} s] {name}: "
        if "failed" in row:
            failed += 1
            say(said + row["failed"])
            continue
        append(arguments.output, row)
        say(said + " ".join(f"{c}={row[c]:.3f}" for c in SHOWN) + f" {row['seconds']:.1f}s")
    if done < len(jobs):
        say(f"time limit: {len(jobs) - done} runs are left")
    return failed


def choose_and_report(arguments: argparse.Namespace, pool: Pool, deadline: float) -> int:
    """Tries the combinations, picks one, and runs it and the baseline on the rows that were held apart."""
    output, frames, seeds = arguments.output, arguments.frames, arguments.seeds
    tried = ["baseline", *COMBINATIONS]
    failed = work(runs_of("select", tried, frames, seeds[:SELECT_SEEDS], output), arguments, pool, deadline)
    chosen, scores = choose(finished(output).values())
    for variant, score in sorted(scores.items(), key=lambda item: item[1]):
        say(f"score {score:.3f} {variant}")
    say(f"chosen: {chosen}")
    failed += work(runs_of("report", [chosen, "baseline"], frames, seeds, output), arguments, pool)
    print_table(row for row in finished(output).values() if row["mode"] == "report")
    return failed


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="directory of the data")
    parser.add_argument("--output", type=Path, required=True, help="JSON lines, continued where they are")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="NAME")
    parser.add_argument("--frames", nargs="+", type=int, default=[42, 43, 44])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--mode", choices=["select", "report"], default="select")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--epochs", type=int, help="instead of those of the settings, for a trial")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--time-limit", type=float, default=float("inf"), help="seconds after which no run starts")
    parser.add_argument("--choose", action="store_true", help="select among the combinations, then report one")
    parser.add_argument("--table", action="store_true", help="only print the means over what is there")
    parser.add_argument("--list", action="store_true", help="only print what would run")
    arguments = parser.parse_args(argv)
    runs = runs_of(arguments.mode, arguments.variants, arguments.frames, arguments.seeds, arguments.output)
    if arguments.list:
        say("\n".join(run.key for run in runs))
    elif arguments.table:
        print_table(finished(arguments.output).values())
        found = references(arguments.data, arguments.frames, "report")
        say("probes from the original's tokens: " + json.dumps(found))
    else:
        deadline = time.time() + arguments.time_limit
        with multiprocessing.get_context("spawn").Pool(arguments.jobs, _start_worker) as pool:
            if arguments.choose:
                failed = choose_and_report(arguments, pool, deadline)
            else:
                failed = work(runs, arguments, pool, deadline)
        return min(failed, 1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
