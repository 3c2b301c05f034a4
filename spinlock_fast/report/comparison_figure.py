"""The picture of a comparison: metrics, settings, curves, matched categories, utilization, agreement of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from spinlock_fast.plot_style import FAINT, FOCUS, INK, MAGNITUDE, PALETTE, SMALL, TEXT
from spinlock_fast.report.checkpoint_summary import CheckpointSummary
from spinlock_fast.report.comparison import Comparison, Matrix, number_text
from spinlock_fast.report.engineering_figure import marker_style, range_of_shares, validation_curve
from spinlock_fast.report.layout import Row, fix_layout, new_page
from spinlock_fast.report.style import (
    add_colour_bar,
    add_heading,
    annotate_cells,
    heading_height,
    heat_map,
    remove_frame,
    shorten,
    unique_labels,
)

_FIRST = 2.1  # inches of the first column of a table
_LINE = 0.19  # inches of a line of a table
_CHARACTER = 0.066  # inches of an average character of small text
_MAX_SETTINGS = 18
_CURVES = (("val_loss", "Validation loss, all terms"), ("quality", "Quality"), ("utilization", "Utilization"))


def draw_comparison(comparison: Comparison) -> Figure:
    """One page: tables, curves by run, and heat maps over the categories of the first run."""
    labels = unique_labels(comparison.labels, 13)
    curves = [(key, title) for key, title in _CURVES if any(validation_curve(r, key)[0] for r in comparison.runs)]
    settings = comparison.settings[:_MAX_SETTINGS]
    lines = 1 + max(len(comparison.metrics), len(settings) if len(labels) <= 3 else 0)
    rows = [Row(_LINE * lines, 0.5, (1.0, 1.0) if len(labels) <= 3 else (1.0,))]
    if curves:
        rows.append(Row(1.8, 0.75, (1.0,) * len(curves)))
    count = len(comparison.matches[0])
    height = max(0.9, count * (0.24 if count <= 12 else 0.15))
    rows.append(Row(height, 1.05, (1.0, 1.3)))
    if comparison.agreement is not None:
        rows.append(Row(max(height, 1.2), 1.05, (1.0, 1.3)))
    if len(labels) > 3 and settings:
        rows.append(Row(_LINE * (1 + len(settings)), 0.5, (1.0,)))
    figure, grid = new_page("Comparison", f"{len(labels)} runs  ·  others are matched to {labels[0]}", rows)
    _write_metrics(figure.add_subplot(grid[0][0]), comparison, labels, lines)
    if len(labels) <= 3:
        _write_settings(figure.add_subplot(grid[0][1]), comparison, labels, lines)
    elif settings:
        _write_settings(figure.add_subplot(grid[-1][0]), comparison, labels, 1 + len(settings))
    if curves:
        for cell, (key, title) in zip(grid[1], curves, strict=True):
            _draw_curves(figure.add_subplot(cell), comparison.runs, key, title)
    cells = grid[1 + bool(curves)]
    _draw_matches(figure.add_subplot(cells[0]), comparison, labels)
    _draw_by_codebook(
        figure.add_subplot(cells[1]),
        comparison.utilization(),
        comparison,
        labels,
        "Utilization",
        "Share of the codes in use (%), in the matched category of each run.",
        100.0,
    )
    if comparison.agreement is not None:
        cells = grid[2 + bool(curves)]
        _draw_agreement(figure.add_subplot(cells[0]), comparison.agreement.mean, labels, comparison.agreement.data)
        _draw_by_codebook(
            figure.add_subplot(cells[1]),
            comparison.agreement.codebooks[1:],
            comparison,
            labels,
            f"Agreement with {labels[0]}",
            "Adjusted mutual information (x 100) of the tokens of matched codebooks; 0: as by chance.",
            100.0,
        )
    return fix_layout(figure)


def _write_metrics(ax: Axes, comparison: Comparison, labels: list[str], lines: int) -> None:
    rows = [(row.label, row.values, row.best) for row in comparison.metrics]
    places = _write_columns(ax, rows, labels, lines)
    for i, place in enumerate(places):
        ax.plot([place + 0.012], [0.5], "s", color=PALETTE[i], markersize=5, clip_on=False)
    text = "Bold: best." if comparison.marked else "No best value is marked: the runs differ in features or rows."
    add_heading(ax, "Metrics", f"{text} The squares are the colours of the curves.", 5.0)


def _write_settings(ax: Axes, comparison: Comparison, labels: list[str], lines: int) -> None:
    shown = comparison.settings[:_MAX_SETTINGS]
    none = [False] * len(labels)
    characters = int(_column(len(labels))[1] / 0.078) - 1
    rows = [(shorten(key, 30), [shorten(value, characters) for value in values], none) for key, values in shown]
    _write_columns(ax, rows, labels, lines)
    more = len(comparison.settings) - len(shown)
    text = "" if shown else "None of those recorded."
    text += f"{more} more in comparison.md." if more else ""
    add_heading(ax, "Settings that differ", text or "Long values lose their middle.", 5.0)


def _write_columns(
    ax: Axes,
    rows: Sequence[tuple[str, Sequence[str], Sequence[bool]]],
    labels: list[str],
    lines: int,
) -> list[float]:
    """Writes a table with one column per run; returns the right ends of the columns as shares of the width."""
    remove_frame(ax)
    ax.set_xlim(0, 1)
    ax.set_ylim(lines, 0)
    width, column = _column(len(labels))
    places = [(_FIRST + column * (i + 1) - 0.1) / width for i in range(len(labels))]
    for place, label in zip(places, labels, strict=True):
        ax.text(place, 0.5, label, ha="right", va="center", fontsize=SMALL, fontweight="bold")
    for i, (label, values, best) in enumerate(rows, start=1):
        ax.text(0, i + 0.5, label, va="center", fontsize=TEXT)
        for place, value, good in zip(places, values, best, strict=True):
            style = {"fontweight": "bold", "color": FOCUS} if good else {"color": INK}
            ax.text(place, i + 0.5, value, ha="right", va="center", fontsize=TEXT, **style)  # type: ignore[arg-type]
        ax.plot([0, places[-1] + 0.02], [i, i], color="#dddddd", linewidth=0.5)
    return places


def _column(runs: int) -> tuple[float, float]:
    """Width of a table, and of each of its columns of values, in inches."""
    width = 5.5 if runs <= 3 else 11.2
    return width, min((width - _FIRST) / runs, 1.5)


def _draw_curves(ax: Axes, runs: Sequence[CheckpointSummary], key: str, title: str) -> None:
    every: list[float] = []
    for i, run in enumerate(runs):
        at, values = validation_curve(run, key)
        every += values
        if at:
            ax.plot(at, values, color=PALETTE[i], linewidth=1.4, **marker_style(len(at)))
        if run.best_epoch in at:
            best = at.index(run.best_epoch)
            ax.plot(
                at[best : best + 1],
                values[best : best + 1],
                "D",
                color=PALETTE[i],
                markersize=6.0,
                markerfacecolor="none",
                markeredgewidth=1.3,
                clip_on=False,
                zorder=4,
            )
    ax.grid(axis="y")
    if key != "val_loss" and min(every) >= 0.0 and max(every) <= 1.0:
        ax.set_ylim(*range_of_shares(every))
    if key == "val_loss" and min(every) > 0.0 and max(every) > 5 * min(every):
        ax.set_yscale("log")
    ax.set_xlim(left=0)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("epoch")
    add_heading(ax, title, "Diamond: the epoch that was kept.", 3.4)


def _draw_matches(ax: Axes, comparison: Comparison, labels: list[str]) -> None:
    others, first = comparison.matches[1:], comparison.runs[0].categories
    values = np.array([[np.nan if m is None else m.overlap for m in run] for run in others]).T
    characters = int(3.3 / len(others) / _CHARACTER) - 5
    texts = [[""] * len(others) for _ in first]
    for r, (run, matches) in enumerate(zip(comparison.runs[1:], others, strict=True)):
        names = unique_labels(run.categories, max(characters, 1))
        for c, match in enumerate(matches):
            if match is not None:
                name = f"{names[match.category]}  " if characters >= 8 else ""
                texts[c][r] = f"{name}{match.overlap:.2f}"
    image = heat_map(ax, values, MAGNITUDE, 0.0, 1.0)
    annotate_cells(ax, image, texts)
    ax.set_yticks(range(len(first)), unique_labels(first, 20))
    ax.set_xticks(range(len(others)), _narrow(labels, 3.3 / len(others))[1:])
    text = f"Shared features of the categories of {labels[0]} and their matches (Jaccard index); grey: no match."
    add_heading(ax, "Matched categories", text, 3.4, room=heading_height(2))


def _draw_by_codebook(
    ax: Axes, values: Matrix, comparison: Comparison, labels: list[str], title: str, caption: str, scale: float
) -> None:
    """A heat map of values [R, C, L]: one row per category, one column per run, of the last R, and level."""
    runs, count, levels = values.shape
    flat = values.transpose(1, 0, 2).reshape(count, -1)
    image = heat_map(ax, flat, MAGNITUDE, 0.0, 1.0)
    inches = 4.9 / (runs * levels)
    if inches >= 0.22:
        annotate_cells(ax, image, [["" if np.isnan(v) else str(round(scale * v)) for v in row] for row in flat])
    ax.set_yticks(range(count), unique_labels(comparison.runs[0].categories, 16))
    names = _narrow(labels, inches * levels)[-runs:]
    middle = (levels - 1) / 2
    ax.set_xticks([r * levels + middle for r in range(runs)], names)
    for r in range(1, runs):
        ax.axvline(r * levels - 0.5, color="white", linewidth=2.5)
    caption += f" Columns of a run: its levels, L0 to L{levels - 1}." if levels > 1 else ""
    add_heading(ax, title, caption, 4.6, room=heading_height(2))


def _draw_agreement(ax: Axes, mean: Matrix, labels: list[str], data: str) -> None:
    image = heat_map(ax, mean, MAGNITUDE, 0.0, 1.0)
    annotate_cells(ax, image, [["" if np.isnan(v) else number_text(v) for v in row] for row in mean])
    ax.set_yticks(range(len(labels)), labels)
    ax.set_xticks(range(len(labels)), _narrow(labels, 3.1 / len(labels)))
    ax.tick_params(axis="x", labelcolor=FAINT)
    text = f"Mean adjusted mutual information of matched codebooks, on {data}."
    add_heading(ax, "Agreement of tokens", text, 3.4, room=heading_height(2))
    add_colour_bar(image, ax, "AMI", 0.03)


def _narrow(labels: list[str], inches: float) -> list[str]:
    return unique_labels(labels, max(int(inches / _CHARACTER) - 1, 3))
