"""The topological dashboard: maps of the codes and similarities of the codebooks."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec

from spinlock_fast.plot_style import MAGNITUDE, SIGNED
from spinlock_fast.report.checkpoint_summary import CheckpointSummary
from spinlock_fast.report.code_geometry import feature_similarity, latent_similarity
from spinlock_fast.report.code_maps import draw_feature_map, draw_latent_map, explain_marks, facet_grid
from spinlock_fast.report.data_statistics import DataStatistics
from spinlock_fast.report.layout import Row, create_page, fix_layout
from spinlock_fast.report.style import (
    add_colour_bar,
    add_heading,
    heat_map,
    labelled_ticks,
    range_text,
    unique_labels,
    write_table,
)

_MIN_POINTS = 5  # fewer codes are not drawn as a map
_LARGE, _SMALL = 7.0, 3.5  # inches, widths of the columns
_LEGEND = 0.75  # inches


def draw_topological(summary: CheckpointSummary, statistics: DataStatistics | None) -> Figure:
    """Large: codes and codebooks in feature space. Small: code vectors, whose codebooks share no axes. Tables."""
    table = Row(
        0.19 * (summary.levels + 2), 0.55, (1.0,) if statistics is not None or not summary.metrics else (1.9, 1.0)
    )
    mapped = summary.total_codes >= _MIN_POINTS
    if statistics is None:
        rows = [Row(4.4, 1.1, (1.0, 1.0)), table]
        figure, grid = create_page("Topology", summary, rows)
        if mapped:
            _draw_latent_column(figure, grid[0][0], summary, 4.4)
        _draw_latent_similarity(figure.add_subplot(grid[0][1]), summary, 4.0)
        if summary.metrics:
            _write_totals(figure.add_subplot(grid[1][1]), summary)
    else:
        side = min(max(3.4, 0.16 * len(summary.codebooks)), 5.6)
        shown = mapped and int(statistics.used.sum()) >= _MIN_POINTS
        height = max(5.2, 0.95 * facet_grid(len(summary.categories))[1])
        rows = [Row(height, 1.1, (_LARGE, _SMALL))] if mapped else []
        rows += [Row(side, 1.2, (_LARGE, _SMALL)), table]
        figure, grid = create_page("Topology", summary, rows)
        if mapped:
            _draw_latent_column(figure, grid[0][1], summary, height)
            if shown:
                draw_feature_map(figure.add_subplot(grid[0][0]), summary, statistics, _LARGE)
        _draw_feature_similarity(figure.add_subplot(grid[-2][0]), summary, statistics, side)
        _draw_similarity_column(figure, grid[-2][1], summary, side)
    _write_levels(figure.add_subplot(grid[-1][0]), summary, statistics)
    return fix_layout(figure)


def _draw_latent_column(figure: Figure, cell: SubplotSpec, summary: CheckpointSummary, height: float) -> None:
    """The map of the code vectors, and the legend of both maps below it."""
    parts = cell.subgridspec(2, 1, height_ratios=(max(height - _LEGEND, 1.0), _LEGEND))
    ax = figure.add_subplot(parts[0])
    draw_latent_map(ax, summary, _SMALL)
    explain_marks(figure.add_subplot(parts[1]), summary, _SMALL)


def _draw_similarity_column(figure: Figure, cell: SubplotSpec, summary: CheckpointSummary, height: float) -> None:
    """The similarity of the codebooks in latent space, and the totals below it."""
    if not summary.metrics:
        _draw_latent_similarity(figure.add_subplot(cell), summary, 2.6)
        return
    parts = cell.subgridspec(2, 1, height_ratios=(max(height - 1.3, 1.8), 0.8))
    _draw_latent_similarity(figure.add_subplot(parts[0]), summary, min(height - 1.3, 2.6))
    _write_totals(figure.add_subplot(parts[1]), summary)


def _draw_latent_similarity(ax: Axes, summary: CheckpointSummary, side: float) -> None:
    ax.set_anchor("NW")
    image = heat_map(ax, latent_similarity(summary), SIGNED, -1.0, 1.0, aspect="equal")
    _label_codebooks(ax, summary, side)
    add_colour_bar(image, ax, "cosine", 0.04)
    add_heading(
        ax,
        "Codebook centroids, latent",
        "Cosine of the mean code vectors. Codebooks share no axes: off the diagonal, values are chance.",
        3.4,
    )


def _draw_feature_similarity(ax: Axes, summary: CheckpointSummary, statistics: DataStatistics, side: float) -> None:
    image = heat_map(ax, feature_similarity(summary, statistics), MAGNITUDE, 0.0, 1.0, aspect="equal")
    _label_codebooks(ax, summary, side)
    add_colour_bar(image, ax, "RV", 0.04)
    add_heading(
        ax,
        "Codebooks in feature space",
        "RV coefficient of the covariances of code centroids. 1: two tokens separate samples along the same features; "
        "0: along others; grey: one code in use.",
        6.4,
    )


def _label_codebooks(ax: Axes, summary: CheckpointSummary, side: float) -> None:
    """Labels each category at the middle of its codebooks, with lines between categories."""
    category = np.array([codebook.category for codebook in summary.codebooks])
    labels = unique_labels(summary.categories, 16) if side > 3.0 else [str(c + 1) for c in range(category[-1] + 1)]
    shown = labelled_ticks(len(labels), side)
    centres = [float(np.flatnonzero(category == c).mean()) for c in shown]
    ax.set_yticks(centres, [labels[c] for c in shown])
    ax.set_xticks(centres, [str(c + 1) for c in shown], rotation=90 if 0.25 * len(shown) > side else 0)
    ax.set_xlabel(f"category, each with {_level_range(summary)}")
    width = 0.6 if len(labels) <= 20 else 0.25
    for edge in np.flatnonzero(np.diff(category)) + 0.5:
        ax.axhline(edge, color="white", linewidth=width)
        ax.axvline(edge, color="white", linewidth=width)


def _level_range(summary: CheckpointSummary) -> str:
    return "L0" if summary.levels == 1 else f"L0 to L{summary.levels - 1}"


def _write_levels(ax: Axes, summary: CheckpointSummary, statistics: DataStatistics | None) -> None:
    rows = _by_level(summary, statistics)
    widths = np.array([len(text) + 4 for text in rows[0]])
    write_table(ax, rows, (0.0, *(np.cumsum(widths) / widths.sum())[1:].tolist()), bold_first=True)
    measured = "utilization" in rows[0]
    add_heading(ax, "By level", f"utilization and perplexity on {summary.measured_on}" if measured else "", 6.0)


def _write_totals(ax: Axes, summary: CheckpointSummary) -> None:
    write_table(ax, _totals(summary), (0.0, 1.0))
    add_heading(ax, "Model", f"on {summary.measured_on}", 3.0)


def _by_level(summary: CheckpointSummary, statistics: DataStatistics | None) -> list[list[str]]:
    """A header, a row for each level, a row for all levels."""
    used, entropy = summary.per_category("utilization"), summary.per_category("perplexity")
    measured = used is not None and entropy is not None
    header = ["level", "codebooks", "dimensions", "codes"]
    header += [f"in use on {statistics.rows:,} rows"] if statistics is not None else []
    header += ["utilization", "perplexity / K"] if measured else []
    first = np.cumsum([0, *(codebook.codes for codebook in summary.codebooks)])
    rows = [header]
    for level in [*range(summary.levels), None]:
        chosen = [g for g, codebook in enumerate(summary.codebooks) if level in (None, codebook.level)]
        codebooks = [summary.codebooks[g] for g in chosen]
        dims = [codebook.dim for codebook in codebooks]
        row = ["all" if level is None else f"L{level}", f"{len(codebooks)}", range_text(dims)]
        row.append(f"{sum(codebook.codes for codebook in codebooks):,}")
        if statistics is not None:
            row.append(f"{sum(int(statistics.used[first[g] : first[g + 1]].sum()) for g in chosen):,}")
        if used is not None and entropy is not None:
            row.append(f"{np.mean([used[c.category][c.level] for c in codebooks]):.3f}")
            row.append(f"{np.mean([entropy[c.category][c.level] / c.codes for c in codebooks]):.3f}")
        rows.append(row)
    return rows


def _totals(summary: CheckpointSummary) -> list[list[str]]:
    """Label and value of the figures of the whole model."""
    shown = (
        ("quality", "quality"),
        ("distance preservation, latents", "topo_pre"),
        ("distance preservation, codes", "topo_post"),
    )
    rows = [[label, f"{summary.metrics[key]:.3f}"] for label, key in shown if key in summary.metrics]
    rows.append(["latent dimensions, all codebooks", f"{sum(codebook.dim for codebook in summary.codebooks):,}"])
    return rows
