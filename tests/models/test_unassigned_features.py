"""Features in no category, in every command that reads a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import yaml
from helpers import write_dataset

from spinlock_fast import Tokenizer, from_pretrained_codebook, load_checkpoint
from spinlock_fast.analyze import main as analyze_main
from spinlock_fast.checkpoints.directory import load_torch, save_torch
from spinlock_fast.convert import main as convert_main
from spinlock_fast.evaluate import main as evaluate_main
from spinlock_fast.report.__main__ import main as report_main
from spinlock_fast.tokenize import main as tokenize_main
from spinlock_fast.train import main as train_main

ENCODER = {"encoder": "MLPEncoder", "encoder_params": {"hidden_dims": [16], "output_dim": 12}}
FAMILIES = {"summary": ENCODER, "architecture": {"encoder": "IdentityEncoder"}}
TRAINING = {
    "batch_size": 64,
    "topo_samples": 64,
    "num_epochs": 3,
    "val_every_n_epochs": 1,
    "orthogonality_target": 10.0,
    "decoder_refit": 0.03,
}


def run(command: Callable[[list[str]], None], *arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        command([str(argument) for argument in arguments])
    return int(end.value.code or 0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "operators.h5", 160, seed=3)


def settings(directory: Path, data: Path, **model: Any) -> Path:
    """A configuration with two categories, without the features 0, 5 and 23."""
    members = [i for i in range(24) if i not in (0, 5, 23)]
    (directory / "map.json").write_text(json.dumps({"first": members[::2], "second": members[1::2]}))
    training = {**TRAINING, "category_mapping_file": str(directory / "map.json")}
    content = {"dataset_path": str(data), "device": "cpu", "families": FAMILIES, "training": training}
    path = directory / "run.yaml"
    path.write_text(yaml.safe_dump({**content, "model": model, "logging": {"tensorboard": False}}))
    return path


@pytest.fixture(scope="module")
def checkpoint(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run")
    config = settings(directory, data, unassigned_features="nearest", codebook_init="product", dropout=0.0)
    assert run(train_main, config, "--quiet", "--output", directory / "checkpoint") == 0
    return directory / "checkpoint"


def test_every_feature_is_read_and_reported(checkpoint: Path) -> None:
    model = load_checkpoint(checkpoint)
    metrics = json.loads((checkpoint / "metrics.json").read_text())
    assert metrics["features"] == model.config.input_dim == 24
    assert sum(category["features"] for category in metrics["categories"]) == 21
    names = Tokenizer.from_checkpoint(checkpoint).feature_names
    told = [name for category in metrics["categories"] for name in category["also_reads"]]
    assert sorted(told) == sorted(names[i] for i in (0, 5, 23))
    card = (checkpoint / "README.md").read_text()
    assert "# [N, 24], named by" in card
    assert "3 more of the features are in no category (" in card


def test_tokens_of_every_way_agree(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    assert run(tokenize_main, checkpoint, data, "--output", tmp_path / "tokens.h5", "--quiet") == 0
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    tokens = tokenizer.encode(data)
    with h5py.File(tmp_path / "tokens.h5") as file:
        assert np.array_equal(file["tokens"][:], tokens)
    x = np.concatenate([block for _, block in tokenizer.features_file(data)])
    changed = x.copy()
    changed[:, 5] = x[::-1, 5]
    model = tokenizer.model
    assert np.array_equal(model.get_tokens(torch.from_numpy(x)).numpy(), tokens)
    assert not np.array_equal(model.get_tokens(torch.from_numpy(changed)).numpy(), tokens)
    assert tokenizer.decode(tokens).shape == x.shape


def test_evaluation_counts_every_feature_alike(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    assert run(evaluate_main, checkpoint, data, "--rows", "all", "--json", tmp_path / "metrics.json", "--quiet") == 0
    found = json.loads((tmp_path / "metrics.json").read_text())
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    x = np.concatenate([block for _, block in tokenizer.features_file(data)])
    decoded = tokenizer.model.decode_from_tokens(torch.from_numpy(tokenizer.encode(data))).numpy()
    assert found["reconstruction_error"] == pytest.approx(float(np.square(decoded - x).mean()), rel=1e-5)
    assert [c["also_reads"] for c in found["categories"]] == [
        c["also_reads"] for c in json.loads((checkpoint / "metrics.json").read_text())["categories"]
    ]


@pytest.mark.slow  # all figures
def test_reports_are_made(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    assert run(report_main, checkpoint, "--data", data, "--output", tmp_path / "report", "--quiet") == 0
    assert {path.suffix for path in (tmp_path / "report").iterdir()} == {".html", ".png", ".svg"}


def test_tables_are_made(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    assert run(analyze_main, checkpoint, data, "--output", tmp_path / "tables", "--quiet", "--format", "csv") == 0
    assert (tmp_path / "tables" / "codes.csv").exists()


def test_codebooks_can_be_loaded_separately(checkpoint: Path) -> None:
    quantizer = from_pretrained_codebook(checkpoint)
    assert torch.equal(quantizer.embedding, load_checkpoint(checkpoint).quantizer.embedding)


def test_there_is_nothing_to_convert(checkpoint: Path, tmp_path: Path) -> None:
    assert run(convert_main, checkpoint, "--output", tmp_path / "converted") == 3


def test_earlier_checkpoint_gives_the_same_tokens(data: Path, tmp_path: Path) -> None:
    config = settings(tmp_path, data)
    assert run(train_main, config, "--quiet", "--output", tmp_path / "out") == 0
    tokens = Tokenizer.from_checkpoint(tmp_path / "out").encode(data)
    payload = load_torch(tmp_path / "out" / "best_model.pt")
    assert not [key for key in payload["model_state_dict"] if "input_" in key]
    assert payload["model_config"].pop("extra_inputs") == {}
    assert payload["model_config"].pop("unassigned_features") == "decoded"
    save_torch(tmp_path / "out" / "best_model.pt", payload)
    (tmp_path / "out" / "manifest.json").unlink()
    assert np.array_equal(Tokenizer.from_checkpoint(tmp_path / "out").encode(data), tokens)
