"""`analyze --conditions`: datasets and CSV columns named by the user."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from helpers import raises_one_line, write_dataset, write_shards
from planted import operators

from spinlock_fast import Tokenizer
from spinlock_fast.analysis.conditions import make_conditions
from spinlock_fast.analysis.named_conditions import add_named_conditions
from spinlock_fast.analysis.observations import Observations
from spinlock_fast.analyze import main as analyze_main
from spinlock_fast.data.feature_source import FeatureSource
from spinlock_fast.errors import DataError

ROWS = 160


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_dataset(tmp_path_factory.mktemp("data") / "operators.h5", ROWS, seed=3)
    rng = np.random.default_rng(0)
    with h5py.File(path, "r+") as file:
        behaviour = file["features/architecture/aggregated/features"][:]
        file["extra/regime"] = np.where(behaviour[:, 0] > 0.5, "fast", "slow").astype("S4")
        file["extra/speed"] = behaviour[:, 1]
        file["extra/count"] = rng.integers(0, 4, ROWS)
        file["extra/flag"] = rng.random(ROWS) < 0.5
        file["extra/pair"] = np.stack([behaviour[:, 2], np.zeros(ROWS)], 1)
        file["extra/pair"].attrs["feature_names"] = ["amplitude", "none"]
        file["extra/one"] = rng.random((ROWS, 1))
        file["extra/gaps"] = np.where(rng.random(ROWS) < 0.1, np.nan, behaviour[:, 3])
        file["extra/constant"] = np.ones(ROWS)
        file["extra/missing"] = np.full(ROWS, np.nan)
        file["extra/short"] = np.arange(ROWS - 1)
        file["extra/wide"] = rng.random((ROWS, 65))
        file["extra/cube"] = rng.random((ROWS, 2, 2))
        file["extra/complex"] = rng.random(ROWS) + 1j
    return path


def observed(data: Path, names: list[str], rows: int = ROWS) -> Observations:
    chosen = np.arange(0, ROWS, ROWS // rows)
    result = replace(operators(rows, seed=0), rows=chosen, parameters={}, labels={})
    with FeatureSource(str(data), {"summary": "features/summary/aggregated/features"}) as source:
        add_named_conditions(result, source, names)
    return result


def write_csv(path: Path, columns: dict[str, list[object]]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return path


def test_numbers_texts_and_vectors(data: Path) -> None:
    names = [f"extra/{name}" for name in ("regime", "speed", "count", "flag", "pair", "one", "gaps")]
    result = observed(data, [*names, "extra/speed"])
    assert list(result.labels) == ["extra/regime"]
    assert set(result.labels["extra/regime"]) == {"fast", "slow"}
    expected = ["extra/speed", "extra/count", "extra/flag", "extra/pair[amplitude]", "extra/one", "extra/gaps"]
    assert list(result.parameters) == expected
    assert result.notes == ["extra/pair[none] is the same for all operators"]
    conditions, _ = make_conditions(result, 5)
    levels = {condition.name: len(condition.levels) for condition in conditions}
    assert levels == dict(zip(expected, (5, 4, 2, 5, 5, 6), strict=True)) | {"extra/regime": 2}
    with h5py.File(data) as file:
        some = observed(data, ["extra/speed"], rows=20)
        assert np.allclose(some.parameters["extra/speed"], file["extra/speed"][::8])


def test_csv_columns(data: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    path = write_csv(
        tmp_path / "runs.csv",
        {
            "solver": list(rng.choice(["euler", "rk4, adaptive"], ROWS)),
            "nu": [f"{value:.3g}" if value > 0.1 else "" for value in rng.random(ROWS)],
            "a:b": list(range(ROWS)),
        },
    )
    result = observed(data, [f"{path}:solver", f"{path}:nu", f"{path}:a:b"][:2])
    assert set(result.labels["runs.csv:solver"]) == {"euler", "rk4, adaptive"}
    assert np.isnan(result.parameters["runs.csv:nu"]).any()
    for name, texts in (
        (f"{path}:sover", ["no column sover", "nearest is solver"]),
        (f"{path}", [f"{path}:COLUMN", "solver, nu, a:b"]),
        (f"{tmp_path}/none.csv:x", ["none.csv", "No such file"]),
    ):
        with raises_one_line(DataError, *texts):
            observed(data, [name])
    write_csv(path, {"x": list(range(ROWS - 1))})
    with raises_one_line(DataError, f"{path}:x", "159 rows", "160"):
        observed(data, [f"{path}:x"])
    path.write_text("x,y\n1,2\n3\n")
    with raises_one_line(DataError, "line 3 has 1 values", "2"):
        observed(data, [f"{path}:x"])
    path.write_bytes(b"x\n\xff\xfe\n")
    with raises_one_line(DataError, str(path), "UTF-8"):
        observed(data, [f"{path}:x"])
    path.write_text("x,x\n\n1,2\n")
    with raises_one_line(DataError, "2 columns are named x"):
        observed(data, [f"{path}:x"])
    path.write_text("")
    with raises_one_line(DataError, str(path), "empty"):
        observed(data, [f"{path}:x"])


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("extra/sped", ["no dataset extra/sped", "nearest is extra/speed"]),
        ("extra", ["is a group"]),
        ("extra/constant", ["extra/constant", "one value for all operators"]),
        ("extra/missing", ["extra/missing", "one value for all operators"]),
        ("extra/short", ["extra/short", "159 rows", "160"]),
        ("extra/wide", ["extra/wide", "65 values a row", "64"]),
        ("extra/cube", ["extra/cube", "[N] or [N, k]", "[160, 2, 2]"]),
        ("extra/complex", ["extra/complex", "numbers or texts", "complex"]),
    ],
)
def test_what_cannot_be_a_condition_is_named(data: Path, name: str, texts: list[str]) -> None:
    with raises_one_line(DataError, *texts):
        observed(data, [name])


def test_a_dataset_that_one_shard_lacks(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, [20, 20], seed=0)
    for i, shard in enumerate(shards):
        with h5py.File(shard, "r+") as file:
            file["extra/x" if i == 0 else "extra/y"] = np.arange(len(file["parameters/params"]))
    result = replace(operators(40, seed=0), rows=np.arange(40))
    with (
        FeatureSource([str(path) for path in shards], {"s": "features/summary/aggregated/features"}) as source,
        raises_one_line(DataError, str(shards[1]), "no dataset extra/x"),
    ):
        add_named_conditions(result, source, ["extra/x"])


def test_the_command_has_a_row_for_each_condition(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A condition that the tokens depend on is found, with the corrections of the built-in ones."""
    settings = {"num_epochs": 3, "batch_size": 64, "topo_samples": 64, "device": "cpu"}
    families = {"architecture": {"encoder": "IdentityEncoder"}}
    checkpoint = Tokenizer({"families": families}, settings).fit(data).save(tmp_path / "checkpoint")
    table = write_csv(tmp_path / "runs.csv", {"dice": list(np.random.default_rng(5).integers(0, 3, ROWS))})
    common = [str(checkpoint), str(data), "--device", "cpu", "--format", "csv", "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as end:
        analyze_main([*common, "--conditions", "extra/regime", "extra/speed", f"{table}:dice", "metadata/ic_types"])
    assert not end.value.code, capsys.readouterr().err
    with open(tmp_path / "out" / "associations.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    best = {
        name: min(float(row["q"]) for row in rows if row["condition"] == name)
        for name in {r["condition"] for r in rows}
    }
    assert best["extra/regime"] < 0.05
    assert best["extra/speed"] < 0.05
    assert best["runs.csv:dice"] > 0.05
    assert "metadata/ic_types" not in best
    assert "initial condition" in best
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert {"extra/regime", "extra/speed", "runs.csv:dice"} <= set(summary["conditions"])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        analyze_main([*common, "--conditions", "extra/sped"])
    assert end.value.code == 3
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert "nearest is extra/speed" in error
