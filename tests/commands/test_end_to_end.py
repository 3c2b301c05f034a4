"""The commands end to end, on small synthetic files."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from helpers import (
    ARCHITECTURE,
    SUMMARY,
    TEMPORAL,
    TRAJECTORIES,
    raises_one_line,
    synthetic_arrays,
    write_arrays,
    write_dataset,
    write_shards,
)
from processes import forkserver

from spinlock_fast import Tokenizer, load_checkpoint
from spinlock_fast.analyze import main as analyze_main
from spinlock_fast.checkpoints.directory import FILES, RESUME, load_run_config, load_torch
from spinlock_fast.checkpoints.integrity import STATES
from spinlock_fast.checkpoints.run_directory import LOGS, PARTIAL, VOCABULARY
from spinlock_fast.commands.tokenize import write_tokens
from spinlock_fast.config.loading import load_config
from spinlock_fast.config.schema import DEFAULT_DATASETS
from spinlock_fast.errors import DataError
from spinlock_fast.evaluate import main as evaluate_main
from spinlock_fast.tokenize import main as tokenize_main
from spinlock_fast.train import main as train_main

ROOT = Path(__file__).parents[2]
FAMILIES = (SUMMARY, TEMPORAL, ARCHITECTURE)
ENCODER = {"encoder": "MLPEncoder", "encoder_params": {"hidden_dims": [16], "output_dim": 12}}
CONFIG: dict[str, Any] = {
    "device": "cpu",
    "families": {
        "summary": ENCODER,
        "temporal": {"encoder": "TemporalCNNEncoder", "encoder_params": {"embedding_dim": 8}},
        "architecture": {"encoder": "IdentityEncoder"},
    },
    "training": {
        "batch_size": 64,
        "topo_samples": 64,
        "num_epochs": 3,
        "val_every_n_epochs": 1,
        "orthogonality_target": 10.0,
    },
    "logging": {"tensorboard": False},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "operators.h5", 160, seed=3)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "run.yaml"
    path.write_text(yaml.safe_dump(CONFIG, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def checkpoint(data: Path, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("run") / "checkpoint"
    with pytest.raises(SystemExit) as end:
        train_main([str(config), "--quiet", "--set", f"dataset_path={data}", "--output", str(output)])
    assert end.value.code == 0
    return output


def run(command: Callable[[list[str]], None], *arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        command([str(argument) for argument in arguments])
    return int(end.value.code or 0)


def test_run_writes_every_file(checkpoint: Path) -> None:
    assert {path.name for path in checkpoint.iterdir()} == set(FILES) - {*STATES, *LOGS, VOCABULARY}


def test_model_files_have_every_entry(checkpoint: Path) -> None:
    for name in ("best_model.pt", "final_model.pt"):
        payload = torch.load(checkpoint / name, weights_only=True)
        for key in ("model_state_dict", "model_config", "encoder_state_dicts", "feature_mask", "feature_cleaning"):
            assert key in payload
        assert payload["feature_mask"].dtype == torch.bool
        assert payload["feature_mask"].numel() == 12 + 8 + 12
    assert payload["run_state"]["run"]["optimizer_state_dict"]["state"]


def test_safetensors_hold_the_best_model(checkpoint: Path) -> None:
    from safetensors.torch import load_file

    best = torch.load(checkpoint / "best_model.pt", weights_only=True)["model_state_dict"]
    tensors = load_file(checkpoint / "model.safetensors")
    assert tensors.keys() == best.keys()
    assert all(torch.equal(tensors[key], best[key]) for key in best)


def test_metrics_hold_every_key_of_the_specification(checkpoint: Path) -> None:
    metrics = json.loads((checkpoint / "metrics.json").read_text())
    keys = """quality reconstruction_error utilization perplexity perplexity_over_k category_correlation_max val_rows
    val_loss topo_pre topo_post parameters epochs total_codes active_codes categories seconds samples backend device
    versions"""
    assert set(keys.split()) <= metrics.keys()
    assert {"load_encode", "clean", "discover", "train", "total"} <= metrics["seconds"].keys()
    for category in metrics["categories"]:
        expected = {"name", "features", "families", "mse", "partial_mse", "utilization", "perplexity", "codes", "dims"}
        assert expected <= category.keys()
        assert sum(category["families"].values()) == category["features"]
    assert metrics["samples"] == 160
    assert metrics["val_rows"] == 16


def test_normalization_stats_have_an_entry_per_category(checkpoint: Path) -> None:
    names = [c["name"] for c in json.loads((checkpoint / "metrics.json").read_text())["categories"]]
    with np.load(checkpoint / "normalization_stats.npz", allow_pickle=False) as arrays:
        assert set(arrays) == {f"{n}_{kind}" for n in names for kind in ("mean", "std")} | {"_normalization_method"}


def test_the_written_configuration_loads_again(checkpoint: Path, data: Path) -> None:
    config = load_config(checkpoint / "config.yaml")
    assert config.dataset_path == str(data)
    assert config.output_dir == str(checkpoint)
    assert config.training.num_epochs == 3


def test_features_of_training_rows_are_normalised(checkpoint: Path, data: Path) -> None:
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    x = np.concatenate([block for _, block in tokenizer.features_file(data)])
    assert np.isfinite(x).all()
    assert np.abs(x.mean(0)).max() < 0.5
    assert np.abs(x.std(0) - 1).max() < 0.6


def test_tokens_from_file_arrays_and_model_agree(checkpoint: Path, data: Path) -> None:
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    with h5py.File(data) as file:
        raw = {name: file[path][:] for name, path in zip(CONFIG["families"], FAMILIES, strict=True)}
    from_file = tokenizer.encode(str(data))
    from_arrays = tokenizer.encode(raw)
    assert from_file.dtype == np.int64
    assert np.array_equal(from_file, from_arrays)
    from_torch = tokenizer.encode({name: torch.from_numpy(array) for name, array in raw.items()})
    assert isinstance(from_torch, torch.Tensor)
    assert np.array_equal(from_torch.numpy(), from_arrays)
    model = load_checkpoint(checkpoint)
    assert np.array_equal(model.get_tokens(torch.from_numpy(tokenizer.features(raw))).numpy(), from_arrays)


def test_decoding_returns_features_in_their_units(checkpoint: Path, data: Path) -> None:
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    tokens = tokenizer.encode(data)
    features = tokenizer.decode(tokens)
    assert features.shape == (160, len(tokenizer.feature_names))
    x = np.concatenate([block for _, block in tokenizer.features_file(data)])
    true = tokenizer.normalizer.inverse(x)
    assert np.mean((features - true) ** 2 / tokenizer.normalizer.scale**2) < 1.0
    with pytest.raises(IndexError, match="codebook 0"):
        tokenizer.decode(tokens + 1000)


def test_tokenize_writes_the_narrowest_integers(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "tokens.h5"
    assert run(tokenize_main, checkpoint, data, "--output", output, "--quiet", "--memory-budget", "1MB") == 0
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    with h5py.File(output) as file:
        tokens = file["tokens"]
        assert tokens.dtype == np.uint8
        assert np.array_equal(tokens[:], tokenizer.encode(data))
        assert list(tokens.attrs["codebook_names"]) == tokenizer.model.codebook_names
        assert tuple(tokens.attrs["codebook_sizes"]) == tokenizer.model.quantizer.num_codes
        assert len(tokens.attrs["checkpoint_sha256"]) == 64
    assert [path.name for path in tmp_path.iterdir()] == ["tokens.h5"]


@pytest.mark.parametrize("search", ["nearest", "joint"])
def test_scores_are_distances_and_margins(search: str, checkpoint: Path, data: Path, tmp_path: Path) -> None:
    tables = {}
    for name in ("t.h5", "t.parquet", "t.csv"):
        arguments = (checkpoint, data, "--output", tmp_path / name, "--scores", "--search", search, "--quiet")
        assert run(tokenize_main, *arguments, "--memory-budget", "1MB") == 0
        tables[name] = tmp_path / name
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    quantizer = tokenizer.model.quantizer
    with torch.no_grad():
        latents = tokenizer.model.encode(torch.from_numpy(tokenizer.features(data)))
    with h5py.File(tables["t.h5"]) as file:
        tokens, distance, margin = (file[dataset][:] for dataset in ("tokens", "distance", "margin"))
    assert distance.dtype == margin.dtype == np.float32
    np.testing.assert_array_equal(tokens, tokenizer.encode(data, search=search))
    for g in range(quantizer.layout.groups):
        codes = quantizer.codebook(g)
        every = (latents[:, quantizer.layout.column_slice(g)][:, None].double() - codes.double()).norm(dim=2).numpy()
        chosen = every[np.arange(len(tokens)), tokens[:, g]]
        every[np.arange(len(tokens)), tokens[:, g]] = np.inf
        np.testing.assert_allclose(distance[:, g], chosen, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(margin[:, g], every.min(1) - chosen, atol=1e-4)
    assert ((margin < -1e-4).any()) == (search == "joint")
    expected = np.hstack([tokens, distance, margin])
    names = tokenizer.model.codebook_names
    names = [*names, *(f"{name}/{score}" for score in ("distance", "margin") for name in names)]
    table = pq.read_table(tables["t.parquet"])
    assert table.column_names == names
    np.testing.assert_array_equal(np.stack([column.to_numpy() for column in table.columns], 1), expected)
    assert tables["t.csv"].read_text().splitlines()[0] == ",".join(names)
    np.testing.assert_array_equal(np.loadtxt(tables["t.csv"], np.float32, delimiter=",", skiprows=1), expected)


def test_scores_need_a_format_of_columns(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tokenize_main, checkpoint, data, "--output", tmp_path / "t.npy", "--scores") == 2
    assert "t.npy: a .npy file holds one array, no scores" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_tokenize_by_joint_search(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, measured = tmp_path / "tokens.npy", tmp_path / "metrics.json"
    options = ("--search", "joint", "--sweeps", "3", "--perturbations", "2")
    assert run(tokenize_main, checkpoint, data, "--output", output, "--quiet", *options) == 0
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    x, tokens = tokenizer.features(data), np.load(output)
    assert np.array_equal(tokens, tokenizer.encode(data, search="joint", sweeps=3, perturbations=2))

    def error(tokens: np.ndarray) -> np.ndarray:
        return np.square(tokenizer.model.decode_from_tokens(tokens).numpy() - x).mean(1)

    nearest = error(tokenizer.encode(data))
    assert (error(tokens) <= nearest + 1e-6).all()
    assert error(tokens).mean() < nearest.mean()
    assert run(evaluate_main, checkpoint, data, "--rows", "all", "--json", measured) == 0
    assert "with joint search" in capsys.readouterr().out
    metrics = json.loads(measured.read_text())
    perturbed = metrics["joint"]["perturbed"]
    assert perturbed["reconstruction_error"] <= metrics["joint"]["reconstruction_error"]
    assert metrics["joint"]["reconstruction_error"] < metrics["reconstruction_error"]
    for options in (("--search", "best"), ("--sweeps", "0"), ("--perturbations", "-1"), ("--perturbations", "8")):
        assert run(tokenize_main, checkpoint, data, "--output", output, *options) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("ending", ["csv", "npy", "parquet"])
def test_tokenize_writes_the_format_of_the_ending(checkpoint: Path, data: Path, tmp_path: Path, ending: str) -> None:
    output = tmp_path / f"tokens.{ending}"
    assert run(tokenize_main, checkpoint, data, "--output", output, "--quiet", "--memory-budget", "1MB") == 0
    read = {
        "csv": lambda: np.loadtxt(output, np.int64, delimiter=",", skiprows=1),
        "npy": lambda: np.load(output),
        "parquet": lambda: np.stack([column.to_numpy() for column in pq.read_table(output).columns], 1),
    }[ending]
    assert np.array_equal(read(), Tokenizer.from_checkpoint(checkpoint).encode(data))


def test_tokenize_refuses_to_overwrite_its_input(
    checkpoint: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = data.read_bytes()
    assert run(tokenize_main, checkpoint, data, "--output", data, "--quiet") == 4
    assert data.read_bytes() == before


def evaluated(checkpoint: Path, data: object, tmp_path: Path, *options: str) -> dict[str, Any]:
    output = tmp_path / "metrics.json"
    assert run(evaluate_main, checkpoint, data, "--json", output, "--quiet", "--device", "cpu", *options) == 0
    metrics: dict[str, Any] = json.loads(output.read_text())
    assert 0 <= metrics["quality"] <= 1
    return metrics


def test_evaluate_measures_the_held_out_rows_of_the_run(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    run_metrics = json.loads((checkpoint / "metrics.json").read_text())
    held_out = evaluated(checkpoint, data, tmp_path)
    assert held_out["rows"] == run_metrics["rows"] == "heldout"
    assert held_out["val_rows"] == 16
    assert held_out["reconstruction_error"] == pytest.approx(run_metrics["reconstruction_error"], rel=1e-5)
    assert held_out["val_loss"] == pytest.approx(run_metrics["val_loss"], rel=1e-5)
    everything = evaluated(checkpoint, data, tmp_path, "--rows", "all")
    assert everything["rows"] == "all"
    assert everything["val_rows"] == everything["samples"] == 160
    assert everything["trained_rows"] == 144
    train = evaluated(checkpoint, data, tmp_path, "--rows", "train")
    errors = 16 * held_out["reconstruction_error"] + 144 * train["reconstruction_error"]
    assert everything["reconstruction_error"] == pytest.approx(errors / 160, rel=1e-5)


def test_evaluate_recognises_training_rows_in_other_files(checkpoint: Path, tmp_path: Path) -> None:
    """Rows in another order, in shards and among new rows: those not trained on are measured."""
    arrays = synthetic_arrays(160, seed=3)
    order = np.random.default_rng(0).permutation(160)
    for i, rows in enumerate((order[:100], order[100:])):
        write_arrays(tmp_path / f"own_{i}.h5", {name: values[rows] for name, values in arrays.items()})
    shuffled = evaluated(checkpoint, tmp_path / "own_*.h5", tmp_path)
    expected = json.loads((checkpoint / "metrics.json").read_text())["reconstruction_error"]
    assert (shuffled["rows"], shuffled["val_rows"]) == ("heldout", 16)
    assert shuffled["reconstruction_error"] == pytest.approx(expected, rel=1e-4)
    new = write_dataset(tmp_path / "new.h5", 30, seed=4)
    mixed = evaluated(checkpoint, tmp_path / "*.h5", tmp_path)
    assert (mixed["rows"], mixed["val_rows"], mixed["trained_rows"]) == ("heldout", 46, 144)
    alone = evaluated(checkpoint, new, tmp_path)
    assert (alone["rows"], alone["val_rows"], alone["trained_rows"]) == ("all", 30, 0)
    assert run(evaluate_main, checkpoint, new, "--rows", "test", "--quiet") == 3


def test_evaluate_reports_the_measured_rows(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(evaluate_main, checkpoint, data) == 0
    shown = capsys.readouterr()
    assert "Measured on 16 held-out samples" in shown.out
    assert "far outside" not in shown.err
    assert run(evaluate_main, checkpoint, data, "--rows", "all") == 0
    assert "Measured on all 160 samples, 144 of them training samples" in shown_text(capsys)


def shown_text(capsys: pytest.CaptureFixture[str]) -> str:
    """The printed text without line breaks."""
    shown = capsys.readouterr()
    return " ".join((shown.out + shown.err).split())


def checkpoint_before_known_rows(checkpoint: Path, directory: Path) -> Path:
    """A checkpoint in the format before `known_rows`, `training_range` and `nan_fill`."""
    shutil.copytree(checkpoint, directory)
    payload = torch.load(checkpoint / "best_model.pt", weights_only=True)
    for key in ("known_rows", "training_range", "code_usage"):
        payload.pop(key, None)
    for family in payload["encoder_state_dicts"].values():
        family.pop("fill", None)
    torch.save(payload, directory / "best_model.pt")
    (directory / "manifest.json").unlink()
    text = (directory / "config.yaml").read_text()
    (directory / "config.yaml").write_text(re.sub(r" +nan_fill: .*\n", "", text))
    return directory


def test_checkpoint_without_known_rows_warns(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    older = checkpoint_before_known_rows(checkpoint, tmp_path / "older")
    metrics = evaluated(older, data, tmp_path)
    assert (metrics["rows"], metrics["val_rows"], metrics["trained_rows"]) == ("all", 160, None)
    assert run(evaluate_main, older, data) == 0
    assert "does not say which rows it was trained on" in shown_text(capsys)
    assert run(evaluate_main, older, data, "--rows", "heldout") == 3
    tokenizer = Tokenizer.from_checkpoint(older)
    with h5py.File(data) as file:
        raw = {name: file[path][:] for name, path in zip(CONFIG["families"], FAMILIES, strict=True)}
    zeros = {name: np.nan_to_num(values) for name, values in raw.items()}
    assert np.array_equal(tokenizer.encode(raw), tokenizer.encode(zeros))
    assert load_run_config(older).feature_cleaning.nan_fill == "zero"


def test_rows_far_outside_of_training_are_reported(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    arrays = synthetic_arrays(60, seed=9)
    for path in FAMILIES:
        arrays[path] = 30.0 * arrays[path] + 100.0
    foreign = write_arrays(tmp_path / "foreign.h5", arrays)
    alike = write_dataset(tmp_path / "alike.h5", 60, seed=9)
    for command, options in (
        (evaluate_main, []),
        (tokenize_main, ["--output", tmp_path / "tokens.h5"]),
        (analyze_main, ["--output", tmp_path / "analysis"]),
    ):
        assert run(command, checkpoint, foreign, *options) == 0
        assert "these rows lie far outside of what the tokenizer was trained on" in shown_text(capsys), command
    metrics = evaluated(checkpoint, foreign, tmp_path)["compared_with_training"]
    assert metrics["far_outside"]
    assert metrics["outside_range"] > 0.5 > metrics["outside_range_in_training"]
    Tokenizer.from_checkpoint(checkpoint).encode(foreign)
    assert "far outside" in caplog.text
    caplog.clear()
    assert not evaluated(checkpoint, alike, tmp_path)["compared_with_training"]["far_outside"]
    for path in (foreign, alike):
        with h5py.File(path) as file:
            raw = {name: file[place][:3] for name, place in zip(CONFIG["families"], FAMILIES, strict=True)}
        Tokenizer.from_checkpoint(checkpoint).encode(raw)
        assert ("far outside" in caplog.text) == (path == foreign)
        caplog.clear()


def test_code_usage_of_a_loaded_model_is_that_of_the_run(checkpoint: Path, tmp_path: Path) -> None:
    metrics = json.loads((checkpoint / "metrics.json").read_text())
    quantizer = load_checkpoint(checkpoint).quantizer
    used = [u for category in metrics["categories"] for u in category["utilization"]]
    np.testing.assert_allclose(quantizer.utilization().numpy(), used, rtol=1e-5)
    assert metrics["units"] == "standard deviations of the training rows"
    older = load_checkpoint(checkpoint_before_known_rows(checkpoint, tmp_path / "older")).quantizer
    assert float(older.utilization().max()) == 0.0


def test_missing_values_are_filled_as_in_training(checkpoint: Path, data: Path) -> None:
    """Filling with the medians of the training rows by hand gives the same tokens."""
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    payload = torch.load(checkpoint / "best_model.pt", weights_only=True)
    with h5py.File(data) as file:
        raw = {name: file[path][:] for name, path in zip(CONFIG["families"], FAMILIES, strict=True)}
    filled = {}
    for name, values in raw.items():
        fill = payload["encoder_state_dicts"][name]["fill"].numpy()
        known = values[~np.isin(np.arange(160), payload["known_rows"]["parts"].numpy().nonzero()[0])]
        whole = ~np.isnan(known).all(0)
        np.testing.assert_array_equal(fill[whole], np.nanmedian(known[:, whole], axis=0))
        filled[name] = np.where(np.isnan(values), np.nan_to_num(fill), values)
        assert not np.isnan(filled[name]).any()
    assert np.isnan(raw["summary"]).any()
    assert np.array_equal(tokenizer.encode(raw), tokenizer.encode(filled))
    zeros = {name: np.nan_to_num(values) for name, values in raw.items()}
    assert not np.array_equal(tokenizer.features(raw), tokenizer.features(zeros))


def test_run_from_before_nan_fill_resumes_with_zero(config: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    zero = ["--set", "feature_cleaning.nan_fill=zero", "--set", f"dataset_path={data}"]
    assert run(train_main, config, "--quiet", *zero, "--output", output, "--set", "training.num_epochs=1") == 0
    text = (output / "config.yaml").read_text()
    (output / "config.yaml").write_text(re.sub(r" +nan_fill: .*\n", "", text))
    payload = torch.load(output / "final_model.pt", weights_only=True)
    del payload["run_state"]["config"]["feature_cleaning"]["nan_fill"]
    torch.save(payload, output / "final_model.pt")
    (output / "manifest.json").unlink()  # earlier versions wrote none
    assert run(train_main, "--resume", output, "--quiet", "--set", "training.num_epochs=2") == 0
    assert load_config(output / "config.yaml").feature_cleaning.nan_fill == "zero"


def test_features_and_encode_accept_paths_and_reject_other_types(checkpoint: Path, data: Path) -> None:
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    with h5py.File(data) as file:
        raw = {name: file[path][:] for name, path in zip(CONFIG["families"], FAMILIES, strict=True)}
    expected = tokenizer.features(raw)
    for path in (data, str(data), [data], [str(data)]):
        np.testing.assert_allclose(tokenizer.features(path), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(DataError, match=r'"summary": \[N, 36\].*model.get_tokens'):
        tokenizer.encode(expected)
    for wrong in (np.zeros((3, 5)), torch.zeros(3), [[1.0]], None, 3):
        with pytest.raises(DataError, match="expected raw families"):
            tokenizer.encode(wrong)
        with pytest.raises(DataError, match="expected raw families"):
            tokenizer.features(wrong)


def test_shards_train_like_one_file(config: Path, checkpoint: Path, tmp_path: Path) -> None:
    write_shards(tmp_path, [50, 7, 103], seed=3)
    output = tmp_path / "out"
    assert run(train_main, config, "--quiet", "--set", f"dataset_path={tmp_path}/shard_*.h5", "--output", output) == 0
    whole, shards = (json.loads((place / "metrics.json").read_text()) for place in (checkpoint, output))
    assert shards["reconstruction_error"] == pytest.approx(whole["reconstruction_error"], rel=1e-4)
    assert [c["feature_names"] for c in shards["categories"]] == [c["feature_names"] for c in whole["categories"]]


def test_a_family_may_be_any_dataset(config: Path, data: Path, tmp_path: Path) -> None:
    families = f"families={{mine: {{encoder: IdentityEncoder, dataset: {TRAJECTORIES}}}}}"
    arguments = [config, "--quiet", "--set", families, "--set", f"dataset_path={data}", "--output", tmp_path / "out"]
    assert run(train_main, *arguments) == 0
    names = Tokenizer.from_checkpoint(tmp_path / "out").feature_names
    assert all(name.startswith("mine::") for name in names)


def test_standardized_families_survive_the_checkpoint(config: Path, data: Path, tmp_path: Path) -> None:
    arguments = ["--set", "families.summary.standardize=true", "--set", "families.temporal.standardize=true"]
    output = tmp_path / "out"
    assert run(train_main, config, "--quiet", *arguments, "--set", f"dataset_path={data}", "--output", output) == 0
    tokenizer = Tokenizer.from_checkpoint(output)
    assert tokenizer.families[0].center is not None
    x = np.concatenate([block for _, block in tokenizer.features_file(data)])
    assert np.abs(x.mean(0)).max() < 0.5


def test_categories_from_a_mapping_file(config: Path, checkpoint: Path, data: Path, tmp_path: Path) -> None:
    names = Tokenizer.from_checkpoint(checkpoint).feature_names
    mapping = {"last": names[::-2], "first": names[-2::-2], "unused": ["summary::no_such_column"]}
    (tmp_path / "map.json").write_text(json.dumps(mapping))
    output = tmp_path / "out"
    arguments = [config, "--quiet", "--set", f"dataset_path={data}", "--output", output]
    assert run(train_main, *arguments, "--set", f"training.category_assignment={tmp_path}/map.json") == 0
    metrics = json.loads((output / "metrics.json").read_text())
    assert [c["name"] for c in metrics["categories"]] == ["last", "first"]


def test_mapping_file_without_category_assignment(config: Path, checkpoint: Path, data: Path, tmp_path: Path) -> None:
    names = Tokenizer.from_checkpoint(checkpoint).feature_names
    (tmp_path / "map.json").write_text(json.dumps({"energy [J]": names[:9], "[/x]": names[9:]}))
    arguments = [config, "--set", f"dataset_path={data}", "--output", tmp_path / "out"]
    assert run(train_main, *arguments, "--set", f"training.category_mapping_file={tmp_path}/map.json") == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert [c["name"] for c in metrics["categories"]] == ["energy [J]", "[/x]"]


def test_a_glob_may_be_set_without_quotes(config: Path, data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(data.parent)
    assert run(train_main, config, "--quiet", "--set", "dataset_path=*.h5", "--output", tmp_path / "out") == 0


def test_more_shards_than_files_are_kept_open(config: Path, tmp_path: Path) -> None:
    write_shards(tmp_path, [5] * 32, seed=3)
    output = tmp_path / "out"
    assert run(train_main, config, "--quiet", "--set", f"dataset_path={tmp_path}/shard_*.h5", "--output", output) == 0


def test_resuming_into_another_directory_archives_its_run(
    config: Path, data: Path, checkpoint: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    shutil.copytree(checkpoint, output)
    arguments = [config, "--quiet", "--set", f"dataset_path={data}", "--resume", checkpoint, "--output", output]
    assert run(train_main, *arguments, "--set", "training.num_epochs=4") == 0
    (previous,) = (output / "previous").iterdir()
    assert (previous / "best_model.pt").read_bytes() == (checkpoint / "best_model.pt").read_bytes()
    assert json.loads((checkpoint / "metrics.json").read_text())["epochs"] == 3


def test_earlier_run_is_archived(config: Path, data: Path, checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(checkpoint, output)
    assert run(train_main, config, "--quiet", "--set", f"dataset_path={data}", "--output", output) == 0
    (previous,) = (output / "previous").iterdir()
    assert (previous / "best_model.pt").read_bytes() == (checkpoint / "best_model.pt").read_bytes()


def test_dry_run_writes_nothing(config: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    assert run(train_main, config, "--dry-run", "--set", f"dataset_path={data}", "--output", output) == 0
    text = capsys.readouterr().out
    assert "160 samples" in text
    assert "144 training, 16 validation" in text
    assert "summary: features/summary/aggregated/features [160, 36] (23 kB) -> MLPEncoder" in text
    assert "(memory_budget 1.25 GB)" in text
    assert not output.exists()


def test_help_config_lists_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    train_main(["--help-config"])
    text = capsys.readouterr().out
    for key in ("dataset_path", "standardize", "mad_scale", "codebook_init", "dead_code_threshold", "hidden_dims"):
        assert key in text


def train_with_errors_in(file: Path, arguments: list[str]) -> None:
    os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), 2)
    train_main(arguments)


@pytest.mark.parametrize(
    ("numbers", "status"),
    [
        pytest.param([signal.SIGTERM], 143, marks=pytest.mark.slow),
        pytest.param([signal.SIGINT], 130, marks=pytest.mark.slow),
        ([signal.SIGINT, signal.SIGINT], 130),
    ],
)
def test_signalled_run_resumes_to_the_same_weights(
    config: Path, data: Path, tmp_path: Path, numbers: list[int], status: int
) -> None:
    common = [config, "--set", f"dataset_path={data}", "--set", "training.num_epochs=400"]
    common += ["--set", "training.val_every_n_epochs=50", "--set", "training.save_every=5"]
    broken = tmp_path / "broken"
    arguments = [str(argument) for argument in (*common, "--output", broken)]
    process = forkserver().Process(target=train_with_errors_in, args=(tmp_path / "errors", arguments))
    process.start()
    deadline = time.monotonic() + 300
    while not (broken / PARTIAL / RESUME).exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    for number in numbers:
        os.kill(process.pid or 0, number)
        time.sleep(0.01)
    process.join(300)
    errors = (tmp_path / "errors").read_text()
    assert process.exitcode == status, errors
    assert errors.strip().splitlines()[-1].startswith("error: stopped in epoch")
    assert f"--resume {broken}" in errors.replace("\n", "")
    reached = load_torch(broken / PARTIAL / RESUME)["run"]["epoch"]
    assert 5 <= reached < 400

    # The rest is shortened: what matters is that both runs see the same steps.
    epochs = f"training.num_epochs={reached + 3}"
    for output, resume in ((broken, ["--resume", broken]), (tmp_path / "whole", [])):
        assert run(train_main, *common, "--set", epochs, "--quiet", "--output", output, *resume) == 0
    weights = [load_torch(place / "final_model.pt")["model_state_dict"] for place in (broken, tmp_path / "whole")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert not (broken / PARTIAL / RESUME).exists()


def test_resuming_with_another_setting_names_it(
    config: Path, data: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    shutil.copytree(checkpoint, output)
    arguments = [config, "--quiet", "--set", f"dataset_path={data}", "--resume", output]
    assert run(train_main, *arguments, "--set", "training.batch_size=32") == 2
    assert "training.batch_size: 32, but the run to resume was started with 64" in capsys.readouterr().err


def test_resuming_on_other_data_is_rejected(
    config: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    shutil.copytree(checkpoint, output)
    other = write_dataset(tmp_path / "other.h5", 160, seed=4)
    arguments = [config, "--quiet", "--set", f"dataset_path={other}", "--resume", output]
    assert run(train_main, *arguments, "--set", "training.num_epochs=4") == 3
    assert "not those of the interrupted run" in capsys.readouterr().err


def test_resuming_without_a_run_is_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data.h5").touch()
    for name in ("missing", "data.h5", "."):
        assert run(train_main, "--resume", tmp_path / name) == 3
        assert (
            capsys.readouterr().err
            == f"error: --resume {tmp_path / name}: holds no run; name the output directory of one\n"
        )


def test_a_finished_run_can_be_trained_longer(config: Path, data: Path, checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(checkpoint, output)
    arguments = [config, "--quiet", "--set", f"dataset_path={data}", "--resume", output]
    assert run(train_main, *arguments, "--set", "training.num_epochs=5") == 0
    assert json.loads((output / "metrics.json").read_text())["epochs"] == 5


# --- bad input: one line, its status, nothing written ---


@pytest.fixture
def variant(data: Path, tmp_path: Path) -> Callable[[Callable[[h5py.File], None]], Path]:
    def make(change: Callable[[h5py.File], None]) -> Path:
        path = tmp_path / "variant.h5"
        shutil.copy(data, path)
        with h5py.File(path, "a") as file:
            change(file)
        return path

    return make


def replace(file: h5py.File, path: str, values: np.ndarray[Any, Any]) -> None:
    del file[path]
    file[path] = values


def keep_rows(count: int) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        for path in FAMILIES:
            replace(file, path, file[path][:count])

    return change


def make_constant(file: h5py.File) -> None:
    for path in FAMILIES:
        replace(file, path, np.ones(file[path].shape, np.float32))


def put(path: str, row: int, value: float) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        file[path][row, ..., 0] = value

    return change


def drop(path: str) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del file[path]

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop(ARCHITECTURE), f"no dataset {ARCHITECTURE}"),
        (lambda f: replace(f, ARCHITECTURE, f[ARCHITECTURE][:150]), "families differ in their number of rows"),
        (lambda f: replace(f, SUMMARY, f[SUMMARY][:][:, None, None, :]), "2-D or 3-D"),
        (lambda f: replace(f, TEMPORAL, f[TEMPORAL][:, 0]), "3-D"),
        (make_constant, "constant"),
        (keep_rows(0), "no rows"),
        (keep_rows(1), "1 row"),
        (keep_rows(8), "at least 10"),
        (keep_rows(14), "fewer than the"),
        (put(SUMMARY, 42, np.inf), "row 42, position [0] is infinite"),
        (put(TEMPORAL, 7, -np.inf), "row 7, position [0, 0] is infinite"),
        (put(ARCHITECTURE, 159, np.inf), "row 159"),
    ],
)
def test_unusable_data_is_rejected(
    config: Path,
    variant: Callable[[Callable[[h5py.File], None]], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[h5py.File], None],
    words: str,
) -> None:
    path, output = variant(change), tmp_path / "out"
    assert run(train_main, config, "--quiet", "--set", f"dataset_path={path}", "--output", output) == 3
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert words in errors[0]
    assert not (output / "best_model.pt").exists()


@pytest.mark.parametrize("kind", ["missing", "text", "truncated", "directory", "glob"])
def test_unreadable_files_are_rejected(
    config: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    path: Path = tmp_path / "bad.h5"
    if kind == "text":
        path.write_text("not HDF5")
    elif kind == "truncated":
        path.write_bytes(data.read_bytes()[:-5000])
    elif kind == "directory":
        path.mkdir()
    elif kind == "glob":
        path = tmp_path / "no_such_*.h5"
    assert run(train_main, config, "--quiet", "--set", f"dataset_path={path}", "--output", tmp_path / "out") == 3
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert str(path) in errors[0]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["families.summary={encoder: MLPEncodr}"], "did you mean 'MLPEncoder'"),
        (["training.bach_size=3"], "did you mean 'batch_size'"),
        (["training.batch_size=many"], "training.batch_size"),
        (["training.num_epochs=0"], "training.num_epochs"),
        (["training.val_fraction=0.7", "training.test_fraction=0.5"], "must leave rows"),
        (["families={mine: {encoder: MLPEncodr}}"], "families.mine.encoder"),
        (["device=tpu"], "auto, cpu, cuda"),
        (["training.category_assignment=/no/such.json"], "no such file"),
        (["memory_budget=lots"], "expected a size"),
        (["memory_budget=100"], "memory_budget 100 is below one row"),
        ([f"training.{name}_weight=0" for name in ("reconstruction", "vq", "informativeness", "topo")], "at least one"),
    ],
)
def test_invalid_settings_are_rejected(
    config: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    settings: list[str],
    words: str,
) -> None:
    changes = [part for setting in settings for part in ("--set", setting)]
    arguments = [config, "--quiet", "--set", f"dataset_path={data}", *changes, "--output", tmp_path / "out"]
    assert run(train_main, *arguments) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert words in errors[0]
    assert not (tmp_path / "out" / "config.yaml").exists()


def test_unwritable_output_is_rejected(
    config: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    output = tmp_path / "file" / "out"
    assert run(train_main, config, "--quiet", "--set", f"dataset_path={data}", "--output", output) == 4
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["best_model.pt", "nothing"])
def test_a_damaged_or_missing_checkpoint_is_one_line(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    if name != "nothing":
        (broken / name).write_bytes((checkpoint / name).read_bytes()[:1000])
    assert run(evaluate_main, broken, data) == 3
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_code_in_a_model_file_is_not_run(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "trapped"),))

    torch.save({"model_state_dict": Trap()}, tmp_path / "best_model.pt")
    assert run(evaluate_main, tmp_path, data) == 3
    assert not (tmp_path / "trapped").exists()


def test_rows_of_another_shape_are_rejected(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_dataset(tmp_path / "other.h5", 20, seed=0, summary_width=40)
    assert run(tokenize_main, checkpoint, other, "--output", tmp_path / "t.h5") == 3
    assert "rows of shape (40,)" in capsys.readouterr().err
    assert not (tmp_path / "t.h5").exists()


def test_a_row_without_a_code_is_an_error(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hot = tmp_path / "hot.h5"
    shutil.copy(data, hot)
    with h5py.File(hot, "a") as file:
        file[ARCHITECTURE][5] = 3e38
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    tokenizer.cleaner.high[:] = np.inf
    with pytest.raises(DataError, match=r"row 5"):
        tokenizer.encode(hot)
    with pytest.raises(DataError, match=r"row 5"):
        write_tokens(tokenizer, str(hot), tmp_path / "t.h5")
    assert not (tmp_path / "t.h5").exists()


def test_encode_takes_a_list_of_files(checkpoint: Path, data: Path) -> None:
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    assert np.array_equal(tokenizer.encode([str(data)]), tokenizer.encode(data))


def test_tokenize_into_a_directory_is_rejected_at_once(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    assert run(tokenize_main, checkpoint, data, "--output", tmp_path, "--quiet") == 4


@pytest.fixture
def raw_rows(data: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Four rows of each family."""
    with h5py.File(data) as file:
        return {family: file[dataset][:4].astype(np.float32) for family, dataset in DEFAULT_DATASETS.items()}


def test_encode_takes_any_layout_of_numbers(checkpoint: Path, raw_rows: dict[str, np.ndarray[Any, Any]]) -> None:
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    expected = tokenizer.encode(raw_rows)
    read_only = {name: x.copy() for name, x in raw_rows.items()}
    for x in read_only.values():
        x.flags.writeable = False
    holes = {name: x.copy() for name, x in raw_rows.items()}
    for x in holes.values():
        x[1, ..., 2] = np.nan
    masked = {name: np.ma.masked_array(np.nan_to_num(x, nan=1e20), np.isnan(x)) for name, x in holes.items()}
    for given in (
        read_only,
        {name: x.astype(">f4") for name, x in raw_rows.items()},
        {name: x.astype(np.longdouble) for name, x in raw_rows.items()},
        {name: np.asfortranarray(x) for name, x in raw_rows.items()},
        {name: x.tolist() for name, x in raw_rows.items()},
        {name: np.ma.masked_array(x) for name, x in raw_rows.items()},
    ):
        np.testing.assert_array_equal(tokenizer.encode(given), expected)
    np.testing.assert_array_equal(tokenizer.features(masked), tokenizer.features(holes))


def test_encode_no_rows(
    checkpoint: Path, raw_rows: dict[str, np.ndarray[Any, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    tokens = Tokenizer.from_checkpoint(checkpoint).encode({name: x[:0] for name, x in raw_rows.items()})
    assert tokens.shape[0] == 0
    assert not caplog.messages


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x.astype(complex), "Complex data not supported"),
        (lambda x: torch.from_numpy(x).to(torch.complex64), "expected real numbers, got torch.complex64"),
        (lambda x: x.astype(str), "must hold numbers"),
        (lambda x: np.full(x.shape, "a", object), "must hold numbers"),
        (lambda x: [[1.0], [1.0, 2.0]], "rows of one length"),
        (lambda x: 1.0, "must be [N, D] or [N, T, D], got []"),
    ],
)
def test_encode_rejects_other_than_real_numbers(
    checkpoint: Path, raw_rows: dict[str, np.ndarray[Any, Any]], change: Any, words: str
) -> None:
    raw_rows["summary"] = change(raw_rows["summary"])
    with raises_one_line(DataError, "'summary'", words):
        Tokenizer.from_checkpoint(checkpoint).encode(raw_rows)


def test_encode_takes_numbers_in_object_arrays(checkpoint: Path, raw_rows: dict[str, np.ndarray[Any, Any]]) -> None:
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    expected = tokenizer.encode(raw_rows)
    raw_rows["summary"] = raw_rows["summary"].astype(object)
    np.testing.assert_array_equal(tokenizer.encode(raw_rows), expected)


def test_non_integer_tokens_are_rejected(checkpoint: Path) -> None:
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    tokens = np.zeros((2, tokenizer.model.num_codebooks))
    np.testing.assert_array_equal(tokenizer.decode(tokens), tokenizer.decode(tokens.astype(np.int64)))
    with pytest.raises(DataError, match="tokens: expected whole numbers"):
        tokenizer.decode(tokens + 0.7)


def test_encode_reports_missing_families(checkpoint: Path) -> None:
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    with pytest.raises(ValueError, match="expected the families summary, temporal, architecture"):
        tokenizer.encode({"summary": np.zeros((2, 36), np.float32)})


def test_dispatcher_lists_its_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    from spinlock_fast.commands.main import main

    assert run(main, "trane") == 2
    assert "unknown verb 'trane'; did you mean train?" in capsys.readouterr().err
    assert run(main, "train", "--help-config") == 0


def test_encoding_time_is_estimated_beforehand(
    config: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spinlock_fast.training.preparation._ESTIMATE_ROWS", 160)
    arguments = ["--set", f"dataset_path={data}", "--set", "training.num_epochs=1", "--output", tmp_path / "out"]
    assert run(train_main, config, *arguments) == 0
    text = " ".join(capsys.readouterr().err.split())
    estimate = re.search(r"encoding 160 samples of 3 families: [\d.e-]+ GB, about \d+ s", text)
    assert estimate is not None
    assert estimate.start() < text.index("summary: 160 of 160 samples")


@pytest.fixture
def linked_data(data: Path, tmp_path: Path) -> Path:
    """A file in another directory with links to the families of `data`."""
    path = tmp_path / "linking" / "linking.h5"
    path.parent.mkdir()
    with h5py.File(path, "w") as file:
        file.create_dataset("decoy", data=np.random.default_rng(0).normal(size=(160, 400)).astype(np.float32))
        for family in (SUMMARY, ARCHITECTURE):
            file[family] = h5py.ExternalLink(str(data), family)
        file[TEMPORAL.split("/")[0] + "/temporal"] = h5py.ExternalLink(str(data), TEMPORAL.rpartition("/")[0])
    return path


def test_linked_data_give_equal_tokens(checkpoint: Path, data: Path, linked_data: Path) -> None:
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    np.testing.assert_array_equal(tokenizer.encode(linked_data), tokenizer.encode(data))


def test_tokenize_refuses_to_overwrite_a_link_target(checkpoint: Path, data: Path, linked_data: Path) -> None:
    before = data.read_bytes()
    assert run(tokenize_main, checkpoint, linked_data, "--output", data, "--quiet") == 4
    assert data.read_bytes() == before


def test_commands_can_reject_external_data(
    checkpoint: Path, config: Path, linked_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [
        (tokenize_main, checkpoint, linked_data, "--output", tmp_path / "t.h5", "--no-external"),
        (evaluate_main, checkpoint, linked_data, "--no-external"),
        (
            train_main,
            config,
            *(
                "--set",
                f"dataset_path={linked_data}",
                "--set",
                "data.allow_external=false",
                "--output",
                tmp_path / "out",
            ),
        ),
    ]
    for command, *arguments in runs:
        assert run(command, *arguments, "--quiet") == 3
        (line,) = capsys.readouterr().err.splitlines()
        assert "linking.h5: takes values from" in line
        assert "allow_external" in line


def test_packed_data_train_and_tokenize_like_unpacked_data(
    config: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """int16 with a scale and a fill value, compared with the same numbers as float32 with NaN."""
    with h5py.File(data) as file:
        values = file[SUMMARY][:]
    scale = np.nanmax(np.abs(values)) / 30_000
    stored = np.where(np.isnan(values), -32768, np.round(values / scale)).astype(np.int16)
    stored[::7, 1] = -32768
    tokens = []
    for name in ("packed", "plain"):
        path = tmp_path / f"{name}.h5"
        shutil.copy(data, path)
        with h5py.File(path, "a") as file:
            del file[SUMMARY]
            if name == "packed":
                dataset = file.create_dataset(SUMMARY, data=stored, chunks=(8, 36), compression="gzip")
                dataset.attrs.update(_FillValue=np.int16(-32768), scale_factor=scale)
            else:
                file[SUMMARY] = np.where(stored == -32768, np.nan, stored * scale).astype(np.float32)
        output = tmp_path / name
        assert run(train_main, config, "--set", f"dataset_path={path}", "--output", output) == 0
        said = " ".join(capsys.readouterr().err.split())
        assert ("counts as missing" in said and "scale_factor" in said) == (name == "packed")
        tokens.append(Tokenizer.from_checkpoint(output).encode(path))
    np.testing.assert_array_equal(*tokens)
