"""The benchmarks, small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from helpers import ARCHITECTURE, FAMILIES, SUMMARY, TEMPORAL, write_dataset

from spinlock_fast.benchmark import training_run
from spinlock_fast.config.loading import apply_overrides
from spinlock_fast.config.schema import RunConfig
from spinlock_fast.training.preparation import open_source, prepare


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "source.h5", 40, seed=0)


def together(paths: list[Path], name: str) -> np.ndarray[Any, Any]:
    parts = []
    for path in paths:
        with h5py.File(path) as file:
            parts.append(file[name][:])
    return np.concatenate(parts)


def test_an_expanded_set_does_not_depend_on_its_parts(source: Path, tmp_path: Path) -> None:
    from benchmarks.data.expand_dataset import expand

    one = expand(source, tmp_path / "one", 300, parts=1, workers=1)
    many = expand(source, tmp_path / "many", 300, parts=3, workers=2)
    other = expand(source, tmp_path / "other", 300, parts=1, workers=1, seed=1)
    assert len(many) == 3
    for name in FAMILIES.values():
        whole = together(one, name)
        assert whole.shape[0] == 300
        np.testing.assert_array_equal(together(many, name), whole)
        assert not np.array_equal(together(other, name), whole)


def test_an_expanded_set_keeps_layout_scales_and_gaps(source: Path, tmp_path: Path) -> None:
    from benchmarks.data.expand_dataset import expand

    (path,) = expand(source, tmp_path / "set", 200, parts=1, workers=1)
    with h5py.File(source) as old, h5py.File(path) as new:
        for name in (SUMMARY, TEMPORAL, ARCHITECTURE):
            a, b = old[name], new[name]
            assert b.chunks == (8, *a.shape[1:])
            assert (b.compression, b.compression_opts, b.shuffle) == ("gzip", 4, False)
            assert b.dtype == a.dtype
            follows = a[:][np.arange(200) % 40]
            np.testing.assert_array_equal(np.isnan(b[:]), np.isnan(follows))
        assert ((new[ARCHITECTURE][:] >= 0) & (new[ARCHITECTURE][:] <= 1)).all()
        a, b = old[SUMMARY][:, 1:12], new[SUMMARY][:, 1:12]
        np.testing.assert_allclose(np.nanstd(b, 0), np.nanstd(a, 0), rtol=0.35)
        assert len(np.unique(b[np.isfinite(b)])) > 1500  # no two rows alike


def test_columns_of_a_few_values_keep_them(tmp_path: Path) -> None:
    from benchmarks.data.expand_dataset import expand

    path = tmp_path / "binary.h5"
    with h5py.File(path, "w") as file:
        file[ARCHITECTURE] = np.random.default_rng(0).integers(0, 2, (40, 3)).astype(np.float32)
    (made,) = expand(path, tmp_path / "set", 100, families=["architecture"], parts=1, workers=1)
    assert set(np.unique(together([made], ARCHITECTURE))) == {0.0, 1.0}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the profiler's
def test_the_full_run_measures_itself(source: Path, tmp_path: Path) -> None:
    from benchmarks.training.full_run import main

    output = tmp_path / "result.json"
    sizes = ["--source", str(source), "--rows", "400", "--epochs", "3", "--device", "cpu"]
    main([*sizes, "--work", str(tmp_path / "work"), "--output", str(output), "--set", "training.batch_size=64"])
    result = json.loads(output.read_text())
    assert [run["caches"] for run in result["runs"]] == ["cold", "warm"]
    for run in result["runs"]:
        stages = run["seconds"]
        parts = sum(stages[name] for name in ("load_encode", "clean", "discover", "train"))
        assert parts <= stages["total"] < run["wall_seconds"]
        assert run["seconds_of_steps"] <= stages["train"]
    way = result["epoch"]["ways"]["one by one"]
    assert 0 < way["step_ms"]["p20"] <= way["step_ms"]["p50"] <= way["step_ms"]["p80"] <= way["epoch_ms"]["p80"]
    assert result["epoch"]["profile"]["top"][0]["share"] > 0
    assert {"torch", "python"} <= result["versions"].keys()


@pytest.mark.parametrize(
    "wrong", [{"samples": 99}, {"epochs": 2}, {"reconstruction_error": 1.5}, {"utilization": 0.0}, {"val_rows": 9}]
)
def test_a_run_that_did_something_else_is_not_timed(wrong: dict[str, Any]) -> None:
    from benchmarks.training.full_run import check_plausible

    metrics = {"samples": 100, "epochs": 30, "val_rows": 10, "reconstruction_error": 0.3, "utilization": 0.5}
    history = [{"train_loss": 1.0 / epoch} for epoch in range(1, 31)]
    check_plausible(metrics, history, 100, 30)
    with pytest.raises(AssertionError):
        check_plausible({**metrics, **wrong}, history, 100, 30)
    with pytest.raises(AssertionError, match="rose"):
        check_plausible(metrics, history[::-1], 100, 30)


def nothing(*_: Any, **__: Any) -> None:
    pass


def stopwatch() -> Any:
    from benchmarks.training.bench_pipeline import Stopwatch

    return Stopwatch(torch.device("cpu"), 1, 0.0)


def test_the_timed_stages_are_the_pipelines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.training import bench_pipeline

    raw = np.nan_to_num(bench_pipeline.raw_columns(600))
    monkeypatch.setattr(bench_pipeline, "raw_columns", lambda rows: raw.copy())
    path = tmp_path / "raw.h5"
    with h5py.File(path, "w") as file:
        file[ARCHITECTURE] = raw
    family = {"architecture": {"encoder": "IdentityEncoder", "encoder_params": {}}}
    config = RunConfig.model_validate({"dataset_path": str(path), "families": family})
    with open_source(config) as source:
        expected = prepare(source, config, torch.device("cpu"), bench_pipeline.SilentDisplay())
    x, split = bench_pipeline.set_up(600, config, stopwatch(), nothing)
    np.testing.assert_array_equal(x, expected.x)
    assert split.train.size == 540


def test_stages_that_give_something_else_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.training import bench_pipeline

    config = bench_pipeline.settings()
    stages: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(bench_pipeline, "find_categories", lambda x, *_: {"cluster_1": list(range(x.shape[1]))})
        with pytest.raises(AssertionError, match="categories"):
            bench_pipeline.set_up(600, config, stopwatch(), lambda stage, *_: stages.append(stage))
    assert stages == ["clean"]
    uncleaned = apply_overrides(config, {"feature_cleaning.deduplicate_threshold": 1.0})
    with pytest.raises(AssertionError, match="columns"):
        bench_pipeline.set_up(600, uncleaned, stopwatch(), nothing)


def test_tokens_are_checked_against_distances() -> None:
    from benchmarks.training.bench_pipeline import check_tokens

    run = training_run(64, [3, 5], 8)
    tokens = run.model.get_tokens(run.x_train[:64])
    check_tokens(run.model, run.x_train[:64], tokens)
    with pytest.raises(AssertionError, match="codebook 0"):
        check_tokens(run.model, run.x_train[:64], tokens.roll(1, 0))


def test_exponents_and_targets_of_the_pipeline() -> None:
    from benchmarks.training.bench_pipeline import growth, targets

    rows: list[dict[str, Any]] = [
        {"stage": stage, "rows": N, "p50_us": 8.0 * N}
        for stage in ("clean", "discover", "normalise")
        for N in (1000, 100_000)
    ]
    assert growth(rows)["discover"] == pytest.approx({"all": 1.0, "largest": 1.0})
    rows.append({"stage": "import spinlock_fast", "p50_us": 1e6, "ratio_to_torch": 1.3})
    rows.append({"stage": "--dry-run", "p50_us": 4.1e6})
    found = targets(rows)
    assert [row["met"] for row in found] == [True, False, False]
    assert found[0]["measured"] == pytest.approx(2.4)
    assert targets(rows[:5]) == []  # not all three stages at full size


def test_the_pipeline_benchmark_writes_what_it_measured(tmp_path: Path) -> None:
    from benchmarks.training.bench_pipeline import main

    output = tmp_path / "pipeline.json"
    main(["--rows", "600", "900", "--file-rows", "--repeats", "2", "--budget", "1", "--output", str(output)])
    result = json.loads(output.read_text())
    stages = ["clean", "discover", "normalise", "train_epoch", "validate", "tokenize"]
    assert [(row["stage"], row["rows"]) for row in result["rows"]] == [(s, N) for N in (600, 900) for s in stages]
    assert all(0 < row["p20_us"] <= row["p50_us"] <= row["p80_us"] for row in result["rows"])
    assert list(result["exponents"]) == stages
    assert {"device", "torch", "date", "commit", "load", "threads"} <= result["environment"].keys()


@pytest.mark.slow
def test_the_pipeline_benchmark_reads_files(source: Path, tmp_path: Path) -> None:
    from benchmarks.training.bench_pipeline import main

    work = ["--source", str(source), "--work", str(tmp_path), "--output", str(tmp_path / "pipeline.json")]
    result = main(["--rows", "--file-rows", "200", "--repeats", "1", *work])
    assert [row["stage"] for row in result["rows"]][:3] == ["load_encode", "tokenize_file", "import torch"]
    assert {target["target"][:9] for target in result["targets"]} == {"import sp", "--dry-run"}


@pytest.mark.filterwarnings("ignore")  # the profiler's
def test_the_scaling_benchmark_writes_what_it_measured(tmp_path: Path) -> None:
    from benchmarks.training.bench_scaling import main

    output = tmp_path / "scaling.json"
    axes = ["--axes", "batch", "quantizer codebooks", "quantizer rows"]
    main([*axes, "--most", "64", "--device", "cpu", "--steps", "3", "--output", str(output)])
    result = json.loads(output.read_text())
    sizes = [(row["axis"], row["size"]) for row in result["rows"]]
    assert sizes == [("batch", 64), *(("quantizer codebooks", G) for G in (3, 9, 33)), ("quantizer rows", 64)]
    assert all(0 < row["p20_us"] <= row["p50_us"] <= row["p80_us"] for row in result["rows"])
    assert {"time", "memory"} <= result["exponents"]["quantizer codebooks"].keys()
    latents = next(row for row in result["rows"] if row["axis"] == "quantizer rows")
    assert latents["peak_bytes"] >= latents["input_bytes"] == 4 * 64 * 564


def test_the_streaming_benchmark_compares_both_ways(tmp_path: Path) -> None:
    from benchmarks.training.streaming import main

    output = tmp_path / "streaming.json"
    main(["--device", "cpu", "--rows", "150", "--batches", "64", "--epochs", "1", "--output", str(output)])
    (row,) = json.loads(output.read_text())["rows"]
    assert row["steps"] == 3
    assert row["streamed_over_resident"] == pytest.approx(
        row["streamed_steps_per_second"] / row["resident_steps_per_second"]
    )


def test_rows_that_a_step_should_not_read_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.training.streaming import check_rows

    x = torch.randn(100, 8)
    run = training_run(32, [3, 5], 8, x=x, training__data_on_device="never")
    check_rows(run, x)
    begin = run.training_step.feed.begin_epoch
    monkeypatch.setattr(run.training_step.feed, "begin_epoch", lambda order, done: begin(order, done).roll(40))
    with pytest.raises(AssertionError, match="other rows"):
        check_rows(run, x)


@pytest.mark.filterwarnings("ignore")  # the profiler's
def test_a_quantizer_that_holds_n_by_k_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.training import bench_scaling

    monkeypatch.setattr(bench_scaling, "peak_memory", lambda run, device: 4 * 16_384 * 4096)
    with pytest.raises(AssertionError, match=r"matrix \[N, K\]"):
        bench_scaling.quantizer_codes(4096, torch.device("cpu"), 1)


@pytest.mark.filterwarnings("ignore")  # the profiler's
def test_peak_memory_counts_what_is_held_at_once() -> None:
    from benchmarks.common.timing import peak_memory

    def run() -> None:
        for _ in range(3):
            torch.empty(1 << 18).add(1.0)

    assert peak_memory(run, "cpu") == pytest.approx(2 * 4 << 18, abs=256)  # the profiler holds a few bytes, too


def test_exponents_are_slopes_of_logarithms() -> None:
    from benchmarks.common.timing import exponent

    assert exponent([1, 10, 100], [3.0, 3.0, 3.0]) == pytest.approx(0.0)
    assert exponent([1, 10, 100], [2.0, 200.0, 20_000.0]) == pytest.approx(2.0)


def test_without_dropout_trainer_and_baseline_learn_the_same(tmp_path: Path) -> None:
    from benchmarks.studies.equal_quality import compare, load_data, main, summary

    x = np.random.default_rng(0).normal(size=(80, 9)).astype(np.float32)
    x[:, 1::2] = x[:, 0:8:2] + 0.1 * x[:, 1::2]
    meta = {
        "group_indices": {"a": [0, 1, 2, 3], "b": [4, 5, 6, 7, 8]},
        "levels": {name: [{"latent_dim": 4, "num_tokens": 6}] for name in "ab"},
    }
    (tmp_path / "original_frames").mkdir()
    np.savez(tmp_path / "original_frames" / "seed7.npz", x=x, val_rows=np.arange(0, 80, 8), meta=json.dumps(meta))
    data = load_data(tmp_path, 7, torch.device("cpu"))
    assert (len(data.train), len(data.val)) == (70, 10)
    settings = {"model.dropout": 0.0, "training.batch_size": 32, "training.topo_samples": 20}
    found = compare(data, epochs=3, seed=0, settings=settings)
    # Adam's first steps make full steps of gradients that are nothing but rounding, so the two part slowly.
    assert found["error"] == pytest.approx(found["baseline_error"], rel=0.03)
    assert found["train_error"] == pytest.approx(found["baseline_train_error"], rel=0.03)
    assert found["error"] < 0.9 * found["error_at_start"]
    other = {**found, "error": found["error"] + 1.0}
    assert not summary([other, {**other, "error": other["error"] + 0.1}])["equal"]
    output = tmp_path / "equal.json"
    command = [str(tmp_path), "--frame", "7", "--epochs", "1", "--device", "cpu", "--output", str(output), "--seeds"]
    assert main([*command, "1"]) == 0
    before = json.loads(output.read_text())["runs"]
    assert main([*command, "1", "0"]) == 0
    after = json.loads(output.read_text())
    assert [row["seed"] for row in after["runs"]] == [0, 1]
    assert after["runs"][1:] == before  # not run again
    assert after["summary"] == summary(after["runs"])
    with pytest.raises(SystemExit, match="has epochs 1, not 2"):
        main([*command, "1", "--epochs", "2"])
