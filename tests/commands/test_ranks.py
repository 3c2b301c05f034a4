"""Commands run by several ranks give the results of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import yaml
from helpers import write_dataset
from processes import run_on_ranks

from spinlock_fast import Tokenizer
from spinlock_fast.analyze import main as analyze_main
from spinlock_fast.evaluate import main as evaluate_main
from spinlock_fast.tokenize import main as tokenize_main
from spinlock_fast.train import main as train_main

CONFIG: dict[str, Any] = {
    "device": "cpu",
    "families": {
        "summary": {"encoder": "MLPEncoder", "encoder_params": {"hidden_dims": [16], "output_dim": 12}},
        "architecture": {"encoder": "IdentityEncoder"},
    },
    "training": {"batch_size": 64, "topo_samples": 64, "num_epochs": 2, "orthogonality_target": 10.0},
    "logging": {"tensorboard": False},
}
BUDGET = ("--memory-budget", "60kB")  # blocks of 48 rows


def succeeds(main: Callable[[list[str]], None], *arguments: object) -> None:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    assert not end.value.code


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "operators.h5", 330, seed=3)


@pytest.fixture(scope="module")
def checkpoint(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run")
    (directory / "run.yaml").write_text(yaml.safe_dump(CONFIG))
    arguments = ("--quiet", "--set", f"dataset_path={data}", "--output", directory / "checkpoint")
    succeeds(train_main, directory / "run.yaml", *arguments)
    return directory / "checkpoint"


def commands(checkpoint: Path, data: Path, output: Path) -> list[tuple[str, list[object]]]:
    return [
        ("tokenize", [checkpoint, data, "--output", output / "tokens.h5", *BUDGET]),
        ("tokenize", [checkpoint, data, "--output", output / "scores.csv", "--scores", *BUDGET]),
        ("evaluate", [checkpoint, data, "--json", output / "metrics.json"]),
        ("analyze", [checkpoint, data, "--output", output / "tables", *BUDGET, "--format", "csv", "--queries", "9"]),
    ]


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_files_are_those_of_one_process(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    mains = {"tokenize": tokenize_main, "analyze": analyze_main, "evaluate": evaluate_main}
    for verb, arguments in commands(checkpoint, data, alone):
        succeeds(mains[verb], *arguments)
    ended = run_on_ranks(commands(checkpoint, data, together), 2, tmp_path)
    assert ended.statuses == [0, 0], ended.stderr
    assert ended.stdout.count("tokens: ") == 2
    expected, found = files(alone), files(together)
    assert found.keys() == expected.keys()
    for name in expected:
        if not name.endswith(".json"):
            assert found[name] == expected[name], name
    summaries = [json.loads(part["tables/summary.json"]) for part in (expected, found)]
    assert all(summary.pop("seconds") for summary in summaries)
    assert summaries[0] == summaries[1]
    assert_same_metrics(*(json.loads(part["metrics.json"]) for part in (found, expected)))


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["npy", "csv", "parquet"])
def test_token_files_of_every_format(ending: str, checkpoint: Path, data: Path, tmp_path: Path) -> None:
    alone, together = tmp_path / f"alone.{ending}", tmp_path / f"together.{ending}"
    succeeds(tokenize_main, checkpoint, data, "--output", alone, *BUDGET)
    ended = run_on_ranks([("tokenize", [checkpoint, data, "--output", together, *BUDGET])], 3, tmp_path)
    assert ended.statuses == [0, 0, 0], ended.stderr
    assert together.read_bytes() == alone.read_bytes()


def assert_same_metrics(found: Any, expected: Any) -> None:
    """Float32 results depend on the sizes of blocks."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert_same_metrics(found[name], value)
    elif isinstance(expected, list):
        for pair in zip(found, expected, strict=True):
            assert_same_metrics(*pair)
    else:
        assert found == (pytest.approx(expected, rel=1e-4) if isinstance(expected, float) else expected)


def test_fewer_rows_than_ranks(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    with h5py.File(write_dataset(tmp_path / "few.h5", 2, seed=3)) as file:
        assert file["features/summary/aggregated/features"].shape[0] == 2
    few = tmp_path / "few.h5"
    arguments = [checkpoint, few, "--output", tmp_path / "tokens.npy"]
    evaluate = [checkpoint, few, "--json", tmp_path / "metrics.json"]
    ended = run_on_ranks([("tokenize", arguments), ("evaluate", evaluate)], 3, tmp_path)
    assert ended.statuses == [0, 0, 0], ended.stderr
    np.testing.assert_array_equal(np.load(tmp_path / "tokens.npy"), Tokenizer.from_checkpoint(checkpoint).encode(few))
    assert json.loads((tmp_path / "metrics.json").read_text())["val_rows"] == 2


def test_an_error_of_one_rank_is_one_line(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    """An infinite value in the last rows, which rank 1 reads: the earlier file stays, nothing else is left."""
    damaged = tmp_path / "data.h5"
    damaged.write_bytes(data.read_bytes())
    with h5py.File(damaged, "r+") as file:
        file["features/architecture/aggregated/features"][320, 2] = np.inf
    output = tmp_path / "output"
    output.mkdir()
    (output / "tokens.csv").write_text("earlier")
    ended = run_on_ranks([("tokenize", [checkpoint, damaged, "--output", output / "tokens.csv", *BUDGET])], 2, tmp_path)
    assert ended.statuses[1] == 3
    assert ended.statuses[0] != 0
    lines = [line for line in ended.stderr.splitlines() if "samples" not in line]
    (line,) = [line for line in lines if "lost contact" not in line]
    assert line.startswith("error: rank 1: ")
    assert "row 320, position [2] is infinite" in line
    assert len(lines) <= 2
    assert [path.name for path in output.iterdir()] == ["tokens.csv"]
    assert (output / "tokens.csv").read_text() == "earlier"


@pytest.mark.slow
@pytest.mark.dist
def test_commands_are_started_by_torchrun(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    """One command that ends well, and one with an error before any rank works; `report` refuses several ranks."""
    tokens = tmp_path / "tokens.npy"
    ended = torchrun("tokenize", checkpoint, data, "--output", tokens, *BUDGET)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == f"tokens: {tokens} [330, {np.load(tokens).shape[1]}]\n"
    np.testing.assert_array_equal(np.load(tokens), Tokenizer.from_checkpoint(checkpoint).encode(data))
    ended = torchrun("analyze", checkpoint, tmp_path / "missing.h5", "--output", tmp_path / "tables")
    assert ended.returncode != 0
    lines = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert 1 <= len(lines) <= 2  # of rank 1 as well, if torchrun takes more than a second to end it
    assert all("missing.h5: no such file" in line for line in lines)
    ended = torchrun("report", checkpoint, "--output", tmp_path / "pictures")
    assert ended.returncode != 0
    assert "error: WORLD_SIZE is 2: this command runs in one process" in ended.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokens.npy"]


def torchrun(verb: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    line += ["-m", f"spinlock_fast.{verb}", *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(line, capture_output=True, text=True, timeout=300, env=environment)
