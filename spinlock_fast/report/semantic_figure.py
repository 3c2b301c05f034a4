"""The semantic dashboard: what the categories are made of, and what their tokens tell."""

from __future__ import annotations

import math
import textwrap
from itertools import groupby
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from spinlock_fast.features.categories import max_off_diagonal
from spinlock_fast.features.names import column_of, family_of
from spinlock_fast.plot_style import FOCUS, INK, MAGNITUDE
from spinlock_fast.report.category_panels import CategoryPanels
from spinlock_fast.report.checkpoint_summary import CheckpointSummary
from spinlock_fast.report.condition_associations import associate
from spinlock_fast.report.data_statistics import DataStatistics
from spinlock_fast.report.layout import Row, create_page, fix_layout
from spinlock_fast.report.style import (
    add_colour_bar,
    add_heading,
    family_fills,
    heading_height,
    heat_map,
    labelled_ticks,
    range_text,
    remove_frame,
    shorten,
    unique_labels,
    write_table,
)
from spinlock_fast.report.vocabulary_changes import category_changes
from spinlock_fast.report.vocabulary_panels import draw_codes, draw_tokens

_NAMED_FEATURES = 32  # more names do not fit along an axis
_STRIP = 0.16  # height of the family strip in inches


def draw_semantic(summary: CheckpointSummary, statistics: DataStatistics | None) -> Figure:
    """Categories and their members, what their tokens tell, correlations, and the information of the tokens.

    For a run from another checkpoint, also what has changed in its vocabulary.
    """
    associations = None
    if statistics is not None and statistics.conditions:
        associations = associate(summary.tokenizer, statistics.tokens, statistics.conditions)
    panels = CategoryPanels(summary, statistics, associations)
    count = len(summary.categories)
    named = len(summary.feature_names) <= _NAMED_FEATURES
    side = min(max(1.5, 0.13 * count), 3.2)
    margin = 2.1 if named else 1.3
    widths = (2.0, 0.85 * max(side, 2.0) / 2.0, 1.35) if statistics is not None else (2.0, 1.2)
    changes = category_changes(summary.vocabulary)
    rows = [Row(panels.height, panels.margin, panels.widths), Row(side, margin, widths)]
    rows += [Row(side, 1.4, (1.4, 1.0))] if changes else []
    figure, grid = create_page("Semantics", summary, rows)
    panels.draw(figure, grid[0])
    order = [i for members in summary.groups for i in members]
    features = figure.add_subplot(grid[1][0])
    _draw_features(features, summary, statistics, order, side)
    share = _STRIP / side
    _draw_strip(features.inset_axes((0.0, -1.35 * share, 1.0, share), sharex=features), summary, order, named)
    if statistics is not None:
        _draw_correlation(figure.add_subplot(grid[1][1]), summary, statistics, side)
    _write_capacity(figure.add_subplot(grid[1][-1]), summary, statistics, side)
    if changes:
        start = shorten(Path(summary.vocabulary["init_from"]["name"]).name, 30)
        draw_codes(figure.add_subplot(grid[2][0]), changes, start, side)
        draw_tokens(figure.add_subplot(grid[2][1]), changes, side)
    return fix_layout(figure)


def _draw_features(
    ax: Axes, summary: CheckpointSummary, statistics: DataStatistics | None, order: list[int], side: float
) -> None:
    """The category of each feature; with data, its correlation with every category."""
    sizes = [len(members) for members in summary.groups]
    starts = np.cumsum([0, *sizes[:-1]])
    if statistics is not None:
        image = heat_map(ax, statistics.affinity[:, order], MAGNITUDE, 0.0, 1.0)
        for row, (start, size) in enumerate(zip(starts, sizes, strict=True)):
            ax.add_patch(Rectangle((start - 0.5, row - 0.5), size, 1, fill=False, edgecolor=INK, linewidth=0.8))
        add_colour_bar(image, ax, "mean |r|", 0.015)
        caption = (
            "Mean |correlation| of each feature with the (other) features of each category, "
            f"on {statistics.correlation_on} of {shorten(statistics.name, 40)}. Framed: the feature's own category."
        )
    else:
        ax.barh(range(len(sizes)), sizes, left=starts - 0.5, height=0.8, color=FOCUS)
        ax.set_xlim(-0.5, len(order) - 0.5)
        caption = "Each column is a feature of one category."
    shown = labelled_ticks(len(sizes), side)
    labels = unique_labels(summary.categories, 16)
    ax.set_yticks(list(shown), [labels[c] for c in shown])
    ax.set_ylim(len(sizes) - 0.5, -0.5)
    ax.tick_params(axis="x", bottom=False, labelbottom=False)
    ax.tick_params(axis="y", length=0)
    add_heading(ax, "Features and categories", caption, 4.6, room=heading_height(3))


def _draw_strip(ax: Axes, summary: CheckpointSummary, order: list[int], named: bool) -> None:
    """Colours each feature by its family."""
    fills = dict(zip(summary.families, family_fills(len(summary.families)), strict=True))
    start = 0
    for family, members in groupby(order, key=lambda i: family_of(summary.feature_names[i])):
        size = len(list(members))
        ax.add_patch(Rectangle((start - 0.5, 0), size, 1, **fills[family]))
        start += size
    remove_frame(ax)
    ax.set_ylim(0, 1)
    ax.set_yticks([0.5], ["family"])
    ax.tick_params(length=0)
    if named:
        names = [column_of(summary.feature_names[i]) for i in order]
        ax.set_xticks(range(len(order)), unique_labels(names, 20), rotation=90)
    else:
        outside = len(summary.feature_names) - len(order)
        ax.set_xlabel(f"{len(order):,} features" + (f"; {outside:,} more in no category" if outside else ""))


def _draw_correlation(ax: Axes, summary: CheckpointSummary, statistics: DataStatistics, side: float) -> None:
    values = statistics.category_correlation
    count = len(values)
    image = heat_map(ax, values, MAGNITUDE, 0.0, 1.0, aspect="equal")
    shown = labelled_ticks(count, side)
    ax.set_yticks(list(shown), [str(c + 1) for c in shown])
    ax.set_xticks(list(shown), [str(c + 1) for c in shown], rotation=90 if count > 9 else 0)
    ax.set_xlabel("category")
    ax.set_ylabel("category")
    add_colour_bar(image, ax, "mean |r|", 0.1 / side)
    caption = "Mean |correlation| of their features."
    if count > 1:
        caption += f" Largest off the diagonal: {max_off_diagonal(values):.3f}"
        target = summary.config.training.orthogonality_target if summary.config else None
        caption += f" (target {target:g})." if target is not None else "."
    if np.isnan(values).any():
        caption += " Grey: one feature."
    add_heading(ax, "Categories", caption, max(side, 2.4), room=heading_height(3))


def _write_capacity(ax: Axes, summary: CheckpointSummary, statistics: DataStatistics | None, side: float) -> None:
    """Upper bounds of the information in all tokens of a sample."""
    bits = sum(math.log2(codebook.codes) for codebook in summary.codebooks)
    rows = [
        ["tokens per sample", f"{len(summary.codebooks):,}"],
        ["codes per token", range_text([codebook.codes for codebook in summary.codebooks])],
        ["capacity, sum of log2 K", f"{bits:,.1f} bits"],
    ]
    entropy = summary.per_category("perplexity")
    if entropy is not None:
        perplexity = [entropy[codebook.category][codebook.level] for codebook in summary.codebooks]
        rows.append(["in use, sum of log2 perplexity", f"{sum(math.log2(max(p, 1.0)) for p in perplexity):,.1f} bits"])
    if statistics is not None:
        rows.append(["tokens of the first row", ""])
        rows += [[line, ""] for line in _first_row(summary, statistics)]
    write_table(ax, rows, (0.0, 1.0), height=side)
    caption = f"Perplexity on {summary.measured_on}." if entropy is not None else ""
    add_heading(ax, "Information of the tokens", caption, 3.2, room=heading_height(3))


def _first_row(summary: CheckpointSummary, statistics: DataStatistics, most: int = 50) -> list[str]:
    """The tokens of the first row, category by category, in at most two lines."""
    tokens = statistics.tokens[0]
    texts = [
        "/".join(str(tokens[g]) for g, codebook in enumerate(summary.codebooks) if codebook.category == c)
        for c in range(len(summary.categories))
    ]
    lines = textwrap.wrap(
        "  ".join(texts), most, fix_sentence_endings=False, break_long_words=False, break_on_hyphens=False
    )
    return lines if len(lines) <= 2 else [lines[0], f"{lines[1]}  …"]
