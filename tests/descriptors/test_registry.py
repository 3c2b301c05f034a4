"""The feature registry and docs/features.md."""

from __future__ import annotations

from pathlib import Path

from spinlock_fast.descriptors.registry import (
    PER_TRAJECTORY,
    TEMPORAL,
    aggregated_names,
    registry,
    temporal_names,
    trajectory_names,
)
from spinlock_fast.simulate.feature_page import markdown


def test_number_of_columns() -> None:
    assert [len(features) for features in TEMPORAL.values()] == [19, 27, 17]
    assert len(temporal_names()) == 63
    assert len(trajectory_names()) == 120
    assert len(aggregated_names()) == 360
    assert sum(len(features) for group, features in PER_TRAJECTORY.items() if group != "operator_sensitivity") == 110
    assert list(PER_TRAJECTORY)[-1] == "operator_sensitivity"
    assert len(PER_TRAJECTORY["operator_sensitivity"]) == 10


def test_names_are_distinct_and_every_feature_is_explained() -> None:
    for names in (temporal_names(), trajectory_names(), aggregated_names()):
        assert len(set(names)) == len(names)
    for groups in (TEMPORAL, PER_TRAJECTORY):
        for features in groups.values():
            assert all(all(feature) for feature in features)


def test_columns_of_the_registry_are_those_of_the_names() -> None:
    for family, names in (("temporal", temporal_names()), ("summary", trajectory_names())):
        columns = {
            f"{group}_{name}": entry["column"]
            for group, features in registry()[family].items()
            for name, entry in features.items()
        }
        assert columns == {name: i for i, name in enumerate(names)}


def test_the_page_is_that_of_the_registry() -> None:
    page = Path(__file__).parents[2] / "docs" / "features.md"
    assert page.read_text(encoding="utf-8") == markdown()
