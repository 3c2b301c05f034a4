"""The engineering dashboard: architecture, training curves and quality of each category."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from spinlock_fast.plot_style import FAINT, FOCUS, HIGHLIGHT, INK, MAGNITUDE, NEUTRAL, PALETTE, SMALL
from spinlock_fast.report.checkpoint_summary import CheckpointSummary
from spinlock_fast.report.layout import Row, create_page, fix_layout
from spinlock_fast.report.schematic import draw_schematic, schematic_columns, schematic_height
from spinlock_fast.report.style import (
    add_colour_bar,
    add_heading,
    annotate_cells,
    heading_height,
    heat_map,
    legend_above,
    unique_labels,
    write_table,
)

_UTILIZATION, _PERPLEXITY = PALETTE[1], PALETTE[5]
_MAX_TRIANGLES = 15  # more triangles would overlap
_MAX_MARKED_VALIDATIONS = 20  # with more validations, no marker is drawn


def draw_engineering(summary: CheckpointSummary) -> Figure:
    """Schematic of the model, training curves, headline figures, and quality of each category."""
    columns = schematic_columns(summary)
    rows = [Row(schematic_height(columns), 0.0, (1.0,))]
    curves, figures = bool(summary.epochs), bool(summary.metrics)
    headline = _headline_rows(summary)
    if curves:
        rows.append(Row(2.3, 1.0, (1.0, 1.0, 0.72) if figures else (1.0, 1.0)))
    elif figures:
        rows.append(Row(0.17 * -(-len(headline) // 2), 0.6, (1.0, 1.0)))
    quality = [key for key in ("utilization", "perplexity", "partial_mse") if summary.per_category(key)]
    if quality:
        count = len(summary.categories)
        height = max(0.9, count * (0.24 if count <= 12 else 0.15))
        rows.append(Row(height, 1.0, tuple(0.62 if key == "partial_mse" else 1.0 for key in quality)))
    figure, grid = create_page("Engineering", summary, rows)
    draw_schematic(figure.add_subplot(grid[0][0]), columns)
    if curves:
        _draw_losses(figure.add_subplot(grid[1][0]), summary)
        _draw_quality(figure.add_subplot(grid[1][1]), summary)
    if figures and curves:
        _write_headline(figure.add_subplot(grid[1][2]), summary, headline, heading_height(0, 2))
    elif figures:
        half = -(-len(headline) // 2)
        _write_headline(figure.add_subplot(grid[1][0]), summary, headline[:half], 0.0)
        write_table(figure.add_subplot(grid[1][1]), [*headline[half:], ("", "")][:half], (0.0, 1.0))
    if quality:
        _draw_categories(figure, grid[-1], summary, quality)
    return fix_layout(figure)


def _draw_losses(ax: Axes, summary: CheckpointSummary) -> None:
    epochs = [record["epoch"] for record in summary.epochs]
    train = [record["train_loss"] for record in summary.epochs]
    at, val = validation_curve(summary, "val_loss")
    ax.plot(epochs, train, color=NEUTRAL, linewidth=1.0, label="training", **marker_style(len(epochs)))
    ax.plot(at, val, color=FOCUS, linewidth=1.4, label="validation", **marker_style(len(at)))
    ax.grid(axis="y")
    if min(train + val) > 0 and max(train + val) > 5 * min(train + val):
        ax.set_yscale("log")
        _label_logarithmic(ax)
    _mark_best_and_resets(ax, summary, at, val, "{:.4f} at epoch {}, the best")
    add_heading(ax, "Loss, all terms", "", 4.0, legend_rows=2)
    legend_above(ax, 2)


def _draw_quality(ax: Axes, summary: CheckpointSummary) -> None:
    shown = (
        ("quality", FOCUS, "-", "quality"),
        ("utilization", _UTILIZATION, "--", "utilization"),
        ("perplexity_over_k", _PERPLEXITY, ":", "perplexity / K"),
    )
    curves = {key: validation_curve(summary, key) for key, *_ in shown}
    for key, colour, style, label in shown:
        at, values = curves[key]
        if at:
            ax.plot(at, values, style, color=colour, linewidth=1.4, label=label, **marker_style(len(at)))
    ax.grid(axis="y")
    every = [value for _, values in curves.values() for value in values]
    if every and min(every) >= 0.0 and max(every) <= 1.0:
        ax.set_ylim(*range_of_shares(every))
    best = next((curve for curve in curves.values() if curve[0]), ([], []))
    _mark_best_and_resets(ax, summary, *best, "{:.4f} at the best epoch", explained=False)
    on = summary.measured_on if summary.metrics else "validation rows"
    add_heading(ax, f"Quality on {on}", "", 4.0, legend_rows=2)
    legend_above(ax, 2)


def marker_style(count: int) -> dict[str, Any]:
    """A large marker for a single point, small ones for a few, none where they would hide the line."""
    size = 7.0 if count == 1 else 3.0
    return {"marker": "o" if count <= _MAX_MARKED_VALIDATIONS else "", "markersize": size, "markeredgewidth": 0}


def range_of_shares(values: list[float]) -> tuple[float, float]:
    """Limits in [0, 1] that the values fill, in steps of 0.05, at least 0.2 apart."""
    low = max(math.floor(20 * min(values) - 0.4) / 20, 0.0)
    high = min(math.ceil(20 * max(values) + 0.4) / 20, 1.0)
    high = max(high, min(low + 0.2, 1.0))
    return min(low, high - 0.2), high


def validation_curve(summary: CheckpointSummary, key: str) -> tuple[list[int], list[float]]:
    """Epochs and values of a metric of the validations."""
    points = [(r["epoch"], r["validation"][key]) for r in summary.epochs if key in (r.get("validation") or {})]
    return [epoch for epoch, _ in points], [value for _, value in points]


def _mark_best_and_resets(
    ax: Axes, summary: CheckpointSummary, at: list[int], values: list[float], text: str, explained: bool = True
) -> None:
    """Marks the best epoch and the epochs in which dead codes were replaced."""
    best = summary.best_epoch
    if best in at:
        value = values[at.index(best)]
        label = text.format(value, best)
        mark: dict[str, Any] = {
            "color": HIGHLIGHT,
            "markersize": 6.5,
            "markerfacecolor": "none",
            "markeredgewidth": 1.4,
        }
        ax.plot([best], [value], "D", label=label, zorder=4, clip_on=False, **mark)
    last = summary.epochs[-1]["epoch"]
    ax.set_xlim(0, last + max(1, 0.02 * last))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("epoch")
    resets = [(record["epoch"], record["resets"]) for record in summary.epochs if record.get("resets")]
    if resets:
        replaced = sum(number for _, number in resets)
        label = f"dead codes replaced: {replaced:,}" if explained else "_resets"
        ax.plot(
            [epoch for epoch, _ in resets],
            [0.0] * len(resets),
            "^" if len(resets) <= _MAX_TRIANGLES else "|",
            color=FAINT,
            markersize=4.0,
            transform=ax.get_xaxis_transform(),
            clip_on=False,
            zorder=4,
            label=label,
        )


def _label_logarithmic(ax: Axes) -> None:
    """Labels 1, 2 and 5 of every decade, or the decades only over a wide range."""
    low, high = ax.get_ylim()
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 300 * low else (1.0,)))
    ax.yaxis.set_major_formatter("{x:.3g}")
    ax.yaxis.set_minor_locator(NullLocator())


def _headline_rows(summary: CheckpointSummary) -> list[tuple[str, str]]:
    """Label and value of the figures of the whole model."""
    metrics = summary.metrics
    rows: list[tuple[str, str]] = []

    def add(label: str, key: str, form: str, extra: str = "") -> None:
        value: Any = metrics.get(key)
        if value is not None:
            rows.append((label, format(value, form) + extra))

    add("quality", "quality", ".4f")
    add("reconstruction error", "reconstruction_error", ".4f")
    add("loss, all terms", "val_loss", ".4f")
    add("utilization", "utilization", ".3f")
    add("perplexity / K", "perplexity_over_k", ".3f")
    add("codes in use", "active_codes", ",", f" of {summary.total_codes:,}")
    add("distance preservation, latents", "topo_pre", ".3f")
    add("distance preservation, codes", "topo_post", ".3f")
    add("largest category correlation", "category_correlation_max", ".3f")
    add("trainable parameters", "trainable_parameters", ",")
    add("code entries", "code_entries", ",")
    add("epochs", "epochs", ",", f", best {metrics['best_epoch']:,}" if "best_epoch" in metrics else "")
    add("samples", "samples", ",")
    if "total" in metrics.get("seconds", {}):
        rows.append(("seconds, total", f"{metrics['seconds']['total']:,.0f}"))
    return rows


def _write_headline(ax: Axes, summary: CheckpointSummary, rows: list[tuple[str, str]], room: float) -> None:
    write_table(ax, rows, (0.0, 1.0))
    refitted = summary.config is not None and summary.config.training.decoder_refit > 0.0
    refitted = refitted or summary.model.token_decoder is not None
    after = "; decoder refitted after the last epoch" if refitted else ""
    add_heading(ax, "Summary", f"on {summary.measured_on}{after}", 3.0, room=room)


def _draw_categories(figure: Figure, cells: list[Any], summary: CheckpointSummary, quality: list[str]) -> None:
    labels = unique_labels(summary.categories, 22)
    first: Axes | None = None
    for cell, key in zip(cells, quality, strict=True):
        ax = figure.add_subplot(cell, sharey=first)
        if key == "partial_mse":
            _draw_errors(ax, summary)
        else:
            _draw_heat_map(ax, summary, key)
        if first is None:
            first = ax
            ax.set_yticks(range(len(labels)), labels)
            ax.set_ylim(len(labels) - 0.5, -0.5)
        elif key != "partial_mse":
            ax.tick_params(axis="y", labelleft=False)


def _draw_heat_map(ax: Axes, summary: CheckpointSummary, key: str) -> None:
    values = np.full((len(summary.categories), summary.levels), np.nan)
    texts = [[""] * summary.levels for _ in summary.categories]
    measured = summary.per_category(key) or []
    for codebook in summary.codebooks:
        value = measured[codebook.category][codebook.level]
        values[codebook.category, codebook.level] = value if key == "utilization" else value / codebook.codes
        texts[codebook.category][codebook.level] = (
            f"{100 * value:.0f} %" if key == "utilization" else f"{value:.1f} of {codebook.codes}"
        )
    image = heat_map(ax, values, MAGNITUDE, 0.0, 1.0)
    annotate_cells(ax, image, texts)
    ax.set_xticks(range(summary.levels), [f"L{level}" for level in range(summary.levels)])
    if key == "utilization":
        add_heading(ax, "Utilization", "Share of a codebook's codes in use.", 3.6, room=heading_height(2))
    else:
        add_heading(ax, "Perplexity", "Effective number of codes in use, of K.", 3.6, room=heading_height(2))
        add_colour_bar(image, ax, "share of K", 0.03)


def _draw_errors(ax: Axes, summary: CheckpointSummary) -> None:
    errors = summary.per_category("partial_mse") or []
    rows = range(len(errors))
    ax.barh(rows, errors, height=0.72, color=FOCUS)
    ax.axvline(1.0, color=HIGHLIGHT, linewidth=1.0, linestyle="--", zorder=0)
    for row, error in enumerate(errors):
        inside = error > 0.2 * max(1.0, *errors)
        ax.annotate(
            f"{error:.2f}",
            (error, row),
            (-3 if inside else 3, 0),
            textcoords="offset points",
            va="center",
            ha="right" if inside else "left",
            fontsize=SMALL,
            color="white" if inside else INK,
        )
    ax.set_xlim(0, 1.05 * max(1.0, *errors))
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel("mean squared error / variance")
    add_heading(
        ax,
        "Error by category",
        "From one codebook; dashed: error of the mean.",
        1.8,
        room=heading_height(2),
    )
