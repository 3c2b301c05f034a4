"""The command `analyze` and its files."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import yaml
from helpers import write_dataset, write_shards
from planted import operators
from rich.console import Console

from spinlock_fast import Tokenizer
from spinlock_fast.analysis import AnalysisConfig, analyze_observations, write_tables
from spinlock_fast.analysis.observations import collect_observations
from spinlock_fast.analysis.summary_text import (
    association_grid,
    code_lines,
    constant_codebooks,
    print_analysis,
    unused_codes,
)
from spinlock_fast.analyze import main as analyze_main
from spinlock_fast.commands.main import main as dispatch
from spinlock_fast.errors import ConfigError
from spinlock_fast.models.code_search import code_distances
from spinlock_fast.train import main as train_main

ENCODER = {"encoder": "MLPEncoder", "encoder_params": {"hidden_dims": [16], "output_dim": 12}}
CONFIG = {
    "device": "cpu",
    "families": {
        "summary": ENCODER,
        "temporal": {"encoder": "TemporalCNNEncoder", "encoder_params": {"embedding_dim": 8}},
        "architecture": {"encoder": "IdentityEncoder"},
    },
    "training": {"batch_size": 64, "topo_samples": 64, "num_epochs": 3, "orthogonality_target": 10.0},
    "logging": {"tensorboard": False},
}
TABLES = {
    "codes",
    "features",
    "samples",
    "associations",
    "lifts",
    "refinement",
    "cooccurrence",
    "neighbours",
    "agreement",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_dataset(tmp_path_factory.mktemp("data") / "operators.h5", 160, seed=3)
    with h5py.File(path, "r+") as file:
        file["parameters"].attrs["feature_names"] = [f"theta_{i}" for i in range(12)]
        file["features/temporal/features"].attrs["feature_names"] = [f"series_{i}" for i in range(7)]
        # One parameter that a family shows, so that there is something to find.
        file["parameters/params"][:, 3] = file["features/architecture/aggregated/features"][:, 0]
    return path


@pytest.fixture(scope="module")
def checkpoints(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("run")
    (folder / "run.yaml").write_text(yaml.safe_dump({**CONFIG, "dataset_path": str(data)}))
    for seed in (0, 1):
        arguments = [str(folder / "run.yaml"), "--quiet", "--set", f"random_seed={seed}"]
        assert run(train_main, *arguments, "--output", folder / str(seed)) == 0
    return [folder / "0", folder / "1"]


@pytest.fixture(autouse=True)
def _no_picture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One test draws the picture, which takes longer than the rest."""
    if request.node.name != "test_the_command_writes_every_table":
        monkeypatch.setattr("spinlock_fast.report.analysis_write._pictures", lambda analysis, output: [])


def run(command: object, *arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        command([str(argument) for argument in arguments])  # type: ignore[operator]
    return int(end.value.code or 0)


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_command_writes_every_table(
    checkpoints: list[Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pyarrow", reason="Parquet needs pyarrow, an optional extra")
    first, second = checkpoints
    assert run(analyze_main, first, data, "--output", tmp_path / "out", "--compare", second, "--device", "cpu") == 0
    expected = {f"{name}.{kind}" for name in TABLES | {"stability"} for kind in ("csv", "parquet")}
    expected |= {"summary.json", *(f"analysis.{kind}" for kind in ("md", "html", "png", "svg"))}
    assert {path.name for path in (tmp_path / "out").iterdir()} == expected
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    tokens = Tokenizer.from_checkpoint(first).encode(data)
    assert summary["operators"] == 160
    counts = rows(tmp_path / "out" / "codes.csv")
    assert [int(row["count"]) for row in counts if row["codebook"] == counts[0]["codebook"]] == np.bincount(
        tokens[:, 0], minlength=sum(row["codebook"] == counts[0]["codebook"] for row in counts)
    ).tolist()
    associations = rows(tmp_path / "out" / "associations.csv")
    best = max(associations, key=lambda row: float(row["ami"] or 0))
    assert best["condition"] == "theta_3"
    features = {row["feature"] for row in rows(tmp_path / "out" / "features.csv")}
    assert {"architecture::architecture_0", "summary: column 5", "temporal mean over time: series_6"} <= features
    assert "summary: column 0" not in features  # all NaN
    page = (tmp_path / "out" / "analysis.html").read_text(encoding="utf-8")
    assert "theta_3" in page
    assert 'src="data:image/png;base64,' in page
    text = capsys.readouterr().out
    assert "160 operators" in text
    assert "theta_3" in text
    assert str(tmp_path / "out") in text.replace("\n", "")


def test_parquet_holds_what_csv_holds(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="Parquet needs pyarrow, an optional extra")
    tables = analyze_observations(operators(60, seed=0), AnalysisConfig()).tables
    tables["codes"]["margin_median"][0] = np.nan
    written = write_tables(tables, tmp_path, ("csv", "parquet"))
    assert len(written) == 2 * len(tables)
    for name, table in tables.items():
        read = parquet.read_table(tmp_path / f"{name}.parquet").to_pydict()
        texts = rows(tmp_path / f"{name}.csv")
        assert "nan" not in (tmp_path / f"{name}.csv").read_text()
        for column, values in table.items():
            if values.dtype.kind == "f":
                np.testing.assert_array_equal(np.array(read[column], np.float64), values)
                in_text = np.array([float(row[column] or "nan") for row in texts])
                np.testing.assert_allclose(in_text, values, rtol=1e-5)
            else:
                assert read[column] == values.tolist()
                assert [row[column] for row in texts] == [str(value) for value in values.tolist()]


def test_without_pyarrow_csv_is_written_and_parquet_refused(
    checkpoints: list[Path],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "pyarrow"] + ["pyarrow"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match="pip install"):
        write_tables({}, tmp_path, ("parquet",))
    command = (analyze_main, checkpoints[0], data, "--output", tmp_path / "out", "--device", "cpu")
    assert run(*command, "--format", "parquet") == 2
    assert not (tmp_path / "out").exists()
    assert run(*command) == 0
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".csv", ".json", ".md", ".html"}
    assert "pip install" in capsys.readouterr().out


def test_distances_and_margins_are_those_of_every_code(checkpoints: list[Path], data: Path) -> None:
    tokenizer = Tokenizer.from_checkpoint(checkpoints[0])
    x = torch.from_numpy(np.concatenate([block for _, block in tokenizer.features_file(data)]))
    model = tokenizer.model
    tokens = model.get_tokens(x)
    with torch.no_grad():
        latents = model.encode(x)
    distance, margin = code_distances(latents, model.quantizer.embedding, tokens, model.quantizer.layout)
    for g in range(model.num_codebooks):
        part = latents[:, model.quantizer.layout.column_slice(g)].double()
        every = (part[:, None] - model.quantizer.codebook(g).double()).norm(dim=2).sort(1).values
        np.testing.assert_allclose(distance[:, g].numpy(), every[:, 0].detach().numpy(), rtol=1e-4)
        np.testing.assert_allclose(margin[:, g].numpy(), (every[:, 1] - every[:, 0]).detach().numpy(), atol=1e-4)


def test_larger_files_are_sampled_evenly(checkpoints: list[Path], data: Path) -> None:
    tokenizer = Tokenizer.from_checkpoint(checkpoints[0])
    whole, part = (
        collect_observations(tokenizer, data, most, budget) for most, budget in ((10**6, 10**8), (40, 350_000))
    )
    assert part.rows[[0, -1]].tolist() == [0, 159]
    assert len(part.rows) == 40
    assert part.notes == ["40 of 160 operators, evenly spaced, were analysed"]
    np.testing.assert_array_equal(part.tokens, whole.tokens[part.rows])
    np.testing.assert_allclose(part.measured, whole.measured[part.rows])
    np.testing.assert_array_equal(part.labels["noise regime"], whole.labels["noise regime"][part.rows])


def test_shards_are_one_data_set(checkpoints: list[Path], tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_checkpoint(checkpoints[0])
    one = collect_observations(tokenizer, write_dataset(tmp_path / "one.h5", 60, seed=8), 100, 10**8)
    write_shards(tmp_path / "parts", [25, 35], seed=8)
    many = collect_observations(tokenizer, str(tmp_path / "parts" / "*.h5"), 100, 10**8)
    np.testing.assert_array_equal(one.tokens, many.tokens)
    assert many.rows.tolist() == list(range(60))
    for name, values in one.labels.items():
        np.testing.assert_array_equal(values, many.labels[name])
    for name, numbers in one.parameters.items():
        np.testing.assert_array_equal(numbers, many.parameters[name])


def test_data_without_conditions_are_analysed(checkpoints: list[Path], tmp_path: Path) -> None:
    bare = write_dataset(tmp_path / "bare.h5", 40, seed=5, omit=("metadata", "parameters"))
    assert run(analyze_main, checkpoints[0], bare, "--output", tmp_path / "out", "--format", "csv", "--quiet") == 0
    names = {path.stem for path in (tmp_path / "out").iterdir()}
    assert names == TABLES - {"associations", "lifts", "agreement"} | {"summary", "analysis"}
    notes = json.loads((tmp_path / "out" / "summary.json").read_text())["notes"]
    assert "the data have no parameters/params" in notes


def test_mistakes_are_one_line(
    checkpoints: list[Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for status, arguments, text in [
        (2, (checkpoints[0], data, "--output", out, "--bins", 1), "--bins"),
        (2, (checkpoints[0], data, "--output", out, "--alpha", 2), "--alpha"),
        (2, (checkpoints[0], data, "--output", out, "--rows", 5), "--rows"),
        (2, (checkpoints[0], data, "--output", out, "--memory-budget", "much"), "--memory-budget"),
        (3, (checkpoints[0], tmp_path / "none.h5", "--output", out), "no such file"),
        (3, (tmp_path, data, "--output", out), "not the directory of a finished run"),
        (4, (checkpoints[0], data, "--output", data), "cannot be written"),
    ]:
        assert run(analyze_main, *arguments, "--quiet") == status
        error = capsys.readouterr().err
        assert text in error
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("path", "values", "text"),
    [
        ("metadata/ic_types", np.zeros(3), "has 3 rows, but the features have 160"),
        ("metadata/ic_types", np.zeros((160, 2)), "expected texts or numbers [N]"),
        ("parameters/params", np.zeros(160), "expected numbers [N, P]"),
        ("parameters/params", np.full((160, 2), b"x"), "expected numbers [N, P]"),
    ],
)
def test_conditions_of_another_shape_are_named(
    checkpoints: list[Path],
    data: Path,
    tmp_path: Path,
    path: str,
    values: np.ndarray,
    text: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wrong = tmp_path / "wrong.h5"
    wrong.write_bytes(data.read_bytes())
    with h5py.File(wrong, "r+") as file:
        del file[path]
        file[path] = values
    assert run(analyze_main, checkpoints[0], wrong, "--output", tmp_path / "out", "--quiet") == 3
    assert not (tmp_path / "out").exists()
    error = capsys.readouterr().err
    assert text in error
    assert path in error
    assert error.count("\n") == 1


def test_texts_of_fixed_length_are_texts(checkpoints: list[Path], data: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.h5"
    other.write_bytes(data.read_bytes())
    with h5py.File(other, "r+") as file:
        texts = file["metadata/ic_types"][:].astype("S8")
        del file["metadata/ic_types"]
        file["metadata/ic_types"] = texts
    tokenizer = Tokenizer.from_checkpoint(checkpoints[0])
    labels = [collect_observations(tokenizer, path, 200, 10**8).labels["initial condition"] for path in (data, other)]
    np.testing.assert_array_equal(*labels)


def test_one_category_of_one_level_is_analysed_and_summarised(tmp_path: Path) -> None:
    observed = operators(60, seed=0)
    codebooks = observed.codebooks
    one = replace(
        observed,
        codebooks=replace(
            codebooks,
            names=codebooks.names[:1],
            categories=codebooks.categories[:1],
            levels=[0],
            num_codes=codebooks.num_codes[:1],
            vectors=codebooks.vectors[:1],
        ),
        tokens=observed.tokens[:, :1],
        distance=observed.distance[:, :1],
        margin=observed.margin[:, :1],
        groups={"slow": observed.groups["slow"]},
    )
    found = analyze_observations(one, AnalysisConfig())
    assert "cooccurrence" not in found.tables
    console = Console(record=True, width=100)
    print_analysis(found, console)
    assert "new in" not in console.export_text()
    write_tables(found.tables, tmp_path, ("csv",))


def test_tables_without_a_row_are_written(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="Parquet needs pyarrow, an optional extra")
    tables = analyze_observations(operators(60, seed=0, dependent=False), AnalysisConfig()).tables
    assert len(tables["cooccurrence"]["q"]) == 0
    write_tables({"cooccurrence": tables["cooccurrence"]}, tmp_path, ("csv", "parquet"))
    assert (tmp_path / "cooccurrence.csv").read_text().count("\n") == 1


def test_the_dispatcher_knows_analyze(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        dispatch(["analyze", "--help"])
    assert end.value.code == 0
    assert "--compare" in capsys.readouterr().out


def test_summary_names_significant_and_other_conditions() -> None:
    tables = analyze_observations(operators(600, seed=0), AnalysisConfig()).tables
    found, not_found = association_grid(tables["associations"], 0.05)
    assert found["condition"].tolist() == ["step"]
    assert set(not_found["condition"]) == {"width", "depth", "initial condition", "noise regime"}
    (lines,) = code_lines(tables, 0.05)
    assert lines[0].startswith("slow/L")
    assert lines[1].startswith("step ")
    assert "family::feature_" in lines[2]
    codes = tables["codes"] | {"count": tables["codes"]["count"] * (tables["codes"]["code"] == 0)}
    assert constant_codebooks(codes) == sorted(set(codes["codebook"]))
    assert "5 of slow/L0" in unused_codes(codes)
