"""The engineering dashboard: is the model sound, and did training go well?"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from spinlock_fast.report.contents import Contents
from spinlock_fast.report.layout import Row, page, settle
from spinlock_fast.report.schematic import draw_schematic, schematic_height, stages
from spinlock_fast.report.style import (
    FAINT,
    FOCUS,
    MAGNITUDE,
    NEUTRAL,
    SMALL,
    category_colours,
    distinct,
    heading,
    heat_map,
    legend_above,
    room_for,
    scale_bar,
    write_cells,
    write_table,
)

_BEST = "#d55e00"
_MANY_RESETS = 15  # triangles of more would run into each other
_FEW = 20  # validations whose points are marked


def draw_engineering(contents: Contents) -> Figure:
    """Schematic, training curves, figures, and what each category is worth."""
    columns = stages(contents)
    rows = [Row(schematic_height(columns), 0.0, (1.0,))]
    curves, figures = bool(contents.epochs), bool(contents.metrics)
    summary = _summary(contents)
    if curves:
        rows.append(Row(2.3, 1.0, (1.0, 1.0, 0.72) if figures else (1.0, 1.0)))
    elif figures:
        rows.append(Row(0.17 * -(-len(summary) // 2), 0.6, (1.0, 1.0)))
    quality = [key for key in ("utilization", "perplexity", "partial_mse") if contents.per_category(key)]
    if quality:
        count = len(contents.categories)
        height = max(0.9, count * (0.24 if count <= 12 else 0.15))
        rows.append(Row(height, 1.0, tuple(0.62 if key == "partial_mse" else 1.0 for key in quality)))
    figure, grid = page("Engineering", contents, rows)
    draw_schematic(figure.add_subplot(grid[0][0]), columns)
    if curves:
        _draw_losses(figure.add_subplot(grid[1][0]), contents)
        _draw_quality(figure.add_subplot(grid[1][1]), contents)
    if figures and curves:
        _write_summary(figure.add_subplot(grid[1][2]), contents, summary, room_for(0, 2))
    elif figures:
        half = -(-len(summary) // 2)
        _write_summary(figure.add_subplot(grid[1][0]), contents, summary[:half], 0.0)
        write_table(figure.add_subplot(grid[1][1]), [*summary[half:], ("", "")][:half], (0.0, 1.0))
    if quality:
        _draw_categories(figure, grid[-1], contents, quality)
    return settle(figure)


def _draw_losses(ax: Axes, contents: Contents) -> None:
    epochs = [record["epoch"] for record in contents.epochs]
    train = [record["train_loss"] for record in contents.epochs]
    at, val = _validated(contents, "val_loss")
    ax.plot(epochs, train, color=NEUTRAL, linewidth=1.0, label="training", marker="." if len(epochs) == 1 else "")
    ax.plot(at, val, color=FOCUS, linewidth=1.4, marker=".", markersize=4, label="validation")
    if min(train + val) > 0 and max(train + val) > 5 * min(train + val):
        ax.set_yscale("log")
        _label_logarithmic(ax)
    _mark(ax, contents, at, val, "{:.4f} at epoch {}, the best")
    heading(ax, "Loss, all terms", "", 4.0, legend_rows=2)
    legend_above(ax, 2)


def _draw_quality(ax: Axes, contents: Contents) -> None:
    shown = (
        ("quality", "-", "quality"),
        ("utilization", "--", "utilization"),
        ("perplexity_over_k", ":", "perplexity / K"),
    )
    best: tuple[list[int], list[float]] = ([], [])
    for key, style, label in shown:
        at, values = _validated(contents, key)
        if at:
            colour = FOCUS if key == "quality" else NEUTRAL
            marker = "." if len(at) <= _FEW else ""  # many would hide how the line is dashed
            ax.plot(at, values, style, color=colour, linewidth=1.4, marker=marker, markersize=4, label=label)
            best = best if best[0] else (at, values)
    ax.set_ylim(0, 1)
    _mark(ax, contents, *best, "{:.4f} at the best epoch", explained=False)
    heading(
        ax,
        f"Quality on {contents.measured_on}" if contents.metrics else "Quality on validation rows",
        "",
        4.0,
        legend_rows=2,
    )
    legend_above(ax, 2)


def _validated(contents: Contents, key: str) -> tuple[list[int], list[float]]:
    found = [(r["epoch"], r["validation"][key]) for r in contents.epochs if key in (r.get("validation") or {})]
    return [epoch for epoch, _ in found], [value for _, value in found]


def _mark(ax: Axes, contents: Contents, at: list[int], values: list[float], text: str, explained: bool = True) -> None:
    """The best epoch, and where dead codes were replaced."""
    best = contents.best_epoch
    if best in at:
        value = values[at.index(best)]
        label = text.format(value, best)
        ax.plot([best], [value], "D", color=_BEST, markersize=5, label=label, zorder=4, clip_on=False)
    last = contents.epochs[-1]["epoch"]
    ax.set_xlim(0, last + max(1, 0.02 * last))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("epoch")
    resets = [(record["epoch"], record["resets"]) for record in contents.epochs if record.get("resets")]
    if resets:
        replaced = sum(number for _, number in resets)
        label = f"dead codes replaced: {replaced:,}" if explained else "_resets"
        ax.plot(
            [epoch for epoch, _ in resets],
            [0.0] * len(resets),
            "^" if len(resets) <= _MANY_RESETS else "|",
            color="black",
            markersize=4.5,
            transform=ax.get_xaxis_transform(),
            clip_on=False,
            zorder=4,
            label=label,
        )


def _label_logarithmic(ax: Axes) -> None:
    """Labels at 1, 2, 5 of every decade, or at the decades alone where there are many."""
    low, high = ax.get_ylim()
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 300 * low else (1.0,)))
    ax.yaxis.set_major_formatter("{x:.3g}")
    ax.yaxis.set_minor_locator(NullLocator())


def _summary(contents: Contents) -> list[tuple[str, str]]:
    """What was measured on the model as a whole."""
    metrics = contents.metrics
    shown: list[tuple[str, str]] = []

    def add(label: str, key: str, form: str, extra: str = "") -> None:
        value: Any = metrics.get(key)
        if value is not None:
            shown.append((label, format(value, form) + extra))

    add("quality", "quality", ".4f")
    add("reconstruction error", "reconstruction_error", ".4f")
    add("loss, all terms", "val_loss", ".4f")
    add("utilization", "utilization", ".3f")
    add("perplexity / K", "perplexity_over_k", ".3f")
    add("codes in use", "active_codes", ",", f" of {contents.total_codes:,}")
    add("distances kept: features to latents", "topo_pre", ".3f")
    add("distances kept: latents to codes", "topo_post", ".3f")
    add("category correlation, most", "category_correlation_max", ".3f")
    add("trainable parameters", "trainable_parameters", ",")
    add("code entries", "code_entries", ",")
    add("epochs", "epochs", ",", f", best {metrics['best_epoch']:,}" if "best_epoch" in metrics else "")
    add("samples", "samples", ",")
    if "total" in metrics.get("seconds", {}):
        shown.append(("seconds, all", f"{metrics['seconds']['total']:,.0f}"))
    return shown


def _write_summary(ax: Axes, contents: Contents, rows: list[tuple[str, str]], room: float) -> None:
    write_table(ax, rows, (0.0, 1.0))
    refitted = contents.config is not None and contents.config.training.decoder_refit > 0.0
    after = "; the decoder refitted after the last epoch" if refitted else ""
    heading(ax, "Summary", f"on {contents.measured_on}{after}", 3.0, room=room)


def _draw_categories(figure: Figure, cells: list[Any], contents: Contents, quality: list[str]) -> None:
    labels = distinct(contents.categories, 22)
    first: Axes | None = None
    for cell, key in zip(cells, quality, strict=True):
        ax = figure.add_subplot(cell, sharey=first)
        if key == "partial_mse":
            _draw_errors(ax, contents)
        else:
            _draw_heat_map(ax, contents, key)
        if first is None:
            first = ax
            ax.set_yticks(range(len(labels)), labels)
            ax.set_ylim(len(labels) - 0.5, -0.5)
        else:
            ax.tick_params(axis="y", labelleft=False)


def _draw_heat_map(ax: Axes, contents: Contents, key: str) -> None:
    values = np.full((len(contents.categories), contents.levels), np.nan)
    texts = [[""] * contents.levels for _ in contents.categories]
    found = contents.per_category(key) or []
    for book in contents.codebooks:
        value = found[book.category][book.level]
        values[book.category, book.level] = value if key == "utilization" else value / book.codes
        texts[book.category][book.level] = (
            f"{100 * value:.0f} %" if key == "utilization" else f"{value:.1f} of {book.codes}"
        )
    image = heat_map(ax, values, MAGNITUDE, 0.0, 1.0)
    write_cells(ax, image, texts)
    ax.set_xticks(range(contents.levels), [f"L{level}" for level in range(contents.levels)])
    if key == "utilization":
        heading(ax, "Utilization", "Share of a codebook's codes that occur.", 3.6, room=room_for(2))
    else:
        heading(ax, "Perplexity", "Codes that would do if all occurred equally often, of K.", 3.6, room=room_for(2))
        scale_bar(image, ax, "share of K", 0.03)


def _draw_errors(ax: Axes, contents: Contents) -> None:
    errors = contents.per_category("partial_mse") or []
    rows = range(len(errors))
    ax.barh(rows, errors, height=0.72, color=category_colours(len(errors)) or NEUTRAL)
    ax.axvline(1.0, color=FAINT, linewidth=0.8, linestyle="--", zorder=0)
    for row, error in enumerate(errors):
        ax.annotate(
            f"{error:.2f}",
            (error, row),
            (3, 0),
            textcoords="offset points",
            va="center",
            fontsize=SMALL,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.2},  # over the dashed line
        )
    ax.set_xlim(0, 1.18 * max(1.0, *errors))
    ax.tick_params(axis="y", length=0)
    heading(ax, "Error by category", "Own features told by one codebook alone; dashed: as good as their mean.", 2.5)
