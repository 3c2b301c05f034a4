"""Reading checkpoints of the original project, without running code from them."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from torch import Tensor

from spinlock_fast.checkpoints.directory import (
    finite_or_null,
    load_restricted,
    model_payload,
    save_torch,
    write_normalization,
)
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
from spinlock_fast.config.loading import BoundedLoader, check_config, dump_config, parse_yaml, read_text_file
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


class _NormalizationStats:
    """Stands in for `spinlock.encoding.normalization.NormalizationStats`."""

    mean: Any
    std: Any


def _path(*parts: str) -> str:
    return "/".join(parts)


def _allowed() -> list[Any]:
    from numpy._core import multiarray

    allowed: list[Any] = [
        np.ndarray,
        np.dtype,
        (_NormalizationStats, "spinlock.encoding.normalization.NormalizationStats"),
    ]
    for module in ("numpy._core.multiarray", "numpy.core.multiarray"):
        allowed += [(multiarray._reconstruct, f"{module}._reconstruct"), (multiarray.scalar, f"{module}.scalar")]
    for module in ("pathlib", "pathlib._local"):
        allowed += [
            (_path, f"{module}.{name}") for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
        ]
    kinds = (
        "bool",
        "int8",
        "int16",
        "int32",
        "int64",
        "uint8",
        "uint16",
        "uint32",
        "uint64",
        "float32",
        "float64",
        "U1",
    )
    return allowed + [type(np.dtype(kind)) for kind in kinds]


def read_original(path: Path) -> dict[str, Any]:
    """The contents of a model file of the original project.

    Numpy arrays, paths (as text) and its normalisation statistics are understood; anything else is
    refused, and no code from the file runs.

    Raises:
        DataError: missing, damaged, or holding a type that is not on the list.
    """
    try:
        with torch.serialization.safe_globals(_allowed()):
            payload = load_restricted(path)
    except pickle.UnpicklingError as error:
        reason = str(error).split("WeightsUnpickler error:")[-1].strip().splitlines()[0]
        raise DataError(f"{path}: refused: {reason}") from None
    if "model_state_dict" not in payload:
        raise DataError(f"{path}: no model_state_dict: not a checkpoint of the original project")
    return payload


class _TaggedLoader(BoundedLoader):
    """A loader that reads the original's path tags as text."""


def _construct_path(loader: yaml.SafeLoader, suffix: str, node: yaml.Node) -> str:
    if not isinstance(node, yaml.SequenceNode):
        raise yaml.constructor.ConstructorError(None, None, f"unexpected {suffix}", node.start_mark)
    return _path(*map(str, loader.construct_sequence(node)))


_TaggedLoader.add_multi_constructor("tag:yaml.org,2002:python/object/apply:pathlib.", _construct_path)


@dataclass
class Converted:
    """An original checkpoint in this package's terms."""

    model: CategoricalHierarchicalVQVAE
    parts: dict[str, Any]
    normalizer: Normalizer
    config: RunConfig
    epoch: int
    clips: bool  # whether the clip bounds are known
    metrics: Metrics


def convert(source: Path, data: str | None = None) -> Converted:
    """A checkpoint directory (or model file) of the original project as one of this package.

    Args:
        source: directory with best_model.pt or final_model.pt, or the file itself.
        data: HDF5 file that it was trained on. The original does not store its clip bounds; with the
            file they are recomputed, without it features are not clipped.

    Raises:
        DataError: the checkpoint or the data cannot serve.
    """
    path = source
    if os.path.isdir(source):
        path = next((source / name for name in _MODEL_FILES if (source / name).exists()), source / _MODEL_FILES[0])
    payload = read_original(path)
    settings = payload.get("config") or _read_config(path.parent / "config.yaml")
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

    An earlier result in the directory is moved to `previous`, see `RunDirectory`.

    Raises:
        OutputError: they cannot be written.
    """
    from safetensors.torch import save

    payload = model_payload(converted.model, converted.model.state_dict(), converted.epoch, converted.parts)
    tensors = {key: value.contiguous() for key, value in payload["model_state_dict"].items()}
    groups = converted.model.config.group_indices
    with RunDirectory(directory) as place:
        partial = place.begin(resumed=False)
        write_text(partial / CONFIG, dump_config(converted.config))
        write_atomically(partial / SAFETENSORS, lambda temporary: temporary.write_bytes(save(tensors)))
        write_normalization(partial / NORMALIZATION, converted.normalizer.by_category(groups))
        write_json(partial / METRICS, finite_or_null(converted.metrics))
        write_text(partial / CARD, model_card(converted.metrics, converted.config))
        save_torch(partial / BEST, payload)
        write_manifest(partial)
        place.publish()


def convert_model(payload: Mapping[str, Any], settings: Mapping[str, Any], path: Path) -> CategoricalHierarchicalVQVAE:
    """The model alone, in eval mode; raises DataError where weights are missing or do not fit."""
    if "category_mlp.0.weight" in payload["model_state_dict"]:
        raise DataError(f"{path}: is a checkpoint of this package already")
    described = payload.get("model_config")
    if not isinstance(described, Mapping) or "group_indices" not in described:
        raise DataError(f"{path}: no model_config with group_indices")
    state = {str(key).removeprefix("_orig_mod."): value for key, value in payload["model_state_dict"].items()}
    hyper = {**settings, **settings.get("model", {}), **described}
    groups = {str(name): [int(i) for i in members] for name, members in described["group_indices"].items()}
    known = {key: hyper[key] for key in ModelConfig.model_fields if key in hyper and hyper[key] is not None}
    known["levels"] = _plain_levels(described.get("levels") or [], groups)
    known["codebook_init"] = "uniform"
    known["use_ema"] = any(key.endswith("ema_cluster_size") for key in state)
    try:
        config = CategoricalVQVAEConfig(**{**known, "input_dim": int(described["input_dim"]), "group_indices": groups})
    except ValueError as error:
        raise DataError(f"{path}: model_config: {' '.join(str(error).split())[:200]}") from None
    model = CategoricalHierarchicalVQVAE(config)
    try:
        model.load_state_dict(_translate(state, model))
    except KeyError as error:
        raise DataError(f"{path}: model_state_dict has no {error.args[0]}") from None
    except RuntimeError as error:
        raise DataError(f"{path}: weights do not fit model_config: {' '.join(str(error).split())[:200]}") from None
    return model.eval()


def _plain_levels(levels: Any, groups: Mapping[str, Any]) -> Any:
    def book(level: Mapping[str, Any]) -> dict[str, int]:
        return {"num_tokens": int(level["num_tokens"]), "latent_dim": int(level["latent_dim"])}

    if isinstance(levels, Mapping):
        return {name: [book(level) for level in levels[name]] for name in groups}
    return [book(level) for level in levels]


def _translate(state: Mapping[str, Tensor], model: CategoricalHierarchicalVQVAE) -> dict[str, Tensor]:
    """The original's state dict in this package's names and packed shapes."""
    mlp, head = "feature_extractor.group_mlps", "projector.projection_heads"
    names = model.categories
    heads = [(name, level) for name in names for level in range(len(model.levels[name]))]
    books = range(model.num_codebooks)

    def stack(pattern: str) -> Tensor:
        return torch.stack([state[pattern.format(name)] for name in names])

    def over_heads(suffix: str) -> Tensor:
        return torch.cat([state[f"{head}.{name}.{level}.{suffix}"] for name, level in heads])

    def over_books(pattern: str) -> list[Tensor]:
        return [state[pattern.format(g)] for g in books]

    translated = {
        "category_mlp.0.weight": torch.cat([state[f"{mlp}.{name}.net.0.weight"].t() for name in names]),
        "category_mlp.0.bias": stack(mlp + ".{}.net.0.bias"),
        "category_mlp.3.weight": stack(mlp + ".{}.net.3.weight").transpose(1, 2),
        "category_mlp.3.bias": stack(mlp + ".{}.net.3.bias"),
        "category_mlp.4.weight": stack(mlp + ".{}.net.4.weight"),
        "category_mlp.4.bias": stack(mlp + ".{}.net.4.bias"),
        "heads.0.weight": over_heads("0.weight"),
        "heads.0.bias": over_heads("0.bias"),
        "heads.2.weight": over_heads("2.weight"),
        "heads.2.bias": over_heads("2.bias"),
        "quantizer.embedding": torch.cat([w.flatten() for w in over_books("vq_layers.{}.embedding.weight")]),
        "quantizer.initialized": torch.tensor(True),
        "partial_decoders.0.weight": torch.cat([w.t() for w in over_books("partial_decoders.{}.0.weight")]),
        "partial_decoders.0.bias": torch.stack(over_books("partial_decoders.{}.0.bias")),
        "partial_decoders.2.weight": torch.stack(over_books("partial_decoders.{}.2.weight")).transpose(1, 2),
        "partial_decoders.2.bias": torch.stack(over_books("partial_decoders.{}.2.bias")),
    }
    for layer in ("0", "3"):
        for kind in ("weight", "bias"):
            translated[f"shared_decoder.{layer}.{kind}"] = state[f"shared_decoder.{layer}.{kind}"]
    if model.quantizer.use_ema:
        translated["quantizer.cluster_size"] = torch.cat(over_books("vq_layers.{}.ema_cluster_size"))
        translated["quantizer.embedding_sum"] = torch.cat([w.flatten() for w in over_books("vq_layers.{}.ema_w")])
    else:
        translated["quantizer.cluster_size"] = model.quantizer.cluster_size
        translated["quantizer.embedding_sum"] = translated["quantizer.embedding"]
    return translated


def _read_config(path: Path) -> dict[str, Any]:
    try:
        value = parse_yaml(read_text_file(path), _TaggedLoader) if path.exists() else {}
    except (OSError, ConfigError, yaml.YAMLError) as error:
        raise DataError(f"{path}: cannot be read: {one_line(error, 200)}") from None
    return value if isinstance(value, dict) else {}


def _normalizer(
    payload: Mapping[str, Any], path: Path, groups: Mapping[str, Sequence[int]], features: int
) -> Normalizer:
    """Centre and scale of every feature; those in no category are left as they are."""
    center, scale = np.zeros(features), np.ones(features)
    stats = payload.get("normalization_stats")
    if isinstance(stats, Mapping):
        pairs = {name: (stats[name].mean, stats[name].std) for name in groups if name in stats}
        mad = False
    else:
        file = path.parent / NORMALIZATION
        if not file.exists():
            raise DataError(f"{path}: no normalization_stats in it, and no {file.name} beside it")
        with np.load(file, allow_pickle=False) as arrays:
            mad = any(key.endswith("_mad") for key in arrays)
            first, second = ("median", "mad") if mad else ("mean", "std")
            pairs = {
                name: (arrays[f"{name}_{first}"], arrays[f"{name}_{second}"])
                for name in groups
                if f"{name}_{first}" in arrays
            }
    for name, (middle, width) in pairs.items():
        members = list(groups[name])
        center[members] = np.asarray(middle, dtype=np.float64)
        scale[members] = np.asarray(width, dtype=np.float64)
    return Normalizer("mad" if mad else "standard", center, np.where(scale > 0, scale, 1.0))


def _families(
    payload: Mapping[str, Any], settings: Mapping[str, Any], columns: int, data: str | None, path: Path
) -> list[FamilyEncoder]:
    saved = payload.get("encoder_state_dicts") or {}
    described = settings.get("families") or {}
    names = list(described) or list(saved)
    if not names:
        raise DataError(f"{path}: neither encoder_state_dicts nor families are in it")
    configs = {name: _family_config(name, described.get(name), saved.get(name), path) for name in names}
    shapes = _row_shapes(configs, saved, columns, data, path)
    families = []
    for name, config in configs.items():
        encoder = build_encoder(shapes[name], config.encoder_params)
        if name in saved:
            encoder.load_state_dict(dict(saved[name]["state_dict"]))
        elif config.encoder != "IdentityEncoder":
            raise DataError(f"{path}: no weights of encoder {config.encoder} of family {name!r}")
        dataset = config.dataset or RunConfig(families={name: config}).datasets()[name]
        families.append(FamilyEncoder(name, config.encoder, config.encoder_params, dataset, shapes[name], encoder))
    width = sum(family.encoder.output_dim for family in families)
    if width != columns:
        raise DataError(f"{path}: the encoders give {width} columns, but feature_mask has {columns}")
    return families


def _family_config(name: str, described: Any, saved: Any, path: Path) -> FamilyConfig:
    both = {**(described or {})}
    if saved is not None:
        both |= {"encoder": saved["encoder_name"], "encoder_params": saved["encoder_params"]}
    params = both.get("encoder_params") or {}
    fields = ENCODER_PARAMS.get(both.get("encoder", ""))
    if fields is None:
        raise DataError(f"{path}: family {name!r} has encoder {both.get('encoder')!r}, which is not supported")
    known = {key: value for key, value in params.items() if key in fields.model_fields}
    try:
        return FamilyConfig(encoder=both["encoder"], encoder_params=fields(**known), dataset=both.get("dataset"))
    except ValueError as error:
        raise DataError(f"{path}: family {name!r}: {' '.join(str(error).split())[:200]}") from None


def _row_shapes(
    configs: Mapping[str, FamilyConfig],
    saved: Mapping[str, Any],
    columns: int,
    data: str | None,
    path: Path,
) -> dict[str, tuple[int, ...]]:
    """Shapes of raw rows: from the data, else from the weights; one identity family takes the rest."""
    if data is not None:
        with FeatureSource(data, RunConfig(families=dict(configs)).datasets()) as source:
            return {name: source.datasets[name].row_shape for name in configs}
    shapes: dict[str, tuple[int, ...]] = {}
    rest = columns
    for name, config in configs.items():
        if name in saved and config.encoder == "MLPEncoder":
            weights = saved[name]["state_dict"]
            shapes[name] = (int(weights["encoder.0.weight"].shape[1]),)
            rest -= config.encoder_params.output_dim  # type: ignore[union-attr]
        elif name in saved and config.encoder == "TemporalCNNEncoder":
            shapes[name] = (ANY_LENGTH, int(saved[name]["state_dict"]["stage1.0.weight"].shape[1]))
            rest -= config.encoder_params.embedding_dim  # type: ignore[union-attr]
    open_names = [name for name in configs if name not in shapes]
    if len(open_names) > 1:
        raise DataError(f"{path}: the widths of {' and '.join(open_names)} are not stored; give --data")
    return shapes | dict.fromkeys(open_names, (rest,))


def _cleaner(
    payload: Mapping[str, Any],
    settings: Mapping[str, Any],
    keep: np.ndarray[Any, np.dtype[np.bool_]],
    families: list[FamilyEncoder],
    data: str | None,
) -> tuple[FeatureCleaner, bool, NDArray[np.float32] | None]:
    """The cleaner, whether its clip bounds are known, and the columns of the data where these are given."""
    given = {**(settings.get("feature_cleaning") or {}), **(payload.get("feature_cleaning_params") or {})}
    known = {key: given[key] for key in FeatureCleaningConfig.model_fields if given.get(key) is not None}
    # The original clips at multiples of the MAD itself.
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
    """The settings of the original run, as far as this package has them."""
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
