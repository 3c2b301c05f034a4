"""The picture of an analysis: what tokens tell, the codes that tell most, and what each level adds."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from spinlock_fast.analysis.run import Analysis
from spinlock_fast.analysis.summary_text import characteristic_codes
from spinlock_fast.analysis.tables import Table
from spinlock_fast.plot_style import BACKGROUND, FAINT, FOCUS, NEUTRAL, PALETTE, SMALL
from spinlock_fast.report.association_panel import LINE, MAX_CONDITIONS, draw_associations
from spinlock_fast.report.condition_associations import Associations, association_matrix
from spinlock_fast.report.layout import Row, fix_layout, new_page
from spinlock_fast.report.style import (
    WIDTH,
    add_heading,
    heading_height,
    legend_above,
    level_marker,
    shorten,
    unique_labels,
)

_MAX_ROWS = 40  # codebooks; with more, each category is one row


def draw_analysis(analysis: Analysis) -> Figure:
    """Heat map of codebooks and conditions; codes and the shares of a value of a condition; variance by level."""
    summary, tables = analysis.summary, analysis.tables
    refinement = tables["refinement"]
    categories = list(dict.fromkeys(refinement["category"].tolist()))
    height = max(1.2, 0.16 * len(categories))
    title = f"Analysis: {shorten(str(summary.get('checkpoint', 'tokens')).rpartition('/')[2] or 'tokens', 60)}"
    about = f"{summary['operators']:,} operators  ·  {summary['codebooks']} tokens each  ·  "
    about += f"{summary['codes_in_use']:,} of {summary['codes']:,} codes in use"
    if "associations" not in tables:
        figure, grid = new_page(title, about, [Row(height, 1.0, (1.0, 1.0))])
        _draw_levels(figure.add_subplot(grid[0][0]), refinement, categories)
        return fix_layout(figure)
    alpha = float(summary.get("settings", {}).get("alpha", 0.05))
    associations, labels = _association_rows(tables["associations"], alpha)
    heat = LINE * len(labels)
    chosen = characteristic_codes(tables, alpha)
    longest = max(len(shorten(name, 24)) for name in associations.conditions)
    width = 0.27 * max(min(len(associations.conditions), MAX_CONDITIONS), 4)
    rows = [
        Row(
            max(heat, 0.34 * len(chosen) + LINE * len(categories) + 0.6, 0.8),
            1.1 + 0.06 * longest,
            (width, max(WIDTH - width - 3.6, 3.0)),
        ),
    ]
    figure, grid = new_page(title, about, rows)
    left = figure.add_subplot(grid[0][0])
    draw_associations(left, associations, (width, rows[0].height), np.arange(len(labels) + 1.0) - 0.5, labels)
    tests = summary["found"]["associations"]
    text = f"Adjusted mutual information; {tests['found']} of {tests['tests']} pairs at a false discovery rate of "
    add_heading(
        left, "What the tokens tell", f"{text}{alpha:.0%}. Grey: not found.", width + 0.5, room=heading_height(3)
    )
    right = grid[0][1].subgridspec(2, 1, height_ratios=(2.0 * max(len(chosen), 1), max(len(categories), 4)))
    if chosen:
        _draw_codes(figure.add_subplot(right[0]), tables, chosen)
    _draw_levels(figure.add_subplot(right[1] if chosen else grid[0][1]), refinement, categories)
    return fix_layout(figure)


def _association_rows(table: Table, alpha: float) -> tuple[Associations, list[str]]:
    """The matrix of associations and the labels of its rows: codebooks, or categories where there are many."""
    associations = association_matrix(table, alpha)
    count = len(associations.conditions)
    codebooks, categories = (table[key].reshape(-1, count)[:, 0].tolist() for key in ("codebook", "category"))
    if len(codebooks) <= _MAX_ROWS:
        return associations, unique_labels(codebooks, 24)
    names = list(dict.fromkeys(categories))
    return associations.by_category([names.index(name) for name in categories]), unique_labels(names, 24)


def _draw_codes(ax: Axes, tables: dict[str, Table], chosen: list[int]) -> None:
    """Share of a value of a condition among the operators of a code, with its interval, and among all."""
    lifts = tables["lifts"]
    labels = []
    for place, i in enumerate(chosen):
        usual = float(lifts["share"][i] / lifts["lift"][i])
        ends = [min(float(lifts[key][i]) * usual, 1.0) for key in ("lift_low", "lift_high")]
        name: dict[str, Any] = {"label": "operators of the code, 95 % interval"} if place == 0 else {}
        ax.plot(ends, [place, place], color=FOCUS, linewidth=1.6)
        ax.plot([float(lifts["share"][i])], [place], "o", color=FOCUS, markersize=5, **name)
        name = {"label": "all operators"} if place == 0 else {}
        ax.plot([usual], [place], "|", color=NEUTRAL, markersize=9, markeredgewidth=1.6, **name)
        code = f"{shorten(str(lifts['codebook'][i]), 20)} code {lifts['code'][i]}"
        value = f"{shorten(str(lifts['condition'][i]), 24)} {shorten(str(lifts['value'][i]), 16)}"
        labels.append(f"{value}\n{code}")
    ax.set_yticks(range(len(chosen)), labels)
    ax.set_ylim(len(chosen) - 0.5, -0.5)
    ax.set_xlim(0, 1.02)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x")
    ax.set_xlabel("share with this value")
    add_heading(ax, "Characteristic codes", "", 4.0, legend_rows=1, room=heading_height(2))
    legend_above(ax, 2)


def _draw_levels(ax: Axes, table: Table, categories: list[str]) -> None:
    """Variance of the features of each category that its tokens explain, up to each level."""
    for row, category in enumerate(categories):
        values = table["epsilon_squared"][table["category"] == category]
        ax.plot([min(0.0, *values), max(values)], [row, row], color=BACKGROUND, linewidth=1.0, zorder=1)
    levels = np.unique(table["level"]).tolist()
    place = {category: row for row, category in enumerate(categories)}
    for level in levels:
        own = table["level"] == level
        rows = [place[category] for category in table["category"][own].tolist()]
        colour = FOCUS if level == levels[-1] else PALETTE[4]
        style: dict[str, Any] = {"marker": level_marker(int(level)), "markersize": 4.5, "linestyle": ""}
        ax.plot(table["epsilon_squared"][own], rows, color=colour, markeredgewidth=0, **style)
    ax.set_yticks(range(len(categories)), unique_labels(categories, 24))
    ax.set_ylim(len(categories) - 0.5, -0.5)
    ax.set_xlim(min(0.0, float(np.nanmin(table["epsilon_squared"])) - 0.02), 1.02)
    ax.tick_params(axis="y", length=0, labelsize=SMALL)
    ax.grid(axis="x")
    ax.set_xlabel("share of the variance of its features (epsilon squared)")
    handles = [
        Line2D(
            [],
            [],
            linestyle="",
            marker=level_marker(int(n)),
            color=FAINT,
            markersize=4.5,
            label=f"L0 to L{n}" if n else "L0",
        )
        for n in levels
    ]
    add_heading(ax, "Variance explained, by category", "", 4.0, legend_rows=1)
    legend_above(ax, len(handles), handles=handles)
