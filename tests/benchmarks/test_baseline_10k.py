"""Schedules and seeds on SUMMARY alone and on all families, small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import write_dataset

from benchmarks.common.commands import ROOT
from benchmarks.studies.baseline_10k import main
from benchmarks.studies.sweep import lines_of


def test_each_schedule_has_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for shard in range(2):
        write_dataset(tmp_path / f"set_{shard}.h5", 60, seed=shard)
    output = tmp_path / "runs.jsonl"
    command = [str(tmp_path / "set_*.h5"), "--output", str(output), "--schedules", "1", "2", "--seeds", "0"]
    command += ["--set", "training.batch_size=64", "--set", "training.topo_samples=64", "--set", "device=cpu"]
    command += ["--set", "training.joint_search_epochs=1"]
    assert main([*command, "--families", "summary"]) == 0
    assert main(command) == 0  # the runs on summary are not repeated
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(row["families"], row["epochs"]) for row in rows] == [
        ("summary", 1),
        ("summary", 2),
        ("all", 1),
        ("all", 2),
    ]
    assert all(row["rows"] == 120 and row["val_rows"] == 12 for row in rows)
    assert rows[0]["columns"] < rows[2]["columns"]
    assert all(row["joint_error"] <= row["reconstruction_error"] for row in rows)
    assert capsys.readouterr().out.count(": features=") == 4
    assert rows[2]["prepare_seconds"] == rows[3]["prepare_seconds"]  # once for both
    committed = lines_of(ROOT / "benchmarks" / "results" / "study" / "baseline_5000_operators.jsonl")
    assert all(rows[0].keys() == row.keys() for row in committed)
