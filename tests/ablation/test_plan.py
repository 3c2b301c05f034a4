"""Variants, pairs of seeds, and what runs share."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from helpers import raises_one_line

from spinlock_fast.ablation.plan import (
    BASE,
    LOSS_WEIGHTS,
    PREPARATION_KEYS,
    Run,
    directory_name,
    plan_runs,
    plan_variants,
    shard_of,
)
from spinlock_fast.config.loading import check_config
from spinlock_fast.config.schema import RunConfig, TrainingConfig
from spinlock_fast.data import split
from spinlock_fast.errors import ConfigError
from spinlock_fast.features import categories, normalize
from spinlock_fast.models.losses import LossWeights
from spinlock_fast.training import preparation

CONFIG = RunConfig(random_seed=7)


def variants(
    drops: Sequence[str] = (),
    sets: Sequence[str] = (),
    levels: Sequence[int] = (),
    grid: bool = False,
    base: RunConfig = CONFIG,
) -> dict[str, RunConfig]:
    return {variant.label: variant.config for variant in plan_variants(base, drops, sets, levels, grid)[0]}


def runs(seeds: int = 3, base: RunConfig = CONFIG) -> list[Run]:
    planned, _ = plan_variants(base, ["family:temporal", "loss:vq"], ["feature_cleaning.mad_threshold=4"], [1], False)
    return plan_runs(planned, seeds, Path("out"), "data")


def test_each_variant_has_one_change() -> None:
    found = variants(["family:temporal", "loss:topo"], ["model.decay=0.9,0.95", "training.optimizer=adamw"])
    assert list(found) == [
        BASE,
        "drop family:temporal",
        "drop loss:topo",
        "model.decay=0.9",
        "model.decay=0.95",
        "training.optimizer=adamw",
    ]
    assert found[BASE] == CONFIG
    assert list(found["drop family:temporal"].families) == ["summary", "architecture"]
    assert found["drop loss:topo"].training == CONFIG.training.model_copy(update={"topo_weight": 0.0})
    assert found["model.decay=0.95"].model == CONFIG.model.model_copy(update={"decay": 0.95})


def test_grid_is_the_product_of_the_sets() -> None:
    found = variants(["loss:vq"], ["model.decay=0.9,0.95", "model.dropout=0.0,0.1"], grid=True)
    assert list(found) == [
        BASE,
        "drop loss:vq",
        "model.decay=0.9 model.dropout=0.0",
        "model.decay=0.9 model.dropout=0.1",
        "model.decay=0.95 model.dropout=0.0",
        "model.decay=0.95 model.dropout=0.1",
    ]
    assert (found["model.decay=0.95 model.dropout=0.0"].model.dropout) == 0.0


def test_a_value_may_be_a_list() -> None:
    sizes = '[{"num_tokens": 8, "latent_dim": 4}]'
    found = variants(sets=[f"model.levels={sizes},[]", "training.num_categories_auto=null,4"])
    assert [len(config.model.levels) for config in found.values()] == [0, 1, 0]  # [] is the base's value
    assert found["training.num_categories_auto=4"].training.num_categories_auto == 4


def test_levels_are_the_first_of_the_base() -> None:
    found = variants(levels=[1, 2])
    assert [config.model.compression_ratios for config in found.values()] == ["0.5:1:1.5", "0.5", "0.5:1"]
    sizes = [{"num_tokens": 8, "latent_dim": 4}, {"num_tokens": 4, "latent_dim": 4}]
    given = check_config({"model": {"levels": sizes}})
    assert [len(config.model.levels) for config in variants(levels=[1], base=given).values()] == [2, 1]
    by_category = check_config({"model": {"levels": {"a": sizes, "b": sizes}}})
    levels = variants(levels=[1], base=by_category)["levels=1"].model.levels
    assert isinstance(levels, dict)
    assert [len(entries) for entries in levels.values()] == [1, 1]


def test_settings_of_another_variant_are_left_out() -> None:
    planned, omitted = plan_variants(CONFIG, ["loss:topo", "loss:topographic"], ["model.decay=0.99"], [3], False)
    assert [variant.label for variant in planned] == [BASE, "drop loss:topo"]
    assert omitted == ["drop loss:topographic", "levels=3", "model.decay=0.99"]


def test_dropping_an_isolated_family() -> None:
    base = check_config({"training": {"isolated_families": ["temporal", "summary"]}})
    assert variants(["family:temporal"], base=base)["drop family:temporal"].training.isolated_families == ["summary"]


def test_names_of_losses_are_those_of_the_model() -> None:
    assert set(LossWeights._fields) == LOSS_WEIGHTS.keys() - {"topo"}
    assert {getattr(CONFIG.training, key) for key in LOSS_WEIGHTS.values()} == set(LossWeights.of(CONFIG.training))


@pytest.mark.parametrize(
    ("drops", "sets", "levels", "texts"),
    [
        (["family:temporl"], [], [], ["--drop family:temporl", "did you mean temporal", "architecture"]),
        (["loss:commitment"], [], [], ["--drop loss:commitment", "vq", "informativeness"]),
        (["temporal"], [], [], ["--drop 'temporal'", "family:NAME"]),
        (["familie:temporal"], [], [], ["family:NAME"]),
        ([], ["model.decai=0.9"], [], ["--set model.decai=0.9", "did you mean 'decay'"]),
        ([], ["model.decay=2"], [], ["--set model.decay=2", "got 2"]),
        ([], ["model.decay"], [], ["--set 'model.decay'", "key=value"]),
        ([], ["model.decay="], [], ["--set 'model.decay='", "key=value"]),
        ([], ["model.decay=0.9,["], [], ["not a list of YAML values"]),
        ([], ["random_seed=1,2"], [], ["--set random_seed", "--seeds"]),
        ([], ["output_dir=x"], [], ["--set output_dir", "--output"]),
        ([], ["training.val_fraction=0.2"], [], ["--set training.val_fraction", "--base"]),
        ([], [], [4], ["--levels 4", "1 to 3"]),
        ([], [], [], ["nothing to compare", "--drop"]),
    ],
)
def test_bad_variants(drops: list[str], sets: list[str], levels: list[int], texts: list[str]) -> None:
    with raises_one_line(ConfigError, *texts):
        variants(drops, sets, levels)


def test_the_only_family_and_the_only_loss_stay() -> None:
    one = check_config({"families": {"temporal": {}}})
    with raises_one_line(ConfigError, "--drop family:temporal", "only family"):
        variants(["family:temporal"], base=one)
    weights = dict.fromkeys(["vq_weight", "informativeness_weight", "topo_weight"], 0.0)
    with raises_one_line(ConfigError, "--drop loss:reconstruction", "at least one of"):
        variants(["loss:reconstruction"], base=check_config({"training": weights}))


def test_seeds_are_paired() -> None:
    planned = runs()
    assert [run.seed for run in planned[::5]] == [7, 8, 9]
    for variant in {run.variant for run in planned}:
        assert [run.seed for run in planned if run.variant == variant] == [7, 8, 9]
    assert all(run.config.random_seed == run.seed for run in planned)
    for seed in (7, 8, 9):
        rows = [split.split_rows(100, run.config.training, seed) for run in planned if run.seed == seed]
        assert all(np.array_equal(rows[0].val, other.val) for other in rows)


def test_runs_share_features_where_settings_allow() -> None:
    first = {run.variant: run.preparation for run in runs() if run.seed == 7}
    assert first[BASE] == first["drop loss:vq"] == first["levels=1"]
    assert len(set(first.values())) == 3  # the base, a family less, another cleaning
    assert len({run.preparation for run in runs()}) == 9


def test_preparation_keys_are_all_that_preparation_reads() -> None:
    """Attributes named as settings of `training` in the modules that prepare features."""
    read = set()
    for module in (preparation, categories, split, normalize):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.Attribute) and node.attr in TrainingConfig.model_fields:
                read.add(node.attr)
    assert read <= PREPARATION_KEYS


def test_shards_divide_the_runs() -> None:
    planned = runs()
    parts = [shard_of(planned, part, 4) for part in range(4)]
    assert [run for part in parts for run in part] == planned
    assert {len(part) for part in parts} <= {3, 4}
    assert [len(shard_of(planned[:2], part, 4)) for part in range(4)] == [0, 1, 0, 1]


def test_directories_are_distinct_and_safe() -> None:
    labels = ["a=1", "a=/1", "a=\\1", "..", "a=" + 80 * "x", "a=" + 80 * "x" + "y", "drop family:x", "a=ü", "-x"]
    names = [directory_name(label) for label in labels]
    assert len(set(names)) == len(labels)
    assert all(name.isascii() and "/" not in name and not name.startswith((".", "-")) for name in names)
