"""What a run from another checkpoint changed in the codes and tokens of each category, from vocabulary.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MOVED = 0.1  # shift of a moved code, in distances between neighbouring codes
EXPLANATION = (
    "A kept code is nearest to its own old position, a replaced code to that of another code. Moved: kept codes whose "
    f"position changed by at least {MOVED:g} of the distance between neighbouring codes. Of the rows of the new data, "
    "the old model alone assigns the codes that died, the new model alone those that are newly used."
)
DATA = {"new_data": "new data", "old_data": "old data"}


@dataclass(frozen=True)
class CategoryChanges:
    """Sums over the codebooks of a category.

    Args:
        moved: number of the kept codes that have moved.
        equal_tokens: mean share of the tokens that are equal, by data set; those that were not compared are left out.
    """

    category: str
    codes: int
    kept: int
    moved: int
    replaced: int
    died: int
    newly_used: int
    equal_tokens: dict[str, float]


def category_changes(vocabulary: Mapping[str, Any]) -> list[CategoryChanges]:
    """The changes of each category; none without a vocabulary."""
    books: dict[str, list[Mapping[str, Any]]] = {}
    for book in vocabulary.get("codebooks", []):
        books.setdefault(book["name"].rpartition("/")[0], []).append(book)
    return [_changes(category, own) for category, own in books.items()]


def _changes(category: str, books: Sequence[Mapping[str, Any]]) -> CategoryChanges:
    shifts = np.concatenate([np.delete(book["shift"], book["replaced"]) for book in books])
    return CategoryChanges(
        category,
        codes=sum(book["codes"] for book in books),
        kept=len(shifts),
        moved=int(np.count_nonzero(shifts >= MOVED)),
        replaced=sum(len(book["replaced"]) for book in books),
        died=sum(len(book["new_data"]["died"]) for book in books),
        newly_used=sum(len(book["new_data"]["newly_used"]) for book in books),
        equal_tokens={
            data: float(np.mean([book[data]["equal_tokens"] for book in books]))
            for data in DATA
            if all(book.get(data) for book in books)
        },
    )
