"""The command `search`: exact nearest rows by tokens and by latents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import yaml
from helpers import raises_one_line, write_dataset

from spinlock_fast import Tokenizer
from spinlock_fast.analysis import token_index
from spinlock_fast.analysis.neighbours import nearest_operators
from spinlock_fast.analysis.observations import read_codebooks
from spinlock_fast.analysis.search import nearest, parse_codes
from spinlock_fast.errors import ConfigError, DataError
from spinlock_fast.search import main as search_main
from spinlock_fast.tokenize import main as tokenize_main
from spinlock_fast.train import main as train_main

CONFIG: dict[str, Any] = {
    "device": "cpu",
    "families": {"summary": {"encoder": "IdentityEncoder"}},
    "model": {"group_hidden_dim": 16, "group_embedding_dim": 8},
    "training": {"batch_size": 64, "topo_samples": 32, "num_epochs": 2, "orthogonality_target": 10.0},
    "logging": {"tensorboard": False},
}


def run(main: Any, *arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("search")
    write_dataset(directory / "data.h5", 200, seed=3, summary_width=14)
    write_dataset(directory / "other.h5", 30, seed=4, summary_width=14)
    (directory / "run.yaml").write_text(yaml.safe_dump({"dataset_path": str(directory / "data.h5"), **CONFIG}))
    assert run(train_main, "--quiet", directory / "run.yaml", "--output", directory / "checkpoint") == 0
    for name in ("data", "other"):
        output = ("--output", directory / f"{name}_tokens.h5", "--quiet")
        assert run(tokenize_main, directory / "checkpoint", directory / f"{name}.h5", *output) == 0
    return directory


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer.from_checkpoint(directory / "checkpoint")


def test_by_tokens_distances_are_those_of_analyze(
    directory: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_index, "_ROWS_AT_ONCE", 64)
    tokens = np.asarray(tokenizer.encode(directory / "data.h5"))
    rows, distance = nearest_operators(read_codebooks(tokenizer), tokens, np.array([7]), 12)
    found = nearest(tokenizer, directory / "data_tokens.h5", 7, top=12)
    assert [entry["row"] for entry in found] == rows[0].tolist()
    np.testing.assert_allclose([entry["distance"] for entry in found], distance[0], rtol=1e-5)
    for entry in found:
        assert entry["tokens"] == tokens[entry["row"]].tolist()
        assert entry["equal_tokens"] == (tokens[entry["row"]] == tokens[7]).sum()


def test_a_row_of_another_file(directory: Path, tokenizer: Tokenizer) -> None:
    by_tokens = nearest(tokenizer, directory / "data_tokens.h5", (directory / "other_tokens.h5", 3))
    assert nearest(tokenizer, directory / "data_tokens.h5", (directory / "other.h5", 3)) == by_tokens
    itself = nearest(tokenizer, directory / "data_tokens.h5", (directory / "data.h5", 7), top=300)
    assert len(itself) == 200
    assert {"row": 7, "distance": 0.0}.items() <= next(entry for entry in itself if entry["row"] == 7).items()


def test_a_row_of_features_is_searched_as_the_index_was(
    directory: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    index, checkpoint, data = directory / "joint.h5", directory / "checkpoint", directory / "data.h5"
    joint = ("--search", "joint", "--sweeps", "3", "--search-weight", "0.01", "--perturbations", "2")
    assert run(tokenize_main, checkpoint, data, "--output", index, "--quiet", *joint) == 0
    with h5py.File(index) as file:
        assert (file["tokens"][:] != tokenizer.encode(data)).any()
        assert file["tokens"].attrs["search"] == "joint"
    itself = nearest(tokenizer, index, (data, 7), top=300)
    own = next(entry for entry in itself if entry["row"] == 7)
    assert (own["distance"], own["equal_tokens"]) == (0.0, tokenizer.model.num_codebooks)
    assert run(search_main, checkpoint, index, "--like", f"{directory / 'data_tokens.h5'}:7") == 3
    error = capsys.readouterr().err
    assert "--search nearest, but" in error
    assert "--search joint --sweeps 3 --search-weight 0.01 --perturbations 2: tokenize one of them again" in error
    with h5py.File(index, "r+") as file:
        file["tokens"].attrs["search"] = "best"
    with raises_one_line(DataError, "wrong attributes of the search"):
        nearest(tokenizer, index, 7)


def test_by_latents(directory: Path, tokenizer: Tokenizer) -> None:
    with torch.no_grad():
        latents = tokenizer.model.encode(torch.from_numpy(tokenizer.features(directory / "data.h5"))).double().numpy()
    squared, layout = np.zeros(200), tokenizer.model.quantizer.layout
    for g in range(layout.groups):
        part = latents[:, layout.column_slice(g)]
        pairs = np.square(part[:, None] - part).sum(2)
        squared += pairs[7] / pairs.mean() / layout.groups
    squared[7] = np.inf
    expected = np.argsort(squared)[:10]
    found = nearest(tokenizer, directory / "data.h5", 7, by="latents", memory_budget=20_000)
    assert [entry["row"] for entry in found] == expected.tolist()
    np.testing.assert_allclose([entry["distance"] for entry in found], np.sqrt(squared[expected]), rtol=1e-4)


def test_codes_of_some_codebooks(directory: Path, tokenizer: Tokenizer) -> None:
    tokens = np.asarray(tokenizer.encode(directory / "data.h5"))
    name, G = tokenizer.model.categories[0], tokenizer.model.num_codebooks
    code = int(np.bincount(tokens[:, 1]).argmax())
    short = name.replace("cluster_", "c")
    for text in (f"{name}/L1={code}", f"{name}=*/{code}", f"{short}=*/{code}", f"{short}/L1={code}"):
        assert parse_codes(tokenizer, [text]).tolist() == [-1, code, *[-1] * (G - 2)]
    found = nearest(tokenizer, directory / "data_tokens.h5", tokens=[f"{name}/L1={code}"], top=1000)
    same = np.flatnonzero(tokens[:, 1] == code)
    assert [entry["row"] for entry in found[: len(same)]] == same.tolist()
    assert {entry["distance"] for entry in found[: len(same)]} == {0.0}
    assert all(entry["distance"] > 0.0 and entry["equal_tokens"] == 0 for entry in found[len(same) :])


def test_command(directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [directory / "checkpoint", directory / "data_tokens.h5", "--like", "7", "--top", "3"]
    assert run(search_main, *arguments, "--json", tmp_path / "found.json") == 0
    lines = capsys.readouterr().out.splitlines()
    found = json.loads((tmp_path / "found.json").read_text())
    assert lines[0].split() == ["row", "distance", "equal", "tokens"]
    assert [int(line.split()[0]) for line in lines[1:4]] == [entry["row"] for entry in found["rows"]]
    assert found["query"] == {"like": 7, "tokens": None}
    assert run(search_main, *arguments[:2], "--token", "c1=0", "--top", "2") == 0
    assert "of 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["tokens", "--like", "200"], 2, "no row 200; rows are 0 to 199"),
        (["tokens", "--like", "-1"], 2, "ROW or FILE:ROW"),
        (["tokens", "--like", "x.h5:a"], 2, "ROW or FILE:ROW"),
        (["tokens", "--like", "missing.h5:1"], 3, "missing.h5"),
        (["tokens", "--like", "1", "--token", "c1=0"], 2, "not allowed with"),
        (["tokens"], 2, "required"),
        (["tokens", "--token", "c9=1"], 2, "no category or codebook 'cluster_9'"),
        (["tokens", "--token", "clusterr_1=1"], 2, "did you mean cluster_1"),
        (["tokens", "--token", "c1=999"], 2, "has the codes 0 to"),
        (["tokens", "--token", "c1=1/1/1/1/1/1/1"], 2, "levels"),
        (["tokens", "--token", "c1=*"], 2, "no code is given"),
        (["tokens", "--token", "c1=1", "c1/L0=2"], 2, "'c1/L0=2': cluster_1/L0 already has the code 1"),
        (["tokens", "--token", "c1"], 2, "no category or codebook"),
        (["data", "--like", "1"], 3, "no tokens there"),
        (["tables", "--like", "1"], 3, "tokens are searched in HDF5 files only"),
        (["tokens", "--like", "1", "--by", "latents"], 2, "holds tokens"),
        (["data", "--token", "c1=1", "--by", "latents"], 2, "search by tokens"),
    ],
)
def test_wrong_queries(
    arguments: list[str], status: int, text: str, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = directory / {"tokens": "data_tokens.h5", "data": "data.h5", "tables": "tokens.csv"}[arguments[0]]
    assert run(search_main, directory / "checkpoint", index, *arguments[1:]) == status
    error = capsys.readouterr().err
    assert text in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_arguments_from_python(directory: Path, tokenizer: Tokenizer) -> None:
    index = directory / "data_tokens.h5"
    expected = nearest(tokenizer, index, 5, top=2)
    assert nearest(tokenizer, index, np.int64(5), top=2) == expected  # type: ignore[arg-type]
    assert nearest(tokenizer, index, tokens="c1=0", top=2) == nearest(tokenizer, index, tokens=["c1=0"], top=2)
    wrong: dict[str, dict[str, Any]] = {"by: expected tokens or latents": {"by": "latent"}, "top: expected": {"top": 0}}
    for text, arguments in wrong.items():
        with raises_one_line(ConfigError, text):
            nearest(tokenizer, index, 5, **arguments)


def test_an_index_of_another_checkpoint_is_refused(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tokens.h5"
    path.write_bytes((directory / "data_tokens.h5").read_bytes())
    with h5py.File(path, "r+") as file:
        file["tokens"].attrs["checkpoint_sha256"] = "f" * 64
    assert run(search_main, directory / "checkpoint", path, "--like", "1") == 3
    assert "tokens of another checkpoint (ffffffffffff..." in capsys.readouterr().err
    other = directory / "data_tokens.h5"
    assert run(search_main, directory / "checkpoint", other, "--like", f"{path}:1") == 3
    path.write_bytes((directory / "data_tokens.h5").read_bytes())
    with h5py.File(path, "r+") as file:
        file["tokens"][5, 0] = 255
    assert run(search_main, directory / "checkpoint", path, "--like", "1") == 3
    assert "row 5, column 0: 255 is not a code" in capsys.readouterr().err
    path.write_bytes(b"not HDF5")
    assert run(search_main, directory / "checkpoint", path, "--like", "1") == 3
    assert capsys.readouterr().err.count("\n") == 1
