"""Conversion of a checkpoint of the original project, written here with its documented names."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PosixPath
from types import ModuleType
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from helpers import ARCHITECTURE, SUMMARY, TEMPORAL, write_dataset
from torch import Tensor
from torch.nn import functional as F

from spinlock_fast import Tokenizer, load_checkpoint
from spinlock_fast.checkpoints.directory import load_run_config
from spinlock_fast.config.schema import MLPEncoderParams, TemporalCNNEncoderParams
from spinlock_fast.convert import main as convert_main
from spinlock_fast.features.encoders import build_encoder

MLP = {"hidden_dims": [16], "output_dim": 12, "dropout": 0.1, "activation": "relu", "batch_norm": True}
CNN = {"embedding_dim": 8, "architecture": "resnet1d_3"}
LEVELS = {
    "cluster_1": [{"num_tokens": 5, "latent_dim": 4}, {"num_tokens": 3, "latent_dim": 8}],
    "cluster_10": [{"num_tokens": 7, "latent_dim": 4}],
    "cluster_2": [{"num_tokens": 4, "latent_dim": 12}, {"num_tokens": 4, "latent_dim": 4}],
}
FEATURES = 25
GROUPS = {"cluster_1": [3, 0, 7, 11], "cluster_10": [1, 2, 24, 9, 10, 4], "cluster_2": [5, 6, 8, *range(12, 24)]}


@dataclass
class NormalizationStats:
    mean: Any
    std: Any


NormalizationStats.__module__ = "spinlock.encoding.normalization"
NormalizationStats.__qualname__ = "NormalizationStats"


@pytest.fixture
def original_module(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("spinlock.encoding.normalization")
    module.NormalizationStats = NormalizationStats  # type: ignore[attr-defined]
    for name in ("spinlock", "spinlock.encoding"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "spinlock.encoding.normalization", module)


def state_dict(hidden: int = 10, embedding: int = 6) -> dict[str, Tensor]:
    """Random weights under the original's names."""
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, width_in: int, width_out: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (width_out, width_in), (width_out,)

    g = total = 0
    for name, members in GROUPS.items():
        net = f"feature_extractor.group_mlps.{name}.net"
        linear(f"{net}.0", len(members), hidden)
        linear(f"{net}.3", hidden, embedding)
        shapes[f"{net}.4.weight"] = shapes[f"{net}.4.bias"] = (embedding,)
        for level, book in enumerate(LEVELS[name]):
            K, D = book["num_tokens"], book["latent_dim"]
            head = f"projector.projection_heads.{name}.{level}"
            linear(f"{head}.0", embedding, D)
            shapes[f"{head}.2.weight"] = shapes[f"{head}.2.bias"] = (D,)
            shapes[f"vq_layers.{g}.embedding.weight"] = shapes[f"vq_layers.{g}.ema_w"] = (K, D)
            shapes[f"vq_layers.{g}.ema_cluster_size"] = (K,)
            linear(f"partial_decoders.{g}.0", D, 128)
            linear(f"partial_decoders.{g}.2", 128, FEATURES)
            g, total = g + 1, total + D
    linear("shared_decoder.0", total, 256)
    linear("shared_decoder.3", 256, FEATURES)
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) * 0.5 for name, shape in shapes.items()}


def original_forward(w: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and reconstruction computed as in the original project, one category at a time."""
    tokens, quantized, g = [], [], 0

    def linear(name: str, value: Tensor) -> Tensor:
        return F.linear(value, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(name: str, value: Tensor) -> Tensor:
        return F.layer_norm(value, value.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])

    for name, members in GROUPS.items():
        net = f"feature_extractor.group_mlps.{name}.net"
        h = norm(f"{net}.4", linear(f"{net}.3", F.relu(linear(f"{net}.0", x[:, members]))))
        for level in range(len(LEVELS[name])):
            head = f"projector.projection_heads.{name}.{level}"
            z = norm(f"{head}.2", linear(f"{head}.0", h))
            codes = w[f"vq_layers.{g}.embedding.weight"]
            token = torch.cdist(z.double(), codes.double()).argmin(1)
            tokens.append(token)
            quantized.append(codes[token])
            g += 1
    decoded = linear("shared_decoder.3", F.relu(linear("shared_decoder.0", torch.cat(quantized, 1))))
    return torch.stack(tokens, 1), decoded


@dataclass
class Original:
    directory: Path
    data: Path
    weights: dict[str, Tensor]
    x: Tensor  # what the original's pipeline gives the model, from the data


def settings() -> dict[str, Any]:
    return {
        "dataset_path": PosixPath("some/where.h5"),
        "random_seed": 7,
        "epochs": 12,
        "commitment_cost": 0.25,
        "families": {
            "summary": {"encoder": "MLPEncoder", "encoder_params": MLP},
            "temporal": {"encoder": "TemporalCNNEncoder", "encoder_params": CNN},
            "architecture": {"encoder": "IdentityEncoder", "encoder_params": {}},
        },
        "feature_cleaning": {"outlier_method": "mad", "mad_threshold": 5.0, "max_cv_threshold": 100.0},
    }


@pytest.fixture
def original(tmp_path: Path, original_module: None) -> Original:
    data = write_dataset(tmp_path / "data.h5", 90, seed=5)
    torch.manual_seed(3)
    summary = build_encoder((36,), MLPEncoderParams(hidden_dims=[16], output_dim=12))
    temporal = build_encoder((32, 7), TemporalCNNEncoderParams(embedding_dim=8))
    with h5py.File(data) as file:
        raw = [torch.from_numpy(np.nan_to_num(file[path][:])) for path in (SUMMARY, TEMPORAL, ARCHITECTURE)]
    columns = torch.cat([summary(raw[0]), temporal(raw[1]), raw[2]], 1).numpy()  # [N, 32]
    rng = np.random.default_rng(0)
    mask = np.zeros(32, dtype=bool)
    mask[rng.permutation(32)[:FEATURES]] = True
    kept = columns[:, mask]
    median = np.median(kept, 0)
    mad = np.median(np.abs(kept - median), 0)
    x = np.clip(kept, median - 5 * mad, median + 5 * mad)
    stats = {}
    for name, members in GROUPS.items():
        mean, std = x[:, members].mean(0), x[:, members].std(0)
        stats[name] = NormalizationStats(mean=mean, std=std)
        x[:, members] = (x[:, members] - mean) / std
    weights = state_dict()
    payload = {
        "epoch": 9,
        "model_state_dict": weights,
        "val_loss": np.float64(0.5),
        "model_config": {
            "input_dim": FEATURES,
            "group_indices": GROUPS,
            "group_embedding_dim": 6,
            "group_hidden_dim": 10,
            "levels": LEVELS,
        },
        "config": settings(),
        "normalization_stats": stats,
        "feature_names": [f"f{i}" for i in range(FEATURES)],
        "feature_mask": mask,
        "feature_cleaning_params": {"outlier_method": "mad", "mad_threshold": 5.0},
        "encoder_state_dicts": {
            "summary": {"encoder_name": "MLPEncoder", "encoder_params": MLP, "state_dict": summary.state_dict()},
            "temporal": {
                "encoder_name": "TemporalCNNEncoder",
                "encoder_params": CNN,
                "state_dict": temporal.state_dict(),
            },
        },
    }
    directory = tmp_path / "original"
    directory.mkdir()
    torch.save(payload, directory / "best_model.pt")
    return Original(directory, data, weights, torch.from_numpy(x.astype(np.float32)))


def convert(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        convert_main([str(argument) for argument in arguments])
    return int(end.value.code or 0)


def test_converted_tokens_and_reconstructions_match_the_original(original: Original, tmp_path: Path) -> None:
    assert convert(original.directory, "--output", tmp_path / "ours", "--data", original.data) == 0
    model = load_checkpoint(tmp_path / "ours")
    tokens, decoded = original_forward(original.weights, original.x)
    assert torch.equal(model.get_tokens(original.x), tokens)
    torch.testing.assert_close(model.decode_from_tokens(tokens), decoded, rtol=1e-5, atol=1e-5)
    assert model.codebook_names[:3] == ["cluster_1/L0", "cluster_1/L1", "cluster_10/L0"]


def test_converted_pipeline_with_data_matches_the_original(original: Original, tmp_path: Path) -> None:
    convert(original.directory, "--output", tmp_path / "ours", "--data", original.data)
    assert load_run_config(tmp_path / "ours").feature_cleaning.nan_fill == "zero"
    tokenizer = Tokenizer.from_checkpoint(tmp_path / "ours")
    x = np.concatenate([block for _, block in tokenizer.features_file(original.data)])
    np.testing.assert_allclose(x, original.x.numpy(), rtol=1e-4, atol=1e-4)
    assert np.array_equal(tokenizer.encode(original.data), original_forward(original.weights, original.x)[0].numpy())


def test_conversion_without_data_reports_missing_clip_bounds(
    original: Original, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(original.directory, "--output", tmp_path / "ours") == 0
    assert "does not clip" in capsys.readouterr().err
    tokenizer = Tokenizer.from_checkpoint(tmp_path / "ours")
    assert tokenizer.encode(original.data).shape == (90, 5)
    assert np.isinf(tokenizer.cleaner.high).all()


def test_weights_of_a_compiled_model_are_converted(original: Original, tmp_path: Path, original_module: None) -> None:
    payload = torch.load(original.directory / "best_model.pt", weights_only=False)
    payload["model_state_dict"] = {f"_orig_mod.{key}": value for key, value in original.weights.items()}
    torch.save(payload, original.directory / "best_model.pt")
    assert convert(original.directory, "--output", tmp_path / "ours") == 0


def test_settings_and_statistics_in_separate_files(original: Original, tmp_path: Path) -> None:
    path = original.directory / "best_model.pt"
    payload = torch.load(path, weights_only=False)
    stats = payload.pop("normalization_stats")
    arrays = {f"{name}_{kind}": getattr(stats[name], kind) for name in stats for kind in ("mean", "std")}
    np.savez(original.directory / "normalization_stats.npz", **arrays)
    del payload["config"]
    torch.save(payload, path)
    (original.directory / "config.yaml").write_text(
        "dataset_path: !!python/object/apply:pathlib.PosixPath\n- some\n- where\n"
        "families:\n  summary: {encoder: MLPEncoder}\n  temporal: {encoder: TemporalCNNEncoder}\n"
        "  architecture: {encoder: IdentityEncoder}\n"
    )
    assert convert(original.directory, "--output", tmp_path / "ours", "--data", original.data) == 0
    tokens = original_forward(original.weights, original.x)[0]
    assert torch.equal(load_checkpoint(tmp_path / "ours").get_tokens(original.x), tokens)


@pytest.fixture
def trap(tmp_path: Path) -> Iterator[Any]:
    class Trap:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "trapped"),))

    yield Trap()
    assert not (tmp_path / "trapped").exists()


def test_model_file_with_code_is_refused(trap: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model_state_dict": {}, "config": trap}, tmp_path / "best_model.pt")
    assert convert(tmp_path, "--output", tmp_path / "ours") == 3
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert "refused" in errors[0]


def test_settings_file_with_code_is_refused(original: Original, tmp_path: Path) -> None:
    path = original.directory / "best_model.pt"
    payload = torch.load(path, weights_only=False)
    del payload["config"]
    torch.save(payload, path)
    tag = f"!!python/object/apply:os.mkdir [{tmp_path}/trapped]"
    (original.directory / "config.yaml").write_text(f"dataset_path: {tag}\n")
    assert convert(original.directory, "--output", tmp_path / "ours") == 3
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize(
    "key",
    ["vq_layers.1.embedding.weight", "shared_decoder.3.bias", "feature_extractor.group_mlps.cluster_2.net.0.bias"],
)
def test_missing_weights_are_named_in_the_error(
    original: Original, tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    path = original.directory / "best_model.pt"
    payload = torch.load(path, weights_only=False)
    del payload["model_state_dict"][key]
    torch.save(payload, path)
    assert convert(original.directory, "--output", tmp_path / "ours") == 3
    assert key in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, b"", b"junk", {}])
def test_invalid_checkpoint_reports_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: Any) -> None:
    if isinstance(content, bytes):
        (tmp_path / "best_model.pt").write_bytes(content)
    elif content is not None:
        torch.save(content, tmp_path / "best_model.pt")
    assert convert(tmp_path, "--output", tmp_path / "ours") == 3
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_card_and_metrics_hold_what_is_known(original: Original, tmp_path: Path) -> None:
    assert convert(original.directory, "--output", tmp_path / "sizes") == 0
    metrics = json.loads((tmp_path / "sizes" / "metrics.json").read_text())
    assert [c["codes"] for c in metrics["categories"]] == [[5, 3], [7], [4, 4]]
    assert (metrics["total_codes"], metrics["features"], metrics["converted_epoch"]) == (23, FEATURES, 9)
    assert "quality" not in metrics
    card = (tmp_path / "sizes" / "README.md").read_text()
    assert "Not measured" in card
    assert "Converted from epoch 9 of a run of the original project" in card

    assert convert(original.directory, "--output", tmp_path / "measured", "--data", original.data) == 0
    measured = json.loads((tmp_path / "measured" / "metrics.json").read_text())
    decoded = original_forward(original.weights, original.x)[1]
    error = (decoded - original.x).square().mean().item()
    assert measured["reconstruction_error"] == pytest.approx(error, rel=1e-3)
    assert (measured["samples"], measured["rows"]) == (90, "all")
    assert measured.keys() >= metrics.keys()
    assert "On all 90 operators of the training file:" in (tmp_path / "measured" / "README.md").read_text()


def test_converted_checkpoint_is_trained_further(original: Original, tmp_path: Path) -> None:
    assert convert(original.directory, "--data", original.data, "--output", tmp_path / "start") == 0
    start = Tokenizer.from_checkpoint(tmp_path / "start")
    settings = {"num_epochs": 2, "batch_size": 32, "topo_samples": 32, "device": "cpu"}
    tuned = Tokenizer(settings=settings, init_from=str(tmp_path / "start"), freeze="tokens").fit(original.data)
    assert np.array_equal(tuned.encode(original.data), start.encode(original.data))
    weights = (tokenizer.model.shared_decoder[0].weight for tokenizer in (start, tuned))
    assert not torch.equal(*weights)
    assert tuned.feature_names == start.feature_names
