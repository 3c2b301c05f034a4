"""What the full-size benchmark is made of, small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from helpers import ARCHITECTURE, FAMILIES, SUMMARY, TEMPORAL, write_dataset

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "source.h5", 40, seed=0)


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def together(paths: list[Path], name: str) -> np.ndarray[Any, Any]:
    parts = []
    for path in paths:
        with h5py.File(path) as file:
            parts.append(file[name][:])
    return np.concatenate(parts)


def test_an_expanded_set_does_not_depend_on_its_parts(source: Path, tmp_path: Path) -> None:
    from make_100k import expand

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
    from make_100k import expand

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
    from make_100k import expand

    path = tmp_path / "binary.h5"
    with h5py.File(path, "w") as file:
        file[ARCHITECTURE] = np.random.default_rng(0).integers(0, 2, (40, 3)).astype(np.float32)
    (made,) = expand(path, tmp_path / "set", 100, families=["architecture"], parts=1, workers=1)
    assert set(np.unique(together([made], ARCHITECTURE))) == {0.0, 1.0}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the profiler's
def test_the_full_run_measures_itself(source: Path, tmp_path: Path) -> None:
    from full_run import main

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
    from full_run import check_sane

    metrics = {"samples": 100, "epochs": 3, "val_rows": 10, "reconstruction_error": 0.3, "utilization": 0.5}
    history = [{"train_loss": loss} for loss in (3.0, 2.0, 1.0)]
    check_sane(metrics, history, 100, 3)
    with pytest.raises(AssertionError):
        check_sane({**metrics, **wrong}, history, 100, 3)
    with pytest.raises(AssertionError, match="rose"):
        check_sane(metrics, history[::-1], 100, 3)
