"""The curve of time to quality, and the checksums of data sets, small."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
from helpers import planted_matrix, write_dataset

from benchmarks.data import feature_checksums
from benchmarks.training import time_to_quality
from benchmarks.training.time_to_quality import load_frame, main, settings, summaries


def test_warm_up_is_at_most_half_of_the_schedule() -> None:
    warmups = [settings("ours", epochs, 0, 128, "cpu")["training.warmup_epochs"] for epochs in (2, 5, 20, 200)]
    assert warmups == [1, 2, 10, 10]
    assert "training.warmup_epochs" not in settings("original", 200, 0, 128, "cpu")


def test_every_schedule_is_a_run_and_finished_runs_are_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    meta = {
        "group_indices": {"a": list(range(6)), "b": list(range(6, 12))},
        "levels": {name: [{"num_tokens": 6, "latent_dim": 4}] for name in "ab"},
        "original": {"error_final": 0.5},
    }
    frame = tmp_path / "seed1.npz"
    np.savez(frame, x=planted_matrix(120, [6, 6], seed=0), val_rows=np.arange(0, 120, 10), meta=json.dumps(meta))
    assert load_frame(frame).original_error == 0.5
    output = tmp_path / "time.json"
    command = [str(frame), "--schedules", "1", "3", "--batch-size", "32", "--output", str(output), "--seeds", "0"]
    assert main(command) == 0
    found = json.loads(output.read_text())
    assert found["clock"] == "CPU seconds of one thread"
    rows = found["rows"]
    assert [(row["recipe"], row["epochs"]) for row in rows] == [
        (recipe, epochs) for recipe in ("ours", "original") for epochs in (1, 3)
    ]
    assert all(row["seconds"] > 0.0 and row["error_joint"] <= row["error"] for row in rows)
    assert main([*command[:-1], "0", "1"]) == 0
    more = json.loads(output.read_text())["rows"]
    assert more[:4] == rows
    assert len(more) == 8
    assert [row["seeds"] for row in summaries(more)] == [2] * 4
    monkeypatch.setattr(time_to_quality, "measure", None)  # finished runs are not repeated
    assert main(command) == 0
    pytest.importorskip("matplotlib", reason="pictures need matplotlib, which no other part of the project does")
    assert main([*command, "--plot", str(tmp_path / "time.png")]) == 0
    assert (tmp_path / "time.png").read_bytes()[1:4] == b"PNG"


def test_generated_rows_need_no_data(tmp_path: Path) -> None:
    output = tmp_path / "time.json"
    command = ["--synthetic", "200", "--schedules", "1", "--seeds", "0", "--recipes", "ours", "--output", str(output)]
    assert main(command) == 0
    (row,) = json.loads(output.read_text())["rows"]
    assert row["frame"] == "synthetic"
    assert row["original_error"] is None
    with pytest.raises(SystemExit):
        main(["--output", str(output)])


def test_checksums_depend_on_values_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = write_dataset(tmp_path / "whole.h5", 40, seed=0)
    parts = [tmp_path / "0.h5", tmp_path / "1.h5"]
    with h5py.File(whole) as source:
        names = feature_checksums.dataset_names(str(whole))
        for path, rows in zip(parts, (slice(0, 25), slice(25, 40)), strict=True):
            with h5py.File(path, "w") as file:
                for name in names:
                    file.create_dataset(name, data=source[name][rows], compression="gzip", chunks=True)

    def printed(*paths: Path) -> str:
        assert feature_checksums.main([str(path) for path in paths]) == 0
        return capsys.readouterr().out

    expected = printed(whole)
    assert len(expected.splitlines()) == len(names) >= 4
    assert printed(*parts) == expected
    assert printed(*parts[::-1]) != expected
    with h5py.File(parts[0], "r+") as file:
        file[names[0]][3] += 1.0
    assert printed(*parts).splitlines()[1:] == expected.splitlines()[1:]
    assert printed(*parts) != expected
