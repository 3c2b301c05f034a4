"""Feature names: "family::name"."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


def family_of(feature_name: str) -> str:
    """The family of a name: "summary" for "summary::summary_12", "features" for a name without family."""
    family, separator, _ = feature_name.partition("::")
    return family if separator else "features"


def column_of(feature_name: str) -> str:
    """The column of a name: "energy::mean" for "temporal::energy::mean", the whole name without family."""
    family, separator, column = feature_name.partition("::")
    return column if separator else family


def count_families(feature_names: Sequence[str], members: Sequence[int]) -> dict[str, int]:
    """Number of features of each family among `members`, in order of appearance."""
    return dict(Counter(family_of(feature_names[i]) for i in members))
