"""The semantic dashboard: features of the categories, and the information capacity of the tokens."""

from __future__ import annotations

import math
from itertools import groupby

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from spinlock_fast.features.categories import max_off_diagonal
from spinlock_fast.features.names import family_of
from spinlock_fast.plot_style import FAINT, MAGNITUDE, NEUTRAL, SMALL
from spinlock_fast.report.checkpoint_summary import CheckpointSummary
from spinlock_fast.report.data_statistics import DataStatistics
from spinlock_fast.report.layout import Row, create_page, fix_layout
from spinlock_fast.report.style import (
    add_colour_bar,
    add_heading,
    annotate_cells,
    category_colours,
    family_fills,
    heading_height,
    heat_map,
    labelled_ticks,
    legend_above,
    legend_shape,
    remove_frame,
    shorten,
    unique_labels,
    write_table,
)

_NAMED_FEATURES = 32  # more names do not fit along an axis
_WRITTEN_CELLS = 12  # categories; with more, numbers do not fit into the cells of the correlation matrix
_STRIP = 0.16  # height of the family strip in inches


def draw_semantic(summary: CheckpointSummary, statistics: DataStatistics | None) -> Figure:
    """Features by category and family, structure of the tokens, correlation of the categories."""
    count = len(summary.categories)
    named = len(summary.feature_names) <= _NAMED_FEATURES
    height = max(0.7, count * (0.22 if count <= _WRITTEN_CELLS else 0.14))
    square = max(1.3, count * (0.32 if count <= _WRITTEN_CELLS else 0.14))
    families = Row(0.24 * max(len(summary.families), 4), 0.75, (0.85, 1.3))
    _, legend_rows = legend_shape(_family_labels(summary), 2.7)
    margin = (2.1 if named else 1.3) + 0.15 * (legend_rows - 1)
    if statistics is not None:
        widths = (0.62, 1.12, 1.3) if count <= _WRITTEN_CELLS else (0.5, 0.95, 1.6)
        rows = [Row(height, margin, (2.1, 1.0)), Row(square, 0.95, widths), families]
    else:
        rows = [Row(height, margin, (1.5, 0.95, 0.6)), families]
    figure, grid = create_page("Semantics", summary, rows)
    order = [i for members in summary.groups for i in members]
    upper = figure.add_subplot(grid[0][0])
    _draw_features(upper, summary, statistics, order)
    share = _STRIP / height
    _draw_strip(upper.inset_axes((0.0, -1.35 * share, 1.0, share), sharex=upper), summary, order, named)
    _draw_sizes(figure.add_subplot(grid[0][1]), summary)
    room = heading_height(2) if statistics is not None else _upper_heading_height(summary)
    _draw_tokens(figure.add_subplot(grid[1][0] if statistics is not None else grid[0][2]), summary, room)
    if statistics is not None:
        _write_central_features(figure.add_subplot(grid[1][1]), summary, statistics)
        _draw_correlation(figure.add_subplot(grid[1][2]), summary, statistics)
    _draw_families(figure.add_subplot(grid[-1][0]), summary)
    _write_capacity(figure.add_subplot(grid[-1][1]), summary, statistics)
    return fix_layout(figure)


def _draw_features(ax: Axes, summary: CheckpointSummary, statistics: DataStatistics | None, order: list[int]) -> None:
    """The category of each feature; with data, its correlation with every category."""
    sizes = [len(members) for members in summary.groups]
    starts = np.cumsum([0, *sizes[:-1]])
    if statistics is not None:
        image = heat_map(ax, statistics.affinity[:, order], MAGNITUDE, 0.0, 1.0)
        for row, (start, size) in enumerate(zip(starts, sizes, strict=True)):
            ax.add_patch(Rectangle((start - 0.5, row - 0.5), size, 1, fill=False, edgecolor="white", linewidth=1.0))
        add_colour_bar(image, ax, "mean |r|", 0.015)
        caption = (
            "Mean |correlation| of each feature with the (other) features of each category, "
            f"on {statistics.correlation_on} of {shorten(statistics.name, 40)}. Framed: the feature's own category."
        )
    else:
        colours = category_colours(len(sizes)) or NEUTRAL
        ax.barh(range(len(sizes)), sizes, left=starts - 0.5, height=0.8, color=colours)
        ax.set_xlim(-0.5, len(order) - 0.5)
        caption = "Each column is a feature of one category."
    ax.set_yticks(range(len(sizes)), unique_labels(summary.categories, 22))
    ax.set_ylim(len(sizes) - 0.5, -0.5)
    ax.tick_params(axis="x", bottom=False, labelbottom=False)
    ax.tick_params(axis="y", length=0)
    add_heading(ax, "Features by category", caption, 6.2, room=_upper_heading_height(summary))


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
        names = [summary.feature_names[i].rpartition("::")[2] for i in order]
        ax.set_xticks(range(len(order)), unique_labels(names, 20), rotation=90)
    else:
        outside = len(summary.feature_names) - len(order)
        ax.set_xlabel(f"{len(order):,} features" + (f"; {outside:,} more in no category" if outside else ""))


def _family_labels(summary: CheckpointSummary) -> list[str]:
    return unique_labels(summary.families, 24)


def _upper_heading_height(summary: CheckpointSummary) -> float:
    return max(heading_height(2), heading_height(0, legend_shape(_family_labels(summary), 2.7)[1]))


def _draw_sizes(ax: Axes, summary: CheckpointSummary) -> None:
    counts = summary.family_counts()
    left = np.zeros(len(counts))
    labels = _family_labels(summary)
    for family, label, fill in zip(summary.families, labels, family_fills(len(labels)), strict=True):
        values = np.array([count.get(family, 0) for count in counts])
        ax.barh(range(len(counts)), values, left=left, height=0.72, label=label, **fill)
        left += values
    for row, total in enumerate(left):
        ax.annotate(f"{total:.0f}", (total, row), (3, 0), textcoords="offset points", va="center", fontsize=SMALL)
    ax.set_yticks(range(len(counts)), unique_labels(summary.categories, 16))
    ax.set_ylim(len(counts) - 0.5, -0.5)
    ax.set_xlim(0, 1.12 * left.max())
    ax.tick_params(axis="y", length=0)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.set_xlabel("features")
    columns, rows = legend_shape(labels, 2.7)
    add_heading(ax, "Sizes, by family", "", 3.0, rows, room=_upper_heading_height(summary))
    legend_above(ax, columns)


def _draw_tokens(ax: Axes, summary: CheckpointSummary, room: float) -> None:
    """Number of codes of each token."""
    values = np.full((len(summary.categories), summary.levels), np.nan)
    for codebook in summary.codebooks:
        values[codebook.category, codebook.level] = codebook.codes
    image = heat_map(ax, values, MAGNITUDE, 0.0, float(np.nanmax(values)))
    annotate_cells(ax, image, [["" if np.isnan(k) else f"{k:.0f}" for k in row] for row in values])
    ax.set_xticks(range(summary.levels), [f"L{level}" for level in range(summary.levels)])
    ax.set_yticks(range(len(values)), unique_labels(summary.categories, 16))
    add_heading(ax, "Tokens", "Codes per token.", 1.7, room=room)


def _write_central_features(ax: Axes, summary: CheckpointSummary, statistics: DataStatistics) -> None:
    """The features that are most correlated with the others of their category."""
    names = [name.rpartition("::")[2] for name in summary.feature_names]
    most, length = (2, 23) if len(summary.groups) <= _WRITTEN_CELLS else (1, 40)
    for row, members in enumerate(summary.groups):
        own = statistics.affinity[row, members]
        for place, i in enumerate(np.argsort(-own, kind="stable")[:most]):
            closeness = f"{own[i]:.2f}" if len(members) > 1 else "single"
            text = f"{closeness} {shorten(names[members[i]], length)}"
            ax.text(place / most, row, text, fontsize=SMALL, va="center")
    remove_frame(ax)
    ax.set_xlim(0, 1)
    ax.set_ylim(len(summary.groups) - 0.5, -0.5)
    add_heading(
        ax, "Central features", "Largest mean |r| with the others of the category.", 3.8, room=heading_height(2)
    )


def _draw_correlation(ax: Axes, summary: CheckpointSummary, statistics: DataStatistics) -> None:
    values = statistics.category_correlation
    count = len(values)
    written = count <= _WRITTEN_CELLS
    image = heat_map(ax, values, MAGNITUDE, 0.0, 1.0)
    if written:
        annotate_cells(ax, image, [["" if np.isnan(v) else f"{v:.2f}" for v in row] for row in values])
    shown = labelled_ticks(count, count * 0.14 if not written else 9.9)
    across = labelled_ticks(count, 4.4)
    labels = unique_labels(summary.categories, 16)
    ax.set_yticks(list(shown), [labels[c] for c in shown])
    ax.set_xticks(list(across), [str(c + 1) for c in across], rotation=0 if written else 90)
    add_colour_bar(image, ax, "mean |r|", 0.025)
    caption = f"Mean |correlation| of pairs of features, on {statistics.correlation_on}."
    if count > 1:
        caption += f" Largest off the diagonal: {max_off_diagonal(values):.3f}"
        target = summary.config.training.orthogonality_target if summary.config else None
        caption += f" (orthogonality_target {target:g})." if target is not None else "."
    if np.isnan(values).any():
        caption += " White: one feature."
    add_heading(ax, "Correlation of the categories", caption, 4.0, room=heading_height(2))


def _draw_families(ax: Axes, summary: CheckpointSummary) -> None:
    """Columns of the encoders, and how many of them remain after cleaning."""
    encoded = {family.name: family.encoder.output_dim for family in summary.tokenizer.families}
    kept = dict.fromkeys(encoded, 0)
    for name in summary.feature_names:
        kept[family_of(name)] = kept.get(family_of(name), 0) + 1
    names = list(kept)
    fills = dict(zip(summary.families, family_fills(len(summary.families)), strict=True))
    for row, name in enumerate(names):
        columns = encoded.get(name, kept[name])
        ax.barh(row, columns, height=0.72, facecolor="none", edgecolor=FAINT, linewidth=0.6)
        ax.barh(row, kept[name], height=0.72, **fills.get(name, {}))
        text = f"{kept[name]:,} of {columns:,}"
        ax.annotate(text, (columns, row), (3, 0), textcoords="offset points", va="center", fontsize=SMALL)
    ax.set_yticks(range(len(names)), unique_labels(names, 20))
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_xlim(0, 1.3 * max(max(encoded.values()), *kept.values()))
    ax.tick_params(axis="y", length=0)
    add_heading(ax, "Features, by family", "Encoder columns that remain after cleaning.", 3.6)


def _write_capacity(ax: Axes, summary: CheckpointSummary, statistics: DataStatistics | None) -> None:
    """Upper bounds of the information in all tokens of a sample."""
    bits = sum(math.log2(codebook.codes) for codebook in summary.codebooks)
    rows = [
        ["tokens per sample", f"{len(summary.codebooks):,}"],
        ["capacity: sum of log2 K", f"{bits:,.1f} bits"],
    ]
    entropy = summary.per_category("perplexity")
    if entropy is not None:
        used_bits = sum(
            math.log2(max(entropy[codebook.category][codebook.level], 1.0)) for codebook in summary.codebooks
        )
        rows.append(["in use: sum of log2 perplexity", f"{used_bits:,.1f} bits"])
    if statistics is not None:
        first_row = [
            "-".join(
                str(statistics.tokens[0, g]) for g, codebook in enumerate(summary.codebooks) if codebook.category == c
            )
            for c in range(len(summary.categories))
        ]
        text = "  ".join(first_row)
        rows.append(["example: the first row", text if len(text) <= 56 else f"{text[:54].rpartition('  ')[0]} …"])
    write_table(ax, rows, (0.0, 1.0))
    caption = f"Perplexity on {summary.measured_on}." if entropy is not None else ""
    add_heading(ax, "Information capacity of the tokens", caption, 5.0)
