"""Time of every stage of the pipeline against the number of rows N, and the targets for set-up and start-up time.

    python -m benchmarks.training.bench_pipeline                              # CPU: files of up to 10,000 rows
    python -m benchmarks.training.bench_pipeline --device cuda --file-rows 1000 10000 100000
    pytest benchmarks/training/bench_pipeline.py --benchmark-only             # small

Loading, encoding and tokenizing are timed on files expanded by `benchmarks.data.expand_dataset`, from the page cache.
The stages after encoding are timed on a synthetic matrix [N, 268] of which cleaning keeps 172 columns in 11 categories:
the seed shape. The result of each stage is checked before its time is written. Times are wall times; `cpu_us` is the
CPU time of all threads, which other load on the machine affects less.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from benchmarks.common.commands import ROOT, simulate_operators
from benchmarks.common.timing import exponent, percentiles, write
from benchmarks.data.expand_dataset import expand
from benchmarks.training.epoch_profile import one_epoch
from spinlock_fast.benchmark import SEED_FEATURES, step_seconds, training_run
from spinlock_fast.config.loading import load_config
from spinlock_fast.config.schema import RunConfig
from spinlock_fast.data.split import split_rows
from spinlock_fast.device import resolve_device
from spinlock_fast.features.categories import find_categories
from spinlock_fast.features.cleaning import fit_cleaner
from spinlock_fast.features.encode import encode, make_encoders
from spinlock_fast.features.normalize import fit_normalizer
from spinlock_fast.models.metrics import Validation
from spinlock_fast.models.vqvae import CategoricalHierarchicalVQVAE, CategoricalVQVAEConfig
from spinlock_fast.tokenizer import Tokenizer
from spinlock_fast.training.cuda_graphs import WARM_UP_STEPS, dedicated_stream
from spinlock_fast.training.observer import SilentDisplay
from spinlock_fast.training.preparation import open_source, prepare

COLUMNS, COPIES = 268, 60  # raw columns; linear copies of others among them
SET_UP = ("clean", "discover", "normalise")
SET_UP_ROWS, SET_UP_SECONDS = 100_000, 3.0
IMPORT_RATIO, DRY_RUN_SECONDS = 1.2, 4.0
_ROWS_AT_ONCE = 4096
_CONFIG = ROOT / "configs/100k.yaml"

Emit = Callable[..., None]


class Stopwatch:
    """Wall time of single calls, and CPU time of all threads."""

    def __init__(self, device: torch.device, repeats: int, budget: float) -> None:
        self.device, self.repeats, self.budget = device, repeats, budget

    def __call__(self, run: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
        """Repeats the call within the budget, at least once; returns the last result and the times."""
        wall: list[float] = []
        cpu: list[float] = []
        while not wall or (len(wall) < self.repeats and sum(wall) < self.budget):
            self._synchronize()
            started, used = time.perf_counter(), time.process_time()
            result = run()
            self._synchronize()
            wall.append(time.perf_counter() - started)
            cpu.append(time.process_time() - used)
        return result, {**percentiles(wall), "cpu_us": statistics.median(cpu) * 1e6}

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def raw_columns(rows: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
    """[rows, 268]: 172 columns in 11 groups of one factor each, some with NaN, 60 linear copies, 36 constants."""
    random = np.random.default_rng(seed)
    x = np.empty((rows, COLUMNS), dtype=np.float32)
    kept = sum(SEED_FEATURES)
    factors = random.standard_normal((rows, len(SEED_FEATURES)), dtype=np.float32)
    x[:, :kept] = random.standard_normal((rows, kept), dtype=np.float32)
    x[:, :kept] = 0.3 * x[:, :kept] + np.repeat(factors, SEED_FEATURES, axis=1)
    x[:, kept : kept + COPIES] = 0.5 * x[:, :COPIES] + 1.0
    x[:, kept + COPIES :] = 7.0
    gaps = x[:, COPIES : COPIES + 12]
    gaps[random.random(gaps.shape, dtype=np.float32) < 0.01] = np.nan
    return x


def planted_groups() -> list[list[int]]:
    """The columns of each factor."""
    edges = np.cumsum([0, *SEED_FEATURES]).tolist()
    return [list(range(a, b)) for a, b in itertools.pairwise(edges)]


def set_up(
    rows: int, config: RunConfig, watch: Stopwatch, emit: Emit
) -> tuple[np.ndarray[Any, np.dtype[np.float32]], Any]:
    """Cleaning, category discovery and normalisation as in `prepare`; returns features and split."""
    columns = raw_columns(rows)
    split = split_rows(rows, config.training, config.random_seed)

    def clean() -> Any:
        cleaner = fit_cleaner(columns[split.train], config.feature_cleaning)
        return cleaner, cleaner(columns)

    (cleaner, cleaned), took = watch(clean)
    assert np.flatnonzero(cleaner.keep).tolist() == list(range(sum(SEED_FEATURES))), "other columns were kept"
    assert np.isfinite(cleaned).all()
    emit("clean", rows, took)

    names = [f"synthetic::x_{i}" for i in range(cleaned.shape[1])]
    groups, took = watch(lambda: find_categories(cleaned[split.train], names, config))
    assert sorted(sorted(members) for members in groups.values()) == planted_groups(), "other categories were found"
    emit("discover", rows, took)

    def normalise() -> Any:
        return fit_normalizer(cleaned[split.train], config.training.normalization_method)(cleaned)

    x, took = watch(normalise)
    train = x[split.train].astype(np.float64)
    assert np.abs(train.mean(0)).max() < 1e-3
    assert np.abs(train.std(0) - 1.0).max() < 1e-3
    emit("normalise", rows, took)
    return x, split


def train_and_use(x: Any, split: Any, watch: Stopwatch, emit: Emit, batch: int = 512) -> None:
    """A training epoch, a validation and tokens of all rows, for the features of `set_up`."""
    device = watch.device
    rows = torch.from_numpy(x)
    run = training_run(batch, device=str(device), x=rows[torch.from_numpy(split.train)])
    x_val = rows[torch.from_numpy(split.val)].to(device)
    validation = Validation(run.model, x_val, run.training)
    validate = run.launcher.captured(validation.run, "validations")
    validation.run()
    untrained = validation.result()["val_loss"]
    with dedicated_stream(device):
        if device.type == "cuda":
            for _ in range(WARM_UP_STEPS + 1):
                one_epoch(run)
        else:
            step_seconds(run, 1)
        _, epoch = watch(lambda: one_epoch(run))
        for _ in range(WARM_UP_STEPS + 1 if device.type == "cuda" else 1):
            validate()
        metrics, validated = watch(lambda: (validate(), validation.result())[1])
        assert metrics["val_loss"] < untrained, "training did not lower the validation loss"
        emit("train_epoch", len(x), epoch, steps=run.training_step.steps_per_epoch)
        emit("validate", len(x), validated, val_rows=len(x_val))
        all_rows = rows.to(device)
        tokens, took = watch(lambda: torch.cat([run.model.get_tokens(part) for part in all_rows.split(_ROWS_AT_ONCE)]))
        check_tokens(run.model, all_rows[:256], tokens[:256])
        emit("tokenize", len(x), took)


def check_tokens(model: CategoricalHierarchicalVQVAE, x: torch.Tensor, tokens: torch.Tensor) -> None:
    """Raises AssertionError unless the tokens are the nearest codes in float64."""
    with torch.no_grad():
        latents = model.eval().encode(x).double()
    layout = model.quantizer.layout
    for g in range(layout.groups):
        distance = torch.cdist(latents[:, layout.column_slice(g)], model.quantizer.codebook(g).double())
        chosen = distance.gather(1, tokens[:, g : g + 1])[:, 0]
        assert bool((chosen - distance.min(1).values <= 1e-3).all()), f"codebook {g}"


def from_file(data: str, config: RunConfig, watch: Stopwatch, emit: Emit) -> None:
    """Loading and encoding of a data set, and tokens of its files from a tokenizer with random codes."""
    device = watch.device
    with open_source(config) as source:
        encoders = make_encoders(source, config.families, config.random_seed, config.memory_budget)
        columns, took = watch(lambda: encode(source, encoders, config.memory_budget, device))
        check_columns(source.files[0], encoders, columns, 1e-2 if device.type == "cuda" else 1e-4)
        emit("load_encode", source.rows, took, bytes=sum(d.rows * d.row_bytes for d in source.datasets.values()))
        prepared = prepare(source, config, device, SilentDisplay())
    model = CategoricalHierarchicalVQVAE(
        CategoricalVQVAEConfig(
            **{
                **config.model.model_dump(),
                "codebook_init": "uniform",
                "input_dim": prepared.x.shape[1],
                "group_indices": prepared.groups,
            }
        )
    ).to(device)
    tokenizer = Tokenizer.from_parts(
        model, prepared.encoders, prepared.cleaner, prepared.normalizer, prepared.feature_names
    ).to(device)
    tokens, took = watch(lambda: tokenizer.encode(data))
    expected = model.get_tokens(torch.from_numpy(prepared.x[:_ROWS_AT_ONCE]).to(device)).cpu().numpy()
    assert len(tokens) == len(prepared.x)
    # Rounding depends on the block size, in TF32 more so: a row between two codes may change.
    tolerance = 2e-2 if device.type == "cuda" else 1e-3
    assert (tokens[: len(expected)] != expected).mean() < tolerance, (
        "the tokens of the file differ from those of its features"
    )
    emit("tokenize_file", len(tokens), took)


def check_columns(path: str | Path, encoders: Sequence[Any], columns: Any, tolerance: float) -> None:
    """Compares the first rows with those read by h5py and encoded on the CPU (a GPU convolves in TF32)."""
    column = 0
    for family in encoders:
        with h5py.File(path) as file:
            raw = torch.from_numpy(file[family.dataset][:64])
        expected = family(raw).numpy()
        actual = columns[: len(expected), column : column + expected.shape[1]]
        scale = np.abs(expected).max() + 1e-6
        assert np.abs(actual - expected).max() <= tolerance * scale, f"family {family.name}: the columns differ"
        column += expected.shape[1]


def commands(data: str, repeats: int) -> list[dict[str, Any]]:
    """Start-up times: alternating imports of torch and this package, and `--dry-run` of the training command."""
    imports = {
        "torch": "import torch",
        "spinlock_fast": "import spinlock_fast",
        "spinlock_fast, Trainer and Tokenizer": "import spinlock_fast; spinlock_fast.Trainer; spinlock_fast.Tokenizer",
    }
    times: dict[str, list[float]] = {name: [] for name in imports}
    for _ in range(repeats):
        for name, line in imports.items():
            timed = f"import time; t = time.perf_counter(); {line}; print(time.perf_counter() - t)"
            times[name].append(float(subprocess.check_output([sys.executable, "-c", timed], text=True)))
    rows: list[dict[str, Any]] = []
    for name, seconds in times.items():
        ratio = statistics.median(a / b for a, b in zip(seconds, times["torch"], strict=True))
        rows.append({"stage": f"import {name}", **percentiles(seconds), "ratio_to_torch": ratio})
    dry_runs: list[float] = []
    with tempfile.TemporaryDirectory() as directory:
        command = ["-m", "spinlock_fast.train", str(_CONFIG), "--dry-run", "--output", f"{directory}/run"]
        command += ["--set", f"dataset_path={data}"]
        for _ in range(min(repeats, 5)):
            started = time.perf_counter()
            output = subprocess.check_output([sys.executable, *command], text=True, cwd=ROOT)
            dry_runs.append(time.perf_counter() - started)
            assert "samples in" in output
            assert not Path(directory, "run").exists(), "--dry-run wrote something"
    rows.append({"stage": "--dry-run", **percentiles(dry_runs)})
    return rows


def growth(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Fitted exponents of N per stage: over all sizes, and between the two largest of wall and CPU time."""
    exponents: dict[str, dict[str, float]] = {}
    for stage in dict.fromkeys(row["stage"] for row in rows if "rows" in row):
        points = sorted(
            (row["rows"], row["p50_us"], row.get("cpu_us", 0.0))
            for row in rows
            if row["stage"] == stage and "rows" in row
        )
        if len(points) > 1:
            sizes, times, cpu_times = zip(*points, strict=True)
            exponents[stage] = {"all": exponent(sizes, times), "largest": exponent(sizes[-2:], times[-2:])}
            if all(cpu_times):
                exponents[stage]["largest, threads"] = exponent(sizes[-2:], cpu_times[-2:])
    return exponents


def targets(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Targets, limits and measured values, for the rows that are present."""
    results: list[dict[str, Any]] = []

    def decide(name: str, value: float, limit: float) -> None:
        results.append({"target": name, "limit": limit, "measured": value, "met": value <= limit})

    medians = {row["stage"]: row["p50_us"] / 1e6 for row in rows if row.get("rows") == SET_UP_ROWS}
    if medians.keys() >= set(SET_UP):
        decide(f"{' + '.join(SET_UP)}, {SET_UP_ROWS:,} x {COLUMNS}, s", sum(medians[s] for s in SET_UP), SET_UP_SECONDS)
    for row in rows:
        if row["stage"] == "import spinlock_fast":
            decide("import spinlock_fast, against import torch", row["ratio_to_torch"], IMPORT_RATIO)
        if row["stage"] == "--dry-run":
            decide("--dry-run, s", row["p50_us"] / 1e6, DRY_RUN_SECONDS)
    return results


def settings(data: str | None = None) -> RunConfig:
    """The configuration of the 100K run, for the timed data."""
    return load_config(_CONFIG, [f"dataset_path={data or 'none.h5'}"])


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the command; returns rows, exponents and targets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rows", type=int, nargs="*", default=[1000, 10_000, 100_000], help="sizes of the synthetic matrices"
    )
    parser.add_argument(
        "--file-rows", type=int, nargs="*", default=[1000, 10_000], help="sizes of the files (64.5 KB per row)"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="of torch; default: torch's")
    parser.add_argument("--set-up-only", action="store_true", help="skip training and tokens of the matrices")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--budget", type=float, default=20.0, help="seconds for the repeats of a stage")
    parser.add_argument("--source", help="HDF5 file of operators to expand; default: simulated")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "spinlock_pipeline")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/pipeline.json")
    chosen = parser.parse_args(arguments)
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    rows: list[dict[str, Any]] = []
    device = resolve_device(chosen.device)
    watch = Stopwatch(device, chosen.repeats, chosen.budget)

    def save() -> dict[str, Any]:
        facts = {"exponents": growth(rows), "targets": targets(rows)}
        write(chosen.output, rows, device.type, **facts)
        return {"rows": rows, **facts}

    def emit(stage: str, count: int, took: dict[str, float], **facts: Any) -> None:
        rows.append({"stage": stage, "rows": count, **took, **facts, "load": os.getloadavg()[0]})
        line = f"{stage:14} {count:9,} rows {took['p50_us'] / 1e6:10.4f} s, {took['cpu_us'] / 1e6:10.4f} s CPU"
        print(line, flush=True)
        save()

    for count in chosen.rows:
        x, split = set_up(count, settings(), watch, emit)
        if not chosen.set_up_only:
            train_and_use(x, split, watch, emit)
    if chosen.file_rows:
        chosen.work.mkdir(parents=True, exist_ok=True)
        source = chosen.source or simulate_operators(chosen.work, 256)
        for count in chosen.file_rows:
            expand(source, chosen.work / str(count), count)
            data = str((chosen.work / str(count) / "part_*.h5").resolve())
            from_file(data, settings(data), watch, emit)
        rows += commands(data, chosen.repeats)
    result = save()
    print(report(result), flush=True)
    return result


def report(result: dict[str, Any]) -> str:
    """One line per exponent and target."""
    lines = [f"{s:14} ~ N^{e['all']:.2f} (N^{e['largest']:.2f} at the end)" for s, e in result["exponents"].items()]
    for target in result["targets"]:
        outcome = "met" if target["met"] else "MISSED"
        lines.append(f"{target['target']}: {target['measured']:.3g}, at most {target['limit']:g}: {outcome}")
    return "\n".join(lines)


@pytest.fixture(scope="module", params=[1000, 10_000])
def features(request: Any) -> Any:
    """Features and split of a small synthetic matrix."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return set_up(request.param, settings(), Stopwatch(device, 1, 0.0), lambda *_, **__: None)


def bench_set_up(benchmark: Any, features: Any) -> None:
    rows = len(features[0])
    watch = Stopwatch(torch.device("cpu"), 1, 0.0)
    benchmark.pedantic(lambda: set_up(rows, settings(), watch, lambda *_, **__: None), rounds=3, warmup_rounds=1)


def bench_epoch(benchmark: Any, features: Any) -> None:
    x, split = features
    device = "cuda" if torch.cuda.is_available() else "cpu"
    run = training_run(512, device=device, x=torch.from_numpy(x[split.train]))
    with dedicated_stream(run.device):
        one_epoch(run)
        benchmark.pedantic(lambda: one_epoch(run), rounds=3)


if __name__ == "__main__":
    main()
