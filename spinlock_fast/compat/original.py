"""Converts checkpoints of the original project."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spinlock_fast.checkpoints.directory import finite_or_null, model_payload, save_torch, write_normalization
from spinlock_fast.checkpoints.integrity import write_manifest
from spinlock_fast.checkpoints.model_card import model_card
from spinlock_fast.checkpoints.run_directory import (
    BEST,
    CARD,
    CONFIG,
    METRICS,
    NORMALIZATION,
    SAFETENSORS,
    RunDirectory,
)
from spinlock_fast.compat.converted_metrics import converted_metrics
from spinlock_fast.compat.original_files import read_original, read_settings
from spinlock_fast.config.loading import check_config, dump_config
from spinlock_fast.config.schema import (
    ENCODER_PARAMS,
    FamilyConfig,
    FeatureCleaningConfig,
    ModelConfig,
    RunConfig,
    TrainingConfig,
)
from spinlock_fast.data.feature_source import FeatureSource
from spinlock_fast.errors import ConfigError, DataError
from spinlock_fast.features.cleaning import FeatureCleaner, clip_bounds
from spinlock_fast.features.encode import ANY_LENGTH, FamilyEncoder, encode
from spinlock_fast.features.encoders import build_encoder
from spinlock_fast.features.normalize import Normalizer
from spinlock_fast.messages import one_line
from spinlock_fast.models.metrics import Metrics
from spinlock_fast.models.vqvae import CategoricalHierarchicalVQVAE, CategoricalVQVAEConfig
from spinlock_fast.output.atomic_files import write_atomically, write_json, write_text

_MODEL_FILES = ("best_model.pt", "final_model.pt")


@dataclass
class Converted:
    """A checkpoint of the original project, converted to the types of this package."""

    model: CategoricalHierarchicalVQVAE
    parts: dict[str, Any]  # further entries of best_model.pt: encoders, cleaning, normalization, names
    normalizer: Normalizer
    config: RunConfig
    epoch: int
    clips: bool  # whether the clip bounds are known
    metrics: Metrics


def convert(source: Path, data: str | None = None) -> Converted:
    """Converts a checkpoint directory (or model file) of the original project.

    Args:
        source: directory with best_model.pt or final_model.pt, or the file itself.
        data: HDF5 file with the training data, from which the clip bounds are recomputed: the original project does
            not store them. If None, features are not clipped.

    Raises:
        DataError: the checkpoint or the data are missing, damaged, or do not match.
    """
    path = source
    if os.path.isdir(source):
        path = next((source / name for name in _MODEL_FILES if os.path.exists(source / name)), source / _MODEL_FILES[0])
    payload = read_original(path)
    settings = payload.get("config") or read_settings(path.parent / "config.yaml")
    model = convert_model(payload, settings, path)
    feature_count = model.config.input_dim
    mask = payload.get("feature_mask")
    keep = np.ones(feature_count, dtype=bool) if mask is None else np.asarray(mask, dtype=bool)
    if int(keep.sum()) != feature_count:
        raise DataError(f"{path}: feature_mask keeps {int(keep.sum())} columns, but the model has {feature_count}")
    normalizer = _normalizer(payload, path, model.config.group_indices, feature_count)
    families = _families(payload, settings, keep.size, data, path)
    cleaner, clips, columns = _cleaner(payload, settings, keep, families, data)
    names = list(payload.get("feature_names") or [])
    if len(names) != feature_count:
        column_names = [name for family in families for name in family.names]
        names = [name for name, kept in zip(column_names, keep, strict=True) if kept]
    cleaning = cleaner.state()
    parts = {
        "encoder_state_dicts": {family.name: family.state() for family in families},
        "feature_mask": cleaning.pop("keep"),
        "feature_cleaning": cleaning,
        "normalization": normalizer.state(),
        "feature_names": names,
    }
    config = _run_config(settings, families, model.config)
    epoch = int(payload.get("epoch", 0))
    x = None if columns is None else normalizer(cleaner(columns))
    metrics = converted_metrics(model, config.training, names, epoch, x)
    return Converted(model, parts, normalizer, config, epoch, clips, metrics)


def write_converted(converted: Converted, directory: Path) -> None:
    """Writes model files, config.yaml, normalization_stats.npz, metrics.json, README.md and manifest.json.

    Moves an earlier result in the directory to `previous`, see `RunDirectory`.

    Raises:
        OutputError: a file cannot be written.
    """
    from safetensors.torch import save

    payload = model_payload(converted.model, converted.model.state_dict(), converted.epoch, converted.parts)
    tensors = {key: value.contiguous() for key, value in payload["model_state_dict"].items()}
    groups = converted.model.config.group_indices
    with RunDirectory(directory) as run_directory:
        partial = run_directory.begin(resumed=False)
        write_text(partial / CONFIG, dump_config(converted.config))
        write_atomically(partial / SAFETENSORS, lambda temporary: temporary.write_bytes(save(tensors)))
        write_normalization(partial / NORMALIZATION, converted.normalizer.by_category(groups))
        write_json(partial / METRICS, finite_or_null(converted.metrics))
        write_text(partial / CARD, model_card(converted.metrics, converted.config))
        save_torch(partial / BEST, payload)
        write_manifest(partial)
        run_directory.publish()


def convert_model(payload: Mapping[str, Any], settings: Mapping[str, Any], path: Path) -> CategoricalHierarchicalVQVAE:
    """The model in eval mode. Raises DataError if weights are missing or do not match `model_config`."""
    if "category_mlp.0.weight" in payload["model_state_dict"]:
        raise DataError(f"{path}: is a checkpoint of this package already")
    model_config = payload.get("model_config")
    if not isinstance(model_config, Mapping) or "group_indices" not in model_config:
        raise DataError(f"{path}: no model_config with group_indices")
    state = {str(key).removeprefix("_orig_mod."): value for key, value in payload["model_state_dict"].items()}
    merged = {**settings, **settings.get("model", {}), **model_config}
    groups = {str(name): [int(i) for i in members] for name, members in model_config["group_indices"].items()}
    fields = {key: merged[key] for key in ModelConfig.model_fields if merged.get(key) is not None}
    fields |= {
        "levels": _convert_levels(model_config.get("levels") or [], groups),
        "codebook_init": "uniform",
        "use_ema": any(key.endswith("ema_cluster_size") for key in state),
        "group_indices": groups,
    }
    try:
        config = CategoricalVQVAEConfig(**{**fields, "input_dim": int(model_config["input_dim"])})
    except ValueError as error:
        raise DataError(f"{path}: model_config: {one_line(error, 200)}") from None
    model = CategoricalHierarchicalVQVAE(config)
    try:
        model.load_state_dict(_convert_state_dict(state, model))
    except KeyError as error:
        raise DataError(f"{path}: model_state_dict has no {error.args[0]}") from None
    except RuntimeError as error:
        raise DataError(f"{path}: weights do not match model_config: {one_line(error, 200)}") from None
    return model.eval()


def _convert_levels(levels: Any, groups: Mapping[str, Any]) -> Any:
    def convert_level(level: Mapping[str, Any]) -> dict[str, int]:
        return {"num_tokens": int(level["num_tokens"]), "latent_dim": int(level["latent_dim"])}

    if isinstance(levels, Mapping):
        return {name: [convert_level(level) for level in levels[name]] for name in groups}
    return [convert_level(level) for level in levels]


def _convert_state_dict(state: Mapping[str, Tensor], model: CategoricalHierarchicalVQVAE) -> dict[str, Tensor]:
    """The state dict with the names and packed shapes of this package."""
    mlp, head = "feature_extractor.group_mlps", "projector.projection_heads"
    names = model.categories
    heads = [(name, level) for name in names for level in range(len(model.levels[name]))]

    def stack_categories(pattern: str) -> Tensor:
        return torch.stack([state[pattern.format(name)] for name in names])

    def per_codebook(pattern: str) -> list[Tensor]:
        return [state[pattern.format(g)] for g in range(model.num_codebooks)]

    converted = {
        "category_mlp.0.weight": torch.cat([state[f"{mlp}.{name}.net.0.weight"].t() for name in names]),
        "category_mlp.0.bias": stack_categories(mlp + ".{}.net.0.bias"),
        "category_mlp.3.weight": stack_categories(mlp + ".{}.net.3.weight").transpose(1, 2),
        "category_mlp.3.bias": stack_categories(mlp + ".{}.net.3.bias"),
        "category_mlp.4.weight": stack_categories(mlp + ".{}.net.4.weight"),
        "category_mlp.4.bias": stack_categories(mlp + ".{}.net.4.bias"),
        "quantizer.embedding": torch.cat([w.flatten() for w in per_codebook("vq_layers.{}.embedding.weight")]),
        "quantizer.initialized": torch.tensor(True),
        "partial_decoders.0.weight": torch.cat([w.t() for w in per_codebook("partial_decoders.{}.0.weight")]),
        "partial_decoders.0.bias": torch.stack(per_codebook("partial_decoders.{}.0.bias")),
        "partial_decoders.2.weight": torch.stack(per_codebook("partial_decoders.{}.2.weight")).transpose(1, 2),
        "partial_decoders.2.bias": torch.stack(per_codebook("partial_decoders.{}.2.bias")),
    }
    for layer in ("0.weight", "0.bias", "2.weight", "2.bias"):
        converted[f"heads.{layer}"] = torch.cat([state[f"{head}.{name}.{i}.{layer}"] for name, i in heads])
    for layer in ("0.weight", "0.bias", "3.weight", "3.bias"):
        converted[f"shared_decoder.{layer}"] = state[f"shared_decoder.{layer}"]
    if model.quantizer.use_ema:
        converted["quantizer.cluster_size"] = torch.cat(per_codebook("vq_layers.{}.ema_cluster_size"))
        converted["quantizer.embedding_sum"] = torch.cat([w.flatten() for w in per_codebook("vq_layers.{}.ema_w")])
    else:
        converted["quantizer.cluster_size"] = model.quantizer.cluster_size
        converted["quantizer.embedding_sum"] = converted["quantizer.embedding"]
    return converted


def _normalizer(
    payload: Mapping[str, Any], path: Path, groups: Mapping[str, Sequence[int]], features: int
) -> Normalizer:
    """Centre and scale of every feature; 0 and 1 for features without a category."""
    center, scale = np.zeros(features), np.ones(features)
    stats = payload.get("normalization_stats")
    if isinstance(stats, Mapping):
        pairs = {name: (stats[name].mean, stats[name].std) for name in groups if name in stats}
        mad = False
    else:
        file = path.parent / NORMALIZATION
        if not os.path.exists(file):
            raise DataError(f"{path}: no normalization_stats, and no {file.name} in its directory")
        with np.load(file, allow_pickle=False) as arrays:
            mad = any(key.endswith("_mad") for key in arrays)
            first, second = ("median", "mad") if mad else ("mean", "std")
            pairs = {
                name: (arrays[f"{name}_{first}"], arrays[f"{name}_{second}"])
                for name in groups
                if f"{name}_{first}" in arrays
            }
    for name, (group_center, group_scale) in pairs.items():
        members = list(groups[name])
        center[members] = np.asarray(group_center, dtype=np.float64)
        scale[members] = np.asarray(group_scale, dtype=np.float64)
    return Normalizer("mad" if mad else "standard", center, np.where(scale > 0, scale, 1.0))


def _families(
    payload: Mapping[str, Any], settings: Mapping[str, Any], columns: int, data: str | None, path: Path
) -> list[FamilyEncoder]:
    saved = payload.get("encoder_state_dicts") or {}
    family_settings = settings.get("families") or {}
    names = list(family_settings) or list(saved)
    if not names:
        raise DataError(f"{path}: has neither encoder_state_dicts nor families")
    configs = {name: _family_config(name, family_settings.get(name), saved.get(name), path) for name in names}
    shapes = _row_shapes(configs, saved, columns, data, path)
    families = []
    for name, config in configs.items():
        encoder = build_encoder(shapes[name], config.encoder_params)
        if name in saved:
            encoder.load_state_dict(dict(saved[name]["state_dict"]))
        elif config.encoder != "IdentityEncoder":
            raise DataError(f"{path}: no weights for encoder {config.encoder} of family {name!r}")
        dataset = config.dataset or RunConfig(families={name: config}).datasets()[name]
        families.append(FamilyEncoder(name, config.encoder, config.encoder_params, dataset, shapes[name], encoder))
    width = sum(family.encoder.output_dim for family in families)
    if width != columns:
        raise DataError(f"{path}: the encoders give {width} columns, but feature_mask has {columns}")
    return families


def _family_config(name: str, settings: Any, saved: Any, path: Path) -> FamilyConfig:
    merged = {**(settings or {})}
    if saved is not None:
        merged |= {"encoder": saved["encoder_name"], "encoder_params": saved["encoder_params"]}
    params = merged.get("encoder_params") or {}
    fields = ENCODER_PARAMS.get(merged.get("encoder", ""))
    if fields is None:
        raise DataError(f"{path}: family {name!r} has encoder {merged.get('encoder')!r}, which is not supported")
    known = {key: value for key, value in params.items() if key in fields.model_fields}
    try:
        return FamilyConfig(encoder=merged["encoder"], encoder_params=fields(**known), dataset=merged.get("dataset"))
    except ValueError as error:
        raise DataError(f"{path}: family {name!r}: {one_line(error, 200)}") from None


def _row_shapes(
    configs: Mapping[str, FamilyConfig],
    saved: Mapping[str, Any],
    columns: int,
    data: str | None,
    path: Path,
) -> dict[str, tuple[int, ...]]:
    """Row shapes of the families: from the data, else from the encoder weights. One family may take what remains."""
    if data is not None:
        with FeatureSource(data, RunConfig(families=dict(configs)).datasets()) as source:
            return {name: source.datasets[name].row_shape for name in configs}
    shapes: dict[str, tuple[int, ...]] = {}
    remaining = columns
    for name, config in configs.items():
        if name in saved and config.encoder == "MLPEncoder":
            weights = saved[name]["state_dict"]
            shapes[name] = (int(weights["encoder.0.weight"].shape[1]),)
            remaining -= config.encoder_params.output_dim  # type: ignore[union-attr]
        elif name in saved and config.encoder == "TemporalCNNEncoder":
            shapes[name] = (ANY_LENGTH, int(saved[name]["state_dict"]["stage1.0.weight"].shape[1]))
            remaining -= config.encoder_params.embedding_dim  # type: ignore[union-attr]
    unknown = [name for name in configs if name not in shapes]
    if len(unknown) > 1:
        raise DataError(f"{path}: the widths of {' and '.join(unknown)} are not stored; give --data")
    return shapes | dict.fromkeys(unknown, (remaining,))


def _cleaner(
    payload: Mapping[str, Any],
    settings: Mapping[str, Any],
    keep: np.ndarray[Any, np.dtype[np.bool_]],
    families: list[FamilyEncoder],
    data: str | None,
) -> tuple[FeatureCleaner, bool, NDArray[np.float32] | None]:
    """The cleaner, whether its clip bounds are known, and the columns of the data where these are given."""
    merged = {**(settings.get("feature_cleaning") or {}), **(payload.get("feature_cleaning_params") or {})}
    known = {key: merged[key] for key in FeatureCleaningConfig.model_fields if merged.get(key) is not None}
    # The original project clips at multiples of the MAD without the factor 1.4826.
    config = check_config({"feature_cleaning": {**known, "mad_scale": 1.0}}).feature_cleaning
    unbounded = np.full(int(keep.sum()), np.inf)
    if data is None:
        return FeatureCleaner(keep, np.zeros(keep.size), -unbounded, unbounded), not config.enabled, None
    with FeatureSource(data, {family.name: family.dataset for family in families}) as source:
        columns = encode(source, families, RunConfig().memory_budget, torch.device("cpu"))
    fill = np.median(columns, axis=0).astype(np.float64)
    low, high = clip_bounds(columns[:, keep].astype(np.float64), config)
    return FeatureCleaner(keep, fill, low, high), True, columns


def _run_config(settings: Mapping[str, Any], families: list[FamilyEncoder], model: CategoricalVQVAEConfig) -> RunConfig:
    """The settings of the original run that exist in this package."""
    flat = {**settings, **settings.get("training", {})}
    training: dict[str, Any] = {}
    for key in (*TrainingConfig.model_fields, "category_mapping_file"):
        value = flat.get("epochs" if key == "num_epochs" and "epochs" in flat else key)
        if value is not None and key != "category_assignment":
            training[key] = value
    data: dict[str, Any] = {
        "random_seed": int(settings.get("random_seed", 42)),
        "feature_cleaning": {"nan_fill": "zero"},
        "families": {
            family.name: {
                "encoder": family.encoder_name,
                "encoder_params": family.params.model_dump(),
                "dataset": family.dataset,
            }
            for family in families
        },
        "model": model.model_dump(mode="json", include=set(ModelConfig.model_fields)),
    }
    try:
        return check_config({**data, "training": training})
    except ConfigError:
        return check_config(data)
