"""The plan of an ablation: variants of a base configuration, each trained with the same seeds."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from spinlock_fast.ablation.choices import nearest_or_all
from spinlock_fast.config.loading import apply_overrides, parse_yaml
from spinlock_fast.config.schema import RunConfig, parse_ratios
from spinlock_fast.errors import ConfigError
from spinlock_fast.messages import one_line, shown

BASE = "base"
RUNS = "runs"

# Loss terms by the names of `models.losses.LossTerms`, and their settings.
LOSS_WEIGHTS = {
    "reconstruction": "reconstruction_weight",
    "vq": "vq_weight",
    "orthogonality": "orthogonality_weight",
    "informativeness": "informativeness_weight",
    "topographic": "topo_weight",
    "topo": "topo_weight",
}

# Settings of `training` that the features depend on, besides the other sections of `_PREPARATION_SECTIONS`.
PREPARATION_KEYS = {
    "val_fraction",
    "test_fraction",
    "normalization_method",
    "category_assignment",
    "num_categories_auto",
    "orthogonality_target",
    "min_features_per_category",
    "max_clusters",
    "isolated_families",
}
_PREPARATION_SECTIONS = {"dataset_path", "data", "memory_budget", "random_seed", "families", "feature_cleaning"}

# Sections and keys that do not change a result; the contents of the data are compared instead of their path.
_NO_EFFECT = {"dataset_path", "data", "memory_budget", "device", "logging", "output_dir"}

# Keys that a variant cannot change, and why.
_FIXED_KEYS = {
    "random_seed": "--seeds sets the seeds of all variants",
    "output_dir": "--output sets the directory of all runs",
    "training.checkpoint_dir": "--output sets the directory of all runs",
    "dataset_path": "variants are compared on the same rows; --base changes all variants",
    "training.val_fraction": "variants are compared on the same validation rows; --base changes all variants",
    "training.test_fraction": "variants are compared on the same validation rows; --base changes all variants",
    "training.init_from": "every variant is trained from scratch",
    "training.freeze": "every variant is trained from scratch",
    "device": "--device sets the device of all runs",
}


@dataclass(frozen=True)
class Variant:
    """A changed base configuration."""

    label: str
    config: RunConfig


@dataclass(frozen=True)
class Run:
    """One training: a variant with a seed.

    Attributes:
        position: number of the variant in the table.
        identity: hash of the settings and of the data; an earlier result with another one is not reused.
        preparation: hash of the settings that the features depend on.
    """

    variant: str
    position: int
    seed: int
    config: RunConfig = field(compare=False)  # `identity` stands for it
    directory: Path
    identity: str
    preparation: str

    @property
    def name(self) -> str:
        """Variant and seed, for messages."""
        return f"{self.variant}, seed {self.seed}"


def plan_variants(
    base: RunConfig, drops: Sequence[str], sets: Sequence[str], levels: Sequence[int], grid: bool
) -> tuple[list[Variant], list[str]]:
    """The base and its variants, without those with the settings of an earlier one.

    Args:
        base: with the names of its families, see `resolve_families`.
        drops: texts such as "family:temporal" and "loss:topographic"; each is one variant.
        sets: texts such as "model.decay=0.9,0.99"; each value is one variant.
        levels: numbers of levels of each category; each is one variant.
        grid: combine the values of different `sets` with each other.

    Returns:
        The variants, the base first, and the labels of those that were left out.

    Raises:
        ConfigError: a name, key or value is wrong, or there is nothing to compare.
    """
    variants = [Variant(BASE, base), *(_without(base, text) for text in drops)]
    variants += (_with_levels(base, number) for number in levels)
    choices = [list(_values(text)) for text in sets]
    combined = itertools.product(*choices) if grid and choices else ((value,) for value in itertools.chain(*choices))
    for changes in combined:
        label = " ".join(f"{key}={text}" for key, _, text in changes)
        try:
            config = apply_overrides(base, {key: value for key, value, _ in changes})
        except ConfigError as error:
            problems = [line.removeprefix("configuration: ") for line in error.lines]
            raise ConfigError(*(f"--set {label}: {problem}" for problem in problems)) from None
        variants.append(Variant(label, config))
    if len(variants) == 1:
        raise ConfigError("nothing to compare with the base: give --drop, --set or --levels")
    kept: dict[str, Variant] = {}
    omitted = []
    for variant in variants:
        if kept.setdefault(_hash(_settings(variant.config)), variant) is not variant:
            omitted.append(variant.label)
    return list(kept.values()), omitted


def plan_runs(variants: Sequence[Variant], seeds: int, output: Path, data: str) -> list[Run]:
    """The runs of all variants, seed by seed, so that the first seed of all variants is done first.

    Args:
        seeds: number of seeds, counted from the base's `random_seed`.
        output: directory of the ablation.
        data: identifies the data, see `data_identity`.
    """
    first = variants[0].config.random_seed
    runs = []
    for seed in range(first, first + seeds):
        for position, variant in enumerate(variants):
            directory = output / RUNS / directory_name(variant.label) / f"seed-{seed}"
            update = {"random_seed": seed, "output_dir": str(directory)}
            config = variant.config.model_copy(update=update)
            settings = {**_settings(config), "data": data}
            runs.append(
                Run(variant.label, position, seed, config, directory, _hash(settings), _preparation_hash(config))
            )
    return runs


def shard_of(runs: Sequence[Run], part: int, parts: int) -> list[Run]:
    """Part `part` of `parts`, counted from 0: a block of the runs, since neighbours share their features."""
    return list(runs[part * len(runs) // parts : (part + 1) * len(runs) // parts])


def directory_name(label: str) -> str:
    """The name of a variant's directory: its label, with a hash where characters were replaced or cut off."""
    name = re.sub(r"[^A-Za-z0-9_.=-]+", "-", label)[:60]
    changed = name != re.sub(r"[ :]", "-", label) or name.startswith((".", "-"))
    return f"v{name}-{hashlib.sha256(label.encode()).hexdigest()[:8]}" if changed else name


def _without(base: RunConfig, text: str) -> Variant:
    """The base without a family or a loss term."""
    kind, colon, name = text.partition(":")
    if not colon or kind not in ("family", "loss"):
        raise ConfigError(f"--drop {shown(text)}: expected family:NAME or loss:NAME")
    names = list(base.families if kind == "family" else LOSS_WEIGHTS)
    if name not in names:
        raise ConfigError(f"--drop {text}: no such {kind}; {nearest_or_all(name, names)}")
    if kind == "family":
        families = {key: family for key, family in base.families.items() if key != name}
        if not families:
            raise ConfigError(f"--drop {text}: it is the only family")
        isolated = [other for other in base.training.isolated_families if other != name]
        training = base.training.model_copy(update={"isolated_families": isolated})
        return Variant(f"drop {text}", base.model_copy(update={"families": families, "training": training}))
    try:
        config = apply_overrides(base, {f"training.{LOSS_WEIGHTS[name]}": 0.0})
    except ConfigError as error:
        raise ConfigError(f"--drop {text}: {error.lines[0].removeprefix('configuration: ')}") from None
    return Variant(f"drop {text}", config)


def _with_levels(base: RunConfig, number: int) -> Variant:
    """The base with the first levels of each category."""
    levels = base.model.levels
    ratios = base.model.compression_ratios.split(":")
    most = min(map(len, levels.values())) if isinstance(levels, dict) else len(levels or ratios)
    if not 1 <= number <= most:
        raise ConfigError(f"--levels {number}: the base has {most}; choose from 1 to {most}, or --set model.levels")
    update: dict[str, Any] = {"levels": levels[:number]} if isinstance(levels, list) else {}
    if not levels:
        update = {"compression_ratios": ":".join(ratios[:number])}
        parse_ratios(update["compression_ratios"])
    elif isinstance(levels, dict):
        update = {"levels": {name: list(sizes[:number]) for name, sizes in levels.items()}}
    return Variant(f"levels={number}", base.model_copy(update={"model": base.model.model_copy(update=update)}))


def _values(text: str) -> Iterator[tuple[str, Any, str]]:
    """(key, value, text of the value) of "model.decay=0.9,0.99", whose right side is a YAML list without brackets."""
    key, equals, right = text.partition("=")
    key = key.strip()
    if not equals or not key or not right.strip():
        raise ConfigError(f"--set {shown(text)}: expected key=value,value such as model.decay=0.9,0.99")
    if key in _FIXED_KEYS:
        raise ConfigError(f"--set {key}: {_FIXED_KEYS[key]}")
    try:
        values = parse_yaml(f"[{right}]")
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {shown(text)}: not a list of YAML values: {one_line(error)}") from None
    for value in values:
        yield key, value, value if isinstance(value, str) else json.dumps(value, default=str)


def _settings(config: RunConfig) -> dict[str, Any]:
    """The settings that a result depends on, besides the contents of the data."""
    return {key: value for key, value in config.model_dump(mode="json").items() if key not in _NO_EFFECT}


def _preparation_hash(config: RunConfig) -> str:
    settings = config.model_dump(mode="json")
    training = {key: settings["training"][key] for key in sorted(PREPARATION_KEYS)}
    return _hash({**{key: settings[key] for key in sorted(_PREPARATION_SECTIONS)}, "training": training})


def _hash(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]
