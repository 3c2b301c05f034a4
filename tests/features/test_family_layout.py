"""Families found in a file: `families: auto`, and names without `dataset` or `encoder`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from helpers import ARCHITECTURE, SUMMARY, TEMPORAL, TRAJECTORIES, raises_one_line, write_arrays, write_dataset

from spinlock_fast import Tokenizer
from spinlock_fast.config.loading import load_config, make_config
from spinlock_fast.errors import ConfigError, DataError
from spinlock_fast.features.family_layout import resolve_families
from spinlock_fast.tokenize import main as tokenize_main
from spinlock_fast.train import main as train_main

ROWS = 40


def found(path: Path, families: Any = "auto", **settings: Any) -> dict[str, tuple[str, str | None]]:
    config = resolve_families(make_config({"dataset_path": str(path), "families": families, **settings}, {}))
    return {name: (family.encoder, family.dataset) for name, family in config.families.items()}


def file_of(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    rng = np.random.default_rng(0)
    return write_arrays(path, {name: rng.standard_normal((ROWS, *shape)) for name, shape in shapes.items()})


def test_families_of_the_documented_layout(tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "data.h5", ROWS, seed=0)
    expected = {"summary": ("IdentityEncoder", SUMMARY), "temporal": ("StatisticsEncoder", TEMPORAL)}
    assert found(path) == expected  # without the parameters
    named = found(path, {"architecture": {}, "summary": {"dataset": TRAJECTORIES}, "temporal": {"standardize": True}})
    assert named == {
        "architecture": ("IdentityEncoder", ARCHITECTURE),
        "summary": ("StatisticsEncoder", TRAJECTORIES),
        "temporal": ("StatisticsEncoder", TEMPORAL),
    }


def test_other_names_and_places(tmp_path: Path) -> None:
    path = file_of(
        tmp_path / "data.h5",
        {
            "features/mine": (5,),
            "features/wide/features": (1025,),
            "features/narrow/aggregated/features": (1024,),
            "features/series/deep/values": (6, 2),
            "features/one_step/features": (1, 4),
            "parameters/params": (3,),
        },
    )
    with h5py.File(path, "a") as file:
        file["features/text/labels"] = ["a"] * ROWS
        file["features/scalars"] = np.zeros(ROWS)
    assert found(path) == {
        "mine": ("IdentityEncoder", "features/mine"),
        "narrow": ("IdentityEncoder", "features/narrow/aggregated/features"),
        "one_step": ("IdentityEncoder", "features/one_step/features"),
        "series": ("StatisticsEncoder", "features/series/deep/values"),
        "wide": ("MLPEncoder", "features/wide/features"),
    }
    assert found(path, {"series": {"encoder": "TemporalCNNEncoder"}})["series"][0] == "TemporalCNNEncoder"


def test_only_parameters_are_a_family(tmp_path: Path) -> None:
    path = file_of(tmp_path / "data.h5", {ARCHITECTURE: (5,)})
    assert list(found(path)) == ["architecture"]


@pytest.mark.parametrize(
    ("shapes", "families", "texts"),
    [
        ({"a/b": (3,)}, "auto", ["families: auto", "families.NAME.dataset", "a/b"]),
        (
            {"features/a": (2, 2, 2)},
            "auto",
            ["dataset features/NAME", "but features/a is float", "[40, 2, 2, 2]"],
        ),
        ({}, "auto", ["dataset features/NAME of real numbers [N, D] or [N, T, D]"]),
        ({"features/a b": (3,)}, "auto", ["features/a b", "letters"]),
        ({"features/a/x": (3,), "features/a/y": (3,)}, "auto", ["'a'", "several", "features/a/x, features/a/y"]),
        ({"features/speed": (3,)}, {"sped": {}}, ["no dataset features/sped", "nearest is features/speed"]),
        ({"features/a/x": ()}, {"a": {}}, ["features/a is a group"]),
        ({"features/a": ()}, {"a": {}}, ["features/a is not a 2-D or 3-D"]),
        ({"features/a": (2, 2, 2)}, {"a": {"dataset": "features/a"}}, ["2-D or 3-D", "'a'"]),
    ],
)
def test_what_cannot_be_found_is_named(
    tmp_path: Path, shapes: dict[str, tuple[int, ...]], families: Any, texts: list[str]
) -> None:
    path = file_of(tmp_path / "data.h5", shapes)
    with raises_one_line(DataError, str(path), *texts):
        found(path, families)


def test_settings_that_name_a_missing_family(tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "data.h5", ROWS, seed=0)
    with raises_one_line(ConfigError, "isolated_families", "'nobody'", "summary, temporal"):
        found(path, training={"isolated_families": ["nobody"]})
    with raises_one_line(ConfigError, "dataset_path"):
        resolve_families(make_config({"families": "auto"}, {}))


def test_a_run_writes_the_families_that_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The checkpoint of `families: auto` needs no guessing, also after the file has another family."""
    data = write_dataset(tmp_path / "data.h5", 120, seed=0)
    config = tmp_path / "run.yaml"
    training = {"num_epochs": 1, "batch_size": 64, "topo_samples": 64}
    config.write_text(json.dumps({"families": "auto", "device": "cpu", "training": training}))
    arguments = [str(config), "--set", f"dataset_path={data}", "--output", str(tmp_path / "out")]
    for extra, status in ((["--dry-run"], 0), (["--quiet"], 0), (["--resume", str(tmp_path / "out")], 0)):
        with pytest.raises(SystemExit) as end:
            train_main([*arguments, *extra, *(["--set", "training.num_epochs=2"] if extra[0] == "--resume" else [])])
        assert (end.value.code or 0) == status, capsys.readouterr().err
    assert "StatisticsEncoder" in capsys.readouterr().out
    families = load_config(tmp_path / "out" / "config.yaml").families
    assert {name: family.dataset for name, family in families.items()} == {"summary": SUMMARY, "temporal": TEMPORAL}
    with h5py.File(data, "a") as file:
        file["features/later"] = np.zeros((120, 3))
    with pytest.raises(SystemExit) as end:
        tokenize_main([str(tmp_path / "out"), str(data), "--output", str(tmp_path / "tokens.h5"), "--quiet"])
    assert (end.value.code or 0) == 0
    assert [family.name for family in Tokenizer.from_checkpoint(tmp_path / "out").families] == ["summary", "temporal"]
