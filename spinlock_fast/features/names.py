"""Feature names: "family::name"."""

from __future__ import annotations

from collections.abc import Sequence


def family_of(feature_name: str) -> str:
    """The family of a name: "summary" for "summary::summary_12", "features" for a name without family."""
    family, separator, _ = feature_name.partition("::")
    return family if separator else "features"


def count_families(feature_names: Sequence[str], members: Sequence[int]) -> dict[str, int]:
    """Number of features of each family among `members`, in order of appearance."""
    counts: dict[str, int] = {}
    for i in members:
        family = family_of(feature_names[i])
        counts[family] = counts.get(family, 0) + 1
    return counts
