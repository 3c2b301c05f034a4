"""Maps of the codes: by t-SNE of their vectors, and in feature space."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from spinlock_fast.features.names import column_of, family_of
from spinlock_fast.plot_style import BACKGROUND, FAINT, FOCUS, SMALL
from spinlock_fast.report.checkpoint_summary import CheckpointSummary
from spinlock_fast.report.code_geometry import Projection, clip_outliers, code_vectors, principal_components, tsne
from spinlock_fast.report.data_statistics import DataStatistics
from spinlock_fast.report.style import (
    add_heading,
    category_colours,
    legend_shape,
    level_marker,
    remove_frame,
    shorten,
    unique_labels,
)

_MAX_VECTOR_POINTS = 20_000  # in an SVG; more are drawn as an image


def facet_grid(count: int) -> tuple[int, int]:
    """(columns, rows) of the maps of many categories."""
    columns = min(max(math.ceil(math.sqrt(count)), 1), 7)
    return columns, math.ceil(count / columns)


def draw_latent_map(ax: Axes, summary: CheckpointSummary, width: float) -> None:
    """t-SNE of all code vectors.

    Args:
        width: of the axes in inches.
    """
    vectors = code_vectors(summary)
    _draw_map(ax, summary, tsne(vectors), np.ones(len(vectors), dtype=bool), np.full(len(vectors), 1.0), width)
    ax.set_xlabel("t-SNE 1")
    ax.set_ylabel("t-SNE 2")
    add_heading(
        ax,
        f"{len(vectors):,} code vectors, latent",
        "Codebooks share no axes: compare points of one category and level only. Distances, gaps and areas of t-SNE "
        "have no meaning.",
        width,
    )


def draw_feature_map(ax: Axes, summary: CheckpointSummary, statistics: DataStatistics, width: float) -> None:
    """Mean features of the rows of each code, on two principal components."""
    used = statistics.used
    projection = principal_components(statistics.centroids[used])
    points, moved = clip_outliers(projection.points)
    _draw_map(ax, summary, points, used, statistics.counts[used] / statistics.rows, width)
    ax.set_xlabel(_component_text(projection, 0, summary, width))
    ax.set_ylabel(_component_text(projection, 1, summary, 0.6 * width))
    pinned = f" Clipped to the edge: {moved:,}." if moved else ""
    add_heading(
        ax,
        f"{len(points):,} codes in feature space",
        f"Mean features of the rows of each code in use, on {statistics.rows:,} rows of "
        f"{shorten(statistics.name, 40)}. All codes share the axes: close codes mean similar rows. Area: share of the "
        f"rows.{pinned}",
        width,
    )


def _component_text(projection: Projection, k: int, summary: CheckpointSummary, width: float) -> str:
    """The name of an axis: its share of the variance and, where they have names, the features that weigh most."""
    text, named = f"component {k + 1}, {100 * projection.shares[k]:.0f} % of the variance", ""
    loadings, nameless = projection.loadings[k], set(summary.nameless_families)
    for i in np.argsort(-np.abs(loadings), kind="stable")[:3]:
        family, name = family_of(summary.feature_names[i]), column_of(summary.feature_names[i])
        longer = f"{named}{', ' if named else ''}{'+' if loadings[i] > 0 else '-'}{shorten(name, 28)}"
        if family in nameless or 0.062 * len(f"{text}: {longer}") > width:
            break
        named = longer
    return f"{text}: {named}" if named else text


def _draw_map(
    ax: Axes,
    summary: CheckpointSummary,
    points: NDArray[np.float64],
    used: NDArray[np.bool_],
    share: NDArray[np.float64],
    width: float,
) -> None:
    """Draws points [n, 2] by category and level; `share` [n] gives their areas."""
    codes = [codebook.codes for codebook in summary.codebooks]
    category = np.repeat([codebook.category for codebook in summary.codebooks], codes)[used]
    level = np.repeat([codebook.level for codebook in summary.codebooks], codes)[used]
    area = np.full(len(points), 2.0 * width) if np.ptp(share) == 0 else (2.0 + 18.0 * share) * width
    colours = category_colours(len(summary.categories))
    remove_frame(ax)
    if colours is None:
        _draw_facets(ax, summary, points, category, level, area, width)
        return
    for number in np.unique(level)[::-1]:  # fine levels have fewer codes with larger areas
        for c, colour in enumerate(colours):
            _scatter(ax, points, (category == c) & (level == number), int(number), colour, area)
    for spine in ax.spines.values():
        spine.set_visible(True)
        spine.set_color("#cccccc")
    ax.margins(0.03)
    ax.set_aspect("equal", adjustable="datalim")


def _draw_facets(
    ax: Axes,
    summary: CheckpointSummary,
    points: NDArray[np.float64],
    category: NDArray[np.int64],
    level: NDArray[np.int64],
    area: NDArray[np.float64],
    width: float,
) -> None:
    """With more categories than colours: one map per category, which is highlighted."""
    columns, rows = facet_grid(len(summary.categories))
    extent = float(np.ptp(points, axis=0).max()) or 1.0
    unit = (points - (points.max(0) + points.min(0)) / 2) / extent + 0.5
    most = int(width / columns / 0.062)
    numbers = [str(c + 1) for c in range(len(summary.categories))]
    labels = unique_labels(summary.categories, most) if most >= 12 else numbers
    places = [unit * (0.9, 0.74) + (c % columns + 0.05, -(c // columns)) for c in range(len(labels))]
    every = np.concatenate(places)
    many = len(every) > _MAX_VECTOR_POINTS
    ax.scatter(every[:, 0], every[:, 1], s=0.4 * width, color=BACKGROUND, linewidths=0, rasterized=many)
    for c, (label, place) in enumerate(zip(labels, places, strict=True)):
        line, column = divmod(c, columns)
        for number in np.unique(level)[::-1]:
            chosen = (category == c) & (level == number)
            _scatter(ax, place, chosen, int(number), FOCUS, np.minimum(area, 4.0 * width))
        ax.text(column + 0.03, -line + 0.78, label, fontsize=SMALL, va="bottom")
    ax.set_xlim(0, columns)
    ax.set_ylim(1 - rows, 1)


def _scatter(
    ax: Axes,
    points: NDArray[np.float64],
    chosen: NDArray[np.bool_],
    level: int,
    colour: str,
    area: NDArray[np.float64],
) -> None:
    if chosen.any():
        x, y = points[chosen].T
        ax.scatter(x, y, s=area[chosen], marker=level_marker(level), color=colour, edgecolors="white", linewidths=0.3)


def explain_marks(ax: Axes, summary: CheckpointSummary, width: float) -> None:
    """Writes the legend of the maps into an empty axes: levels, and categories where they have colours."""
    remove_frame(ax)

    def mark(marker: str, colour: str, size: float, label: str) -> Line2D:
        return Line2D([], [], ls="", marker=marker, color=colour, markersize=size, markeredgewidth=0, label=label)

    def add(top: float, handles: list[Line2D], columns: int) -> None:
        options: dict[str, Any] = {"borderaxespad": 0.0, "borderpad": 0.0, "handletextpad": 0.2, "columnspacing": 1.2}
        labels = [str(handle.get_label()) for handle in handles]
        ax.add_artist(Legend(ax, handles, labels, loc="upper left", bbox_to_anchor=(0, top), ncols=columns, **options))

    levels = [mark(level_marker(level), FAINT, 5.0, f"L{level}") for level in range(summary.levels)]
    add(1.0, levels, len(levels))
    colours = category_colours(len(summary.categories))
    if colours:
        names = unique_labels(summary.categories, 24)
        marks = [mark("s", colour, 6.0, name) for colour, name in zip(colours, names, strict=True)]
        add(0.8, marks, legend_shape(names, width)[0])
