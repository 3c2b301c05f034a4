"""The command `monitor`: unchanged rows are stable, however few; changed ones are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import yaml
from helpers import ARCHITECTURE, SUMMARY, TEMPORAL, synthetic_arrays, write_arrays
from processes import run_on_ranks

from spinlock_fast import Tokenizer
from spinlock_fast.checkpoints.integrity import MANIFEST
from spinlock_fast.checkpoints.run_directory import REFERENCE
from spinlock_fast.drift import monitor
from spinlock_fast.drift.compare import read_reference
from spinlock_fast.drift.counts import DriftCounts, _count_block, count_rows
from spinlock_fast.drift.verdict import distance_growth, judge, population_stability, share_increase
from spinlock_fast.models.reference_statistics import normalized_bounds
from spinlock_fast.monitor import main as monitor_main
from spinlock_fast.train import main as train_main

SHAPE: dict[str, Any] = {"summary_width": 16, "temporal_shape": (16, 4), "architecture_width": 8}
CONFIG: dict[str, Any] = {
    "device": "cpu",
    "families": {
        "summary": {"encoder": "IdentityEncoder"},
        "temporal": {"encoder": "StatisticsEncoder"},
        "architecture": {"encoder": "IdentityEncoder"},
    },
    "model": {"group_hidden_dim": 16, "group_embedding_dim": 8},
    "training": {"batch_size": 128, "topo_samples": 64, "num_epochs": 5, "orthogonality_target": 10.0},
    "logging": {"tensorboard": False},
}
TRAINED, FRESH = 1200, 2400
Arrays = dict[str, np.ndarray[Any, Any]]


@pytest.fixture(scope="module")
def arrays() -> Arrays:
    arrays = synthetic_arrays(TRAINED + FRESH, seed=3, **SHAPE)
    return {name: arrays[name] for name in (SUMMARY, TEMPORAL, ARCHITECTURE)}


@pytest.fixture(scope="module")
def directory(arrays: Arrays, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("monitor")
    write(directory / "old.h5", arrays, slice(TRAINED))
    write(directory / "fresh.h5", arrays, slice(TRAINED, None))
    (directory / "run.yaml").write_text(yaml.safe_dump({"dataset_path": str(directory / "old.h5"), **CONFIG}))
    assert run(train_main, "--quiet", directory / "run.yaml", "--output", directory / "checkpoint") == 0
    return directory


def write(path: Path, arrays: Arrays, rows: Any, **changes: Any) -> Path:
    return write_arrays(path, {name: values[rows] for name, values in {**arrays, **changes}.items()}, chunk_rows=256)


def run(main: Any, *arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def verdict_of(directory: Path, tmp_path: Path, arrays: Arrays, rows: Any = slice(TRAINED, None)) -> dict[str, Any]:
    return monitor(directory / "checkpoint", write(tmp_path / "rows.h5", arrays, rows), device="cpu")


@pytest.mark.parametrize("size", [20, 200, 2000])
def test_unchanged_rows_are_stable(size: int, directory: Path) -> None:
    tokenizer = Tokenizer.from_checkpoint(directory / "checkpoint")
    reference = read_reference(directory / "checkpoint", tokenizer)
    x = tokenizer.features(directory / "fresh.h5")
    rng = np.random.default_rng(size)
    stable = []
    for _ in range(40):
        rows = np.sort(rng.choice(len(x), size, replace=False))
        stable.append(judge(counts_of(tokenizer, reference, x[rows]), reference)["verdict"] == "stable")
    assert np.mean(stable) >= 0.95


def counts_of(tokenizer: Tokenizer, reference: Any, x: Any) -> Any:
    counts = DriftCounts.zeros(reference)
    _count_block(counts, tokenizer, reference, x, normalized_bounds(tokenizer.cleaner, tokenizer.normalizer))
    return counts


def test_a_shifted_family_is_not_stable(directory: Path, arrays: Arrays, tmp_path: Path) -> None:
    shifted = arrays[SUMMARY] + np.nan_to_num(arrays[SUMMARY]).std(0)
    for rows, expected in ((slice(TRAINED, TRAINED + 60), {"watch", "drifted"}), (slice(TRAINED, None), {"drifted"})):
        result = verdict_of(directory, tmp_path, {**arrays, SUMMARY: shifted}, rows)
        assert result["verdict"] in expected
        changed = {entry["name"].split("::")[0] for entry in result["features"] if entry["status"] != "stable"}
        assert changed == {"summary"}


def test_another_range_of_parameters_is_not_stable(directory: Path, arrays: Arrays, tmp_path: Path) -> None:
    upper = TRAINED + np.flatnonzero(arrays[ARCHITECTURE][TRAINED:, 0] > 0.7)
    result = verdict_of(directory, tmp_path, arrays, upper)
    assert result["verdict"] == "drifted"
    assert any("use of codes" in entry["changed"] for entry in result["codebooks"])


def test_another_equation_is_not_stable(directory: Path, arrays: Arrays, tmp_path: Path) -> None:
    rng = np.random.default_rng(5)  # the same columns one by one, but independent of each other
    mixed = {name: values.copy() for name, values in arrays.items()}
    for name in (SUMMARY, ARCHITECTURE):
        for column in range(mixed[name].shape[1]):
            mixed[name][:, column] = mixed[name][rng.permutation(len(mixed[name])), column]
    result = verdict_of(directory, tmp_path, mixed)
    assert result["verdict"] == "drifted"
    assert all(entry["status"] == "stable" for entry in result["features"])
    assert any(entry["beyond"] > 0.1 for entry in result["codebooks"])


def test_missing_values_and_rows_without_a_family(directory: Path, arrays: Arrays, tmp_path: Path) -> None:
    summary = arrays[SUMMARY].copy()
    summary[TRAINED : TRAINED + 100] = np.nan
    result = verdict_of(directory, tmp_path, {**arrays, SUMMARY: summary})
    assert (result["rows"], result["rows_without_a_family"]) == (FRESH - 100, 100)
    assert result["verdict"] == "stable"
    summary[TRAINED:, 1::3] = np.nan
    result = verdict_of(directory, tmp_path, {**arrays, SUMMARY: summary})
    family = next(entry for entry in result["families"] if entry["name"] == "summary")
    assert family["status"] == "drifted"
    assert family["missing"] == pytest.approx(np.isnan(summary[TRAINED:]).mean())
    assert family["missing_in_training"] == pytest.approx(np.isnan(arrays[SUMMARY][:TRAINED]).mean())
    summary[:] = np.nan
    path = write(tmp_path / "empty.h5", {**arrays, SUMMARY: summary}, slice(TRAINED, None))
    assert run(monitor_main, directory / "checkpoint", path, "--quiet") == 3


def test_command_writes_its_result(directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [directory / "checkpoint", directory / "fresh.h5", "--output", tmp_path / "out", "--device", "cpu"]
    arguments += ["--json", tmp_path / "result.json", "--memory-budget", "300kB", "--fail-on", "watch"]
    assert run(monitor_main, *arguments) == 0
    assert capsys.readouterr().out.startswith(f"stable: {FRESH:,} rows against {TRAINED:,} of the run")
    assert (tmp_path / "out" / "drift.json").read_bytes() == (tmp_path / "result.json").read_bytes()
    assert (tmp_path / "out" / "drift.png").read_bytes().startswith(b"\x89PNG")


def test_fail_on(directory: Path, arrays: Arrays, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "shifted.h5", {**arrays, SUMMARY: 3.0 * arrays[SUMMARY]}, slice(TRAINED, None))
    assert run(monitor_main, directory / "checkpoint", path) == 0
    assert "drifted" in capsys.readouterr().out
    assert run(monitor_main, directory / "checkpoint", path, "--quiet", "--fail-on", "drifted") == 5
    error = capsys.readouterr().err
    assert error.startswith("error: verdict drifted: ")
    assert error.count("\n") == 1


def test_ranks_give_the_result_of_one_process(directory: Path, tmp_path: Path) -> None:
    common = [directory / "checkpoint", directory / "fresh.h5", "--memory-budget", "300kB", "--quiet", "--json"]
    assert run(monitor_main, *common, tmp_path / "alone.json") == 0
    reference = ["--reference", directory / "old.h5"]
    calls = [("monitor", [*common, tmp_path / "two.json"]), ("monitor", [*common, tmp_path / "ref.json", *reference])]
    ended = run_on_ranks(calls, 2, tmp_path)
    assert ended.statuses == [0, 0], ended.stderr
    alone, two, from_data = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("alone", "two", "ref"))
    assert_close(two, alone)
    assert_close(from_data, alone)


def assert_close(found: Any, expected: Any) -> None:
    """Equal but for float32 rounding of latents, which depends on the sizes of blocks."""
    for kind in ("features", "codebooks", "families"):
        for one, other in zip(found[kind], expected[kind], strict=True):
            assert (one["name"], one["status"]) == (other["name"], other["status"])
            for key in one.keys() & {"psi", "usage_psi", "distance_psi", "beyond", "clipped", "missing"}:
                assert one[key] == pytest.approx(other[key], abs=2e-3), (one["name"], key)
    assert found["rows"] == expected["rows"]


def test_the_reference_is_part_of_the_checkpoint(
    directory: Path, arrays: Arrays, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = directory / "checkpoint"
    assert REFERENCE in json.loads((checkpoint / MANIFEST).read_text())["files"]
    copy = Tokenizer.from_checkpoint(checkpoint).save(tmp_path / "copy")
    assert (copy / REFERENCE).read_bytes() == (checkpoint / REFERENCE).read_bytes()
    text = (copy / REFERENCE).read_text()
    for damaged in ("{", text.replace('"format":1', '"format":2'), text.replace("summary::", "other::")):
        (copy / REFERENCE).write_text(damaged)
        for manifest in (True, False):
            if not manifest:
                (copy / MANIFEST).unlink()
            assert run(monitor_main, copy, directory / "fresh.h5") == 3
            error = capsys.readouterr().err
            assert error.startswith(f"error: {copy / REFERENCE}: ")
            assert error.count("\n") == 1
        Tokenizer.from_checkpoint(checkpoint).save(copy)
    (copy / MANIFEST).unlink()
    (copy / REFERENCE).unlink()
    assert run(monitor_main, copy, directory / "fresh.h5") == 3
    assert "--reference" in capsys.readouterr().err
    assert run(monitor_main, copy, directory / "fresh.h5", "--reference", directory / "old.h5") == 0
    assert capsys.readouterr().out.startswith("stable")


def test_fitted_tokenizer_keeps_its_reference(arrays: Arrays, tmp_path: Path) -> None:
    settings = {f"training.{key}": value for key, value in CONFIG["training"].items()} | {"device": "cpu"}
    tokenizer = Tokenizer(**settings).fit(arrays[SUMMARY][:300]).save(tmp_path / "fitted")
    with h5py.File(tmp_path / "rows.h5", "w") as file:
        loaded = Tokenizer.from_checkpoint(tokenizer)
        file[loaded.families[0].dataset] = arrays[SUMMARY][300:500]
    assert monitor(tmp_path / "fitted", tmp_path / "rows.h5", device="cpu")["verdict"] == "stable"


def test_counts_do_not_depend_on_blocks(directory: Path) -> None:
    tokenizer = Tokenizer.from_checkpoint(directory / "checkpoint")
    reference = read_reference(directory / "checkpoint", tokenizer)
    large, small = (count_rows(tokenizer, reference, directory / "fresh.h5", budget) for budget in (10**8, 300_000))
    for name in ("rows", "features", "features_beyond", "clipped", "missing"):
        np.testing.assert_array_equal(getattr(large, name), getattr(small, name))


def test_stability_index_of_known_counts() -> None:
    psi, expected, change = population_stability(np.array([300, 100]), np.array([1000, 1000]), ordered=True)
    assert psi == pytest.approx((0.75 - 0.5) * np.log(0.75 / 0.5) + (0.25 - 0.5) * np.log(0.25 / 0.5), rel=0.01)
    assert expected == pytest.approx(1 / 400 + 1 / 2000)
    assert change.p_value < 1e-10
    assert population_stability(np.array([1, 0]), np.array([5, 5]), ordered=True)[2].p_value == 1.0
    rare = population_stability(np.array([0, 40, 0, 0]), np.array([5, 4000, 3, 0]), ordered=False)
    assert rare[2].p_value == 1.0  # the rare codes are merged


def test_smaller_distances_are_no_drift(directory: Path) -> None:
    assert monitor(directory / "checkpoint", directory / "old.h5", device="cpu")["verdict"] == "stable"
    reference, near = np.full(10, 5), np.array([300, 90, 40, 20, 15, 15, 10, 10, 6, 6])
    psi, _, change = distance_growth(near, reference)
    assert psi > 1.0
    assert change.status(0.01) == "stable"
    far, _, change = distance_growth(near[::-1], reference)
    assert far > 1.0
    assert change.status(0.01) == "drifted"


def test_increase_of_a_share() -> None:
    assert share_increase(0, 20, 10, 1000).p_value == 1.0
    assert share_increase(1, 20, 10, 1000).p_value > 0.1
    assert share_increase(10, 20, 10, 1000).p_value < 1e-10
    assert share_increase(10**6, 10**7, 10**6, 10**7).p_value == pytest.approx(0.5, abs=0.01)
