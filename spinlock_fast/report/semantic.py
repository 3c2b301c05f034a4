"""The semantic dashboard: what the categories are made of, and what a token can say."""

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
from spinlock_fast.report.contents import Contents
from spinlock_fast.report.layout import Row, page, settle
from spinlock_fast.report.sample import Sample
from spinlock_fast.report.style import (
    FAINT,
    MAGNITUDE,
    NEUTRAL,
    SMALL,
    bare,
    category_colours,
    distinct,
    every,
    family_fills,
    heading,
    heat_map,
    legend_above,
    legend_shape,
    room_for,
    scale_bar,
    shorten,
    write_cells,
    write_table,
)

_NAMED_FEATURES = 32  # with more, a name for each does not fit along an axis
_WRITTEN_CELLS = 12  # categories; with more, a number does not fit into a cell of their correlation
_STRIP = 0.16  # inches, of the row of families


def draw_semantic(contents: Contents, sample: Sample | None) -> Figure:
    """Features by category and family, the structure of the tokens, correlation of the categories."""
    count = len(contents.categories)
    named = len(contents.feature_names) <= _NAMED_FEATURES
    height = max(0.7, count * (0.22 if count <= _WRITTEN_CELLS else 0.14))
    square = max(1.3, count * (0.32 if count <= _WRITTEN_CELLS else 0.14))
    families = Row(0.24 * max(len(contents.families), 4), 0.75, (0.85, 1.3))
    _, legend_rows = legend_shape(_family_labels(contents), 2.7)
    around = (2.1 if named else 1.3) + 0.15 * (legend_rows - 1)
    if sample is not None:
        widths = (0.62, 1.12, 1.3) if count <= _WRITTEN_CELLS else (0.5, 0.95, 1.6)
        rows = [Row(height, around, (2.1, 1.0)), Row(square, 0.95, widths), families]
    else:
        rows = [Row(height, around, (1.5, 0.95, 0.6)), families]
    figure, grid = page("Semantics", contents, rows)
    order = [i for members in contents.groups for i in members]
    upper = figure.add_subplot(grid[0][0])
    _draw_features(upper, contents, sample, order)
    share = _STRIP / height
    _draw_strip(upper.inset_axes((0.0, -1.35 * share, 1.0, share), sharex=upper), contents, order, named)
    _draw_sizes(figure.add_subplot(grid[0][1]), contents)
    room = room_for(2) if sample is not None else _upper_room(contents)
    _draw_tokens(figure.add_subplot(grid[1][0] if sample is not None else grid[0][2]), contents, room)
    if sample is not None:
        _write_central(figure.add_subplot(grid[1][1]), contents, sample)
        _draw_correlation(figure.add_subplot(grid[1][2]), contents, sample)
    _draw_families(figure.add_subplot(grid[-1][0]), contents)
    _write_capacity(figure.add_subplot(grid[-1][1]), contents, sample)
    return settle(figure)


def _draw_features(ax: Axes, contents: Contents, sample: Sample | None, order: list[int]) -> None:
    """Which feature belongs where, and with data: how close it is to every category."""
    sizes = [len(members) for members in contents.groups]
    starts = np.cumsum([0, *sizes[:-1]])
    if sample is not None:
        image = heat_map(ax, sample.affinity[:, order], MAGNITUDE, 0.0, 1.0)
        for row, (start, size) in enumerate(zip(starts, sizes, strict=True)):
            ax.add_patch(Rectangle((start - 0.5, row - 0.5), size, 1, fill=False, edgecolor="white", linewidth=1.0))
        scale_bar(image, ax, "mean |r|", 0.015)
        caption = (
            "Mean |correlation| of each feature with the (other) features of each category, "
            f"on {sample.correlation_on} of {shorten(sample.name, 40)}. Framed: its own category."
        )
    else:
        colours = category_colours(len(sizes)) or NEUTRAL
        ax.barh(range(len(sizes)), sizes, left=starts - 0.5, height=0.8, color=colours)
        ax.set_xlim(-0.5, len(order) - 0.5)
        caption = "Each feature is a column, and belongs to one category."
    ax.set_yticks(range(len(sizes)), distinct(contents.categories, 22))
    ax.set_ylim(len(sizes) - 0.5, -0.5)
    ax.tick_params(axis="x", bottom=False, labelbottom=False)
    ax.tick_params(axis="y", length=0)
    heading(ax, "Features by category", caption, 6.2, room=_upper_room(contents))


def _draw_strip(ax: Axes, contents: Contents, order: list[int], named: bool) -> None:
    """The family of each feature."""
    fills = dict(zip(contents.families, family_fills(len(contents.families)), strict=True))
    start = 0
    for family, members in groupby(order, key=lambda i: family_of(contents.feature_names[i])):
        size = len(list(members))
        ax.add_patch(Rectangle((start - 0.5, 0), size, 1, **fills[family]))
        start += size
    bare(ax)
    ax.set_ylim(0, 1)
    ax.set_yticks([0.5], ["family"])
    ax.tick_params(length=0)
    if named:
        names = [contents.feature_names[i].rpartition("::")[2] for i in order]
        ax.set_xticks(range(len(order)), distinct(names, 20), rotation=90)
    else:
        outside = len(contents.feature_names) - len(order)
        ax.set_xlabel(f"{len(order):,} features" + (f"; {outside:,} more are in no category" if outside else ""))


def _family_labels(contents: Contents) -> list[str]:
    return distinct(contents.families, 24)


def _upper_room(contents: Contents) -> float:
    return max(room_for(2), room_for(0, legend_shape(_family_labels(contents), 2.7)[1]))


def _draw_sizes(ax: Axes, contents: Contents) -> None:
    counts = contents.family_counts()
    left = np.zeros(len(counts))
    labels = _family_labels(contents)
    for family, label, fill in zip(contents.families, labels, family_fills(len(labels)), strict=True):
        values = np.array([count.get(family, 0) for count in counts])
        ax.barh(range(len(counts)), values, left=left, height=0.72, label=label, **fill)
        left += values
    for row, total in enumerate(left):
        ax.annotate(f"{total:.0f}", (total, row), (3, 0), textcoords="offset points", va="center", fontsize=SMALL)
    ax.set_yticks(range(len(counts)), distinct(contents.categories, 16))
    ax.set_ylim(len(counts) - 0.5, -0.5)
    ax.set_xlim(0, 1.12 * left.max())
    ax.tick_params(axis="y", length=0)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.set_xlabel("features")
    columns, rows = legend_shape(labels, 2.7)
    heading(ax, "Sizes, by family", "", 3.0, rows, room=_upper_room(contents))
    legend_above(ax, columns)


def _draw_tokens(ax: Axes, contents: Contents, room: float) -> None:
    """A cell for each token of a sample."""
    values = np.full((len(contents.categories), contents.levels), np.nan)
    for book in contents.codebooks:
        values[book.category, book.level] = book.codes
    image = heat_map(ax, values, MAGNITUDE, 0.0, float(np.nanmax(values)))
    write_cells(ax, image, [["" if np.isnan(k) else f"{k:.0f}" for k in row] for row in values])
    ax.set_xticks(range(contents.levels), [f"L{level}" for level in range(contents.levels)])
    ax.set_yticks(range(len(values)), distinct(contents.categories, 16))
    heading(ax, "Tokens", "Codes to choose from.", 1.7, room=room)


def _write_central(ax: Axes, contents: Contents, sample: Sample) -> None:
    """The features that stand for each category."""
    names = [name.rpartition("::")[2] for name in contents.feature_names]
    most, length = (2, 23) if len(contents.groups) <= _WRITTEN_CELLS else (1, 40)
    for row, members in enumerate(contents.groups):
        own = sample.affinity[row, members]
        for place, i in enumerate(np.argsort(-own, kind="stable")[:most]):
            closeness = f"{own[i]:.2f}" if len(members) > 1 else "alone"
            text = f"{closeness} {shorten(names[members[i]], length)}"
            ax.text(place / most, row, text, fontsize=SMALL, va="center")
    bare(ax)
    ax.set_xlim(0, 1)
    ax.set_ylim(len(contents.groups) - 0.5, -0.5)
    heading(ax, "Central features", "Highest mean |r| with the others of their category.", 3.8, room=room_for(2))


def _draw_correlation(ax: Axes, contents: Contents, sample: Sample) -> None:
    values = sample.category_correlation
    count = len(values)
    written = count <= _WRITTEN_CELLS
    image = heat_map(ax, values, MAGNITUDE, 0.0, 1.0)
    if written:
        write_cells(ax, image, [["" if np.isnan(v) else f"{v:.2f}" for v in row] for row in values])
    shown = every(count, count * 0.14 if not written else 9.9)
    across = every(count, 4.4)
    labels = distinct(contents.categories, 16)
    ax.set_yticks(list(shown), [labels[c] for c in shown])
    ax.set_xticks(list(across), [str(c + 1) for c in across], rotation=0 if written else 90)
    scale_bar(image, ax, "mean |r|", 0.025)
    caption = f"Mean |correlation| of pairs of features, on {sample.correlation_on}."
    if count > 1:
        caption += f" Largest off the diagonal: {max_off_diagonal(values):.3f}"
        target = contents.config.training.orthogonality_target if contents.config else None
        caption += f" (orthogonality_target {target:g})." if target is not None else "."
    if np.isnan(values).any():
        caption += " White: one feature."
    heading(ax, "Correlation of the categories", caption, 4.0, room=room_for(2))


def _draw_families(ax: Axes, contents: Contents) -> None:
    """Columns that the encoders give, and how many cleaning kept."""
    encoded = {family.name: family.encoder.output_dim for family in contents.tokenizer.families}
    kept = dict.fromkeys(encoded, 0)
    for name in contents.feature_names:
        kept[family_of(name)] = kept.get(family_of(name), 0) + 1
    names = list(kept)
    fills = dict(zip(contents.families, family_fills(len(contents.families)), strict=True))
    for row, name in enumerate(names):
        columns = encoded.get(name, kept[name])
        ax.barh(row, columns, height=0.72, facecolor="none", edgecolor=FAINT, linewidth=0.6)
        ax.barh(row, kept[name], height=0.72, **fills.get(name, {}))
        text = f"{kept[name]:,} of {columns:,}"
        ax.annotate(text, (columns, row), (3, 0), textcoords="offset points", va="center", fontsize=SMALL)
    ax.set_yticks(range(len(names)), distinct(names, 20))
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_xlim(0, 1.3 * max(max(encoded.values()), *kept.values()))
    ax.tick_params(axis="y", length=0)
    heading(ax, "Features, by family", "Columns that cleaning kept, of those that the encoders give.", 3.6)


def _write_capacity(ax: Axes, contents: Contents, sample: Sample | None) -> None:
    """What all tokens of a sample can say together."""
    bits = sum(math.log2(book.codes) for book in contents.codebooks)
    rows = [
        ["tokens a sample", f"{len(contents.codebooks):,}"],
        ["most that they could tell: sum of log2 K", f"{bits:,.1f} bits"],
    ]
    entropy = contents.per_category("perplexity")
    if entropy is not None:
        said = sum(math.log2(max(entropy[book.category][book.level], 1.0)) for book in contents.codebooks)
        rows.append(["most that they do tell: sum of log2 perplexity", f"{said:,.1f} bits"])
    if sample is not None:
        first = [
            "-".join(str(sample.tokens[0, g]) for g, book in enumerate(contents.codebooks) if book.category == c)
            for c in range(len(contents.categories))
        ]
        text = "  ".join(first)
        rows.append(["the first row, as an example", text if len(text) <= 56 else f"{text[:54].rpartition('  ')[0]} …"])
    write_table(ax, rows, (0.0, 1.0))
    caption = f"Perplexity on {contents.measured_on}." if entropy is not None else ""
    heading(ax, "What the tokens of a sample can tell", caption, 5.0)
