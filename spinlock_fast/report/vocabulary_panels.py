"""Panels on what a run from another checkpoint changed in its vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from spinlock_fast.plot_style import FOCUS, MISSING, PALETTE, SMALL
from spinlock_fast.report.style import add_heading, heading_height, labelled_ticks, legend_above, unique_labels
from spinlock_fast.report.vocabulary_changes import DATA, EXPLANATION, CategoryChanges


def draw_codes(ax: Axes, changes: Sequence[CategoryChanges], start: str, height: float) -> None:
    """Kept, moved and replaced codes of each category as bars; died and newly used ones as numbers."""
    places = range(len(changes))
    parts = {
        "kept, not moved": (MISSING, [row.kept - row.moved for row in changes]),
        "kept, moved": (PALETTE[0], [row.moved for row in changes]),
        "replaced": (PALETTE[1], [row.replaced for row in changes]),
    }
    left = np.zeros(len(changes))
    for name, (colour, values) in parts.items():
        ax.barh(places, values, left=left, height=0.7, label=name, color=colour)
        left += values
    for place in labelled_ticks(len(changes), height):
        text = f"-{changes[place].died}  +{changes[place].newly_used}"
        ax.annotate(text, (left[place], place), (4, 0), textcoords="offset points", va="center", fontsize=SMALL)
    ax.set_xlim(0, 1.2 * left.max())
    ax.set_xlabel("codes")
    _category_axis(ax, changes, height)
    text = f"{EXPLANATION} Numbers: - died, + newly used."
    add_heading(ax, f"Vocabulary, compared with {start}", text, 5.5, 1, room=heading_height(4, 1))
    legend_above(ax, len(parts))


def draw_tokens(ax: Axes, changes: Sequence[CategoryChanges], height: float) -> None:
    """Share of equal tokens of each category, by the old and the new model on the same rows."""
    for data, marker, colour in (("new_data", "o", FOCUS), ("old_data", "D", PALETTE[1])):
        known = [(row.equal_tokens[data], c) for c, row in enumerate(changes) if data in row.equal_tokens]
        if known:
            ax.plot(*zip(*known, strict=True), marker, color=colour, markersize=5, label=DATA[data], clip_on=False)
    ax.set_xlim(0.0, 1.0)
    ax.grid(axis="x")
    ax.set_xlabel("share of equal tokens")
    _category_axis(ax, changes, height)
    text = "Tokens that the old and the new model assign to the same rows, mean over the codebooks of a category."
    add_heading(ax, "Old tokens against new", text, 4.0, 1, room=heading_height(4, 1))
    legend_above(ax, 2)


def _category_axis(ax: Axes, changes: Sequence[CategoryChanges], height: float) -> None:
    labels = unique_labels([row.category for row in changes], 16)
    shown = labelled_ticks(len(changes), height)
    ax.set_yticks(list(shown), [labels[c] for c in shown])
    ax.set_ylim(len(changes) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
