"""The command `ablate`: its results, how it continues, and its errors."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import h5py
import pytest
import yaml
from helpers import planted_matrix
from processes import forkserver

from spinlock_fast.ablate import main
from spinlock_fast.ablation.plan import Run
from spinlock_fast.checkpoints.directory import load_checkpoint
from spinlock_fast.train import main as train_main

CONFIG: dict[str, Any] = {
    "device": "cpu",
    "families": {"one": {"encoder": "IdentityEncoder"}, "two": {"encoder": "IdentityEncoder"}},
    "model": {"dropout": 0.0, "compression_ratios": "0.5:1"},
    "training": {"batch_size": 64, "topo_samples": 32, "num_epochs": 2, "num_categories_auto": 2},
    "logging": {"tensorboard": False, "level": "error"},
}


VARIANTS = ["--drop", "family:two", "--drop", "loss:vq", "--seeds", 2]


@pytest.fixture(scope="module", autouse=True)
def _server() -> None:
    """Starts the server of processes with what all tests preload, before the command starts it with less."""
    process = forkserver().Process(target=time.sleep, args=(0.0,))
    process.start()
    process.join()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    x = planted_matrix(200, [6, 6], seed=5)
    with h5py.File(directory / "data.h5", "w") as file:
        file["features/one/features"], file["features/two/features"] = x[:, :6], x[:, 6:]
    path = directory / "small.yaml"
    path.write_text(yaml.safe_dump({"dataset_path": str(directory / "data.h5"), **CONFIG}))
    return path


def ablate(*arguments: object) -> int:
    """Runs the command in this process; its exit status."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return int(end.value.code or 0)


def results(output: Path) -> list[dict[str, str]]:
    """The lines of results.csv, without what depends on time."""
    with (output / "results.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    return [{key: value for key, value in line.items() if key not in ("seconds", "date")} for line in lines]


def tables(output: Path) -> str:
    """The tables of ablation.md, without the date and the seconds, which are the last column of the first table."""
    text = re.sub(r"\d{4}-\d\d-\d\d", "", (output / "ablation.md").read_text(encoding="utf-8"))
    return re.sub(r"\| [\d.]+(?: ± [\d.]+)? \|\n", "|\n", text)


@pytest.fixture(scope="module")
def swept(config: Path) -> Path:
    """An uninterrupted sweep of three variants and two seeds."""
    output = config.with_name("swept")
    assert ablate(config, *VARIANTS, "--output", output) == 0
    return output


def test_results(swept: Path, config: Path, tmp_path: Path) -> None:
    lines = results(swept)
    assert [(line["variant"], line["seed"]) for line in lines] == [
        (variant, seed) for variant in ("base", "drop family:two", "drop loss:vq") for seed in ("42", "43")
    ]
    assert [line["features"] for line in lines] == ["12", "12", "6", "6", "12", "12"]
    assert "| `drop loss:vq` | 2 |" in (swept / "ablation.md").read_text(encoding="utf-8")
    assert sorted(path.name for path in swept.iterdir()) == ["ablation.md", "ablation.png", "results.csv", "runs"]
    files = [path for path in swept.glob("runs/*/*/*") if not path.name.startswith(".")]
    assert {path.name for path in files} == {"metrics.json", "run.json"}
    assert len(files) == 12
    # A run is what `train` gives with the same settings.
    with pytest.raises(SystemExit):
        train_main([str(config), "--quiet", "--set", "random_seed=43", "--output", str(tmp_path / "trained")])
    trained = json.loads((tmp_path / "trained" / "metrics.json").read_text())
    kept = json.loads((swept / "runs" / "base" / "seed-43" / "metrics.json").read_text())
    assert {**kept, "seconds": 0} == {**trained, "seconds": 0}


def test_features_are_encoded_once(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [config, "--drop", "family:one", "--levels", "1", "--drop", "loss:vq", "--base", "training.num_epochs=1"]
    assert ablate(*command, "--seeds", 1, "--jobs", 2, "--output", tmp_path) == 0
    assert sorted(re.findall(r"encoding the features of (\d) run", capsys.readouterr().err)) == ["1", "3"]


def test_finished_runs_are_not_repeated(
    swept: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swept = Path(shutil.copytree(swept, tmp_path / "copy"))
    before = {path: path.stat().st_mtime_ns for path in swept.glob("runs/*/*/*.json")}
    performed: list[Run] = []
    monkeypatch.setattr("spinlock_fast.commands.ablation.perform", lambda runs, *_: performed.extend(runs) or {})
    assert ablate(config, *VARIANTS, "--output", swept, "--quiet") == 0
    assert not performed
    assert {path: path.stat().st_mtime_ns for path in before} == before
    ablate(config, "--drop", "loss:vq", "--seeds", 3, "--output", swept, "--quiet")
    assert [run.seed for run in performed] == [44, 44]


def test_other_settings_or_data_are_refused(
    swept: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = [config, "--base", "training.num_epochs=3", "--drop", "loss:vq", "--output", swept]
    assert ablate(*changed) == 2
    assert "seed-42: holds a run with other settings" in capsys.readouterr().err
    with h5py.File(tmp_path / "data.h5", "w") as file:
        x = planted_matrix(200, [6, 6], seed=6)
        file["features/one/features"], file["features/two/features"] = x[:, :6], x[:, 6:]
    assert ablate(config, "--base", f"dataset_path={tmp_path}/data.h5", "--drop", "loss:vq", "--output", swept) == 2
    assert "on other data" in capsys.readouterr().err


def test_a_damaged_record_is_named(swept: Path, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = swept / "runs" / "base" / "seed-42" / "run.json"
    text = record.read_text()
    for damaged in ("", "[]", text[:40], text.replace("measures", "measure")):
        record.write_text(damaged)
        assert ablate(config, "--drop", "loss:vq", "--output", swept) == 3
        error = capsys.readouterr().err
        assert f"{record}: is not a record" in error
        assert error.count("\n") == 1
    record.write_text(text)


@pytest.mark.parametrize(
    ("kill_after", "number", "status"),
    [
        (2, signal.SIGKILL, -9),
        pytest.param(0, signal.SIGKILL, -9, marks=pytest.mark.slow),
        pytest.param(1, signal.SIGTERM, 143, marks=pytest.mark.slow),
    ],
)
def test_killed_and_started_again(
    swept: Path, config: Path, tmp_path: Path, kill_after: int, number: int, status: int
) -> None:
    """The table of a sweep that was killed is that of an unbroken one."""
    output = tmp_path / "killed"
    command = [config, *VARIANTS, "--jobs", 1, "--output", output]
    command = [str(word) for word in command]
    process = forkserver().Process(target=main, args=([*command, "--quiet"],))
    process.start()
    deadline = time.monotonic() + 60
    while len(list(output.glob("runs/*/*/run.json"))) < kill_after or not list(output.glob(".work/*/*.npy")):
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid or 0, number)
    process.join()
    assert process.exitcode == status
    done = {path: path.stat().st_mtime_ns for path in output.glob("runs/*/*/run.json")}
    assert kill_after <= len(done) < 6
    time.sleep(0.2)  # the worker ends
    assert ablate(*command, "--quiet") == 0
    assert results(output) == results(swept)
    assert tables(output) == tables(swept)
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert not (output / ".work").exists()


def test_a_failed_run_does_not_end_the_others(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    levels = '[{"num_tokens": 500, "latent_dim": 2}]'
    command = [config, "--set", f"model.levels={levels}", "--seeds", 1, "--output", tmp_path / "out"]
    assert ablate(*command) == 3
    captured = capsys.readouterr()
    assert "seed 42: 180 training rows are fewer than the 500 codes" in captured.err.splitlines()[-1]
    assert [line["variant"] for line in results(tmp_path / "out")] == ["base"]


@pytest.mark.slow
def test_shards_and_collect(swept: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "sharded"
    command = [config, *VARIANTS, "--output", output]
    for part in (1, 0):
        assert ablate(*command, "--shard", f"{part}/2") == 0
        assert f"shard {part}/2: 3 of 3 runs are finished" in capsys.readouterr().out
        assert not (output / "results.csv").exists()
    assert ablate("--collect", "--output", output) == 0
    assert results(output) == results(swept)
    assert "drop loss:vq" in capsys.readouterr().out
    assert ablate("--collect", "--output", tmp_path / "none") == 3
    assert "holds no finished run" in capsys.readouterr().err


@pytest.mark.slow
def test_kept_checkpoints(config: Path, tmp_path: Path) -> None:
    command = [config, "--set", "model.decay=0.9", "--seeds", 1, "--output", tmp_path, "--keep-checkpoints"]
    assert ablate(*command, "--quiet") == 0
    kept = tmp_path / "runs" / "model.decay=0.9" / "seed-42"
    assert load_checkpoint(kept).config.decay == 0.9
    assert (kept / "README.md").exists()


def test_dry_run_writes_nothing(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    assert ablate(config, "--drop", "family:one", "--levels", "1,2", "--seeds", 2, "--output", output, "--dry-run") == 0
    captured = capsys.readouterr()
    assert "6 runs of 3 variants" in captured.out
    assert "drop family:one: seeds 42, 43" in captured.out
    assert "features: encoded 4 times" in captured.out
    assert "levels=2: has the settings of another variant" in captured.err
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["--drop", "family:three"], 2, "--drop family:three: no such family; choose from one, two"),
        (["--drop", "loss:vqq"], 2, "did you mean vq?"),
        (["--set", "model.decya=0.9"], 2, "did you mean 'decay'"),
        (["--drop", "loss:vq", "--base", "dataset_path=missing.h5"], 3, "missing.h5"),
        (["--drop", "loss:vq", "--output", "/dev/null/x"], 4, "/dev/null/x"),
        (["--drop", "loss:vq", "--seeds", "0"], 2, "--seeds: expected a number"),
        (["--levels", "1,x"], 2, "--levels: expected a number"),
        (["--drop", "loss:vq", "--shard", "2/2"], 2, "--shard"),
        (["--collect", "--shard", "0/2"], 2, "leave out --shard"),
        ([], 2, "nothing to compare"),
    ],
)
def test_bad_input(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, text: str
) -> None:
    assert ablate(config, "--output", tmp_path / "out", *arguments) == status
    error = capsys.readouterr().err
    assert text in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
