"""The topological dashboard: maps of the codes and similarities of the codebooks."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from spinlock_fast.plot_style import BACKGROUND, FAINT, FOCUS, MAGNITUDE, SIGNED, SMALL
from spinlock_fast.report.checkpoint_summary import CheckpointSummary
from spinlock_fast.report.data_statistics import DataStatistics
from spinlock_fast.report.layout import Row, create_page, fix_layout
from spinlock_fast.report.style import (
    add_colour_bar,
    add_heading,
    category_colours,
    heat_map,
    labelled_ticks,
    legend_shape,
    level_marker,
    range_text,
    remove_frame,
    shorten,
    unique_labels,
    write_table,
)

_SEED = 0
_PERPLEXITY = 30.0
_MIN_POINTS = 5  # fewer codes are not drawn as a map

Panel = Callable[[Axes], None]


def draw_topological(summary: CheckpointSummary, statistics: DataStatistics | None) -> Figure:
    """Maps of the codes, similarity matrices of the codebooks, tables."""
    count = len(summary.categories)
    columns, lines = _facet_grid(count)
    map_height = 4.3 if category_colours(count) else lines * 0.92
    side = min(max(2.6, 0.16 * len(summary.codebooks)), 4.05)
    maps: list[Panel] = []
    matrices: list[Panel] = [lambda ax: _draw_latent_similarity(ax, summary, side)]
    if summary.total_codes >= _MIN_POINTS:
        maps.append(lambda ax: _draw_codes(ax, summary, columns))
    if statistics is not None:
        matrices.append(lambda ax: _draw_feature_similarity(ax, summary, statistics, side))
        if statistics.used.sum() >= _MIN_POINTS:
            maps.append(lambda ax: _draw_centroids(ax, summary, statistics, columns))
    tables: list[Panel] = [lambda ax: _write_levels(ax, summary, statistics)]
    if summary.metrics:
        tables.append(lambda ax: _write_totals(ax, summary))
    panels = [maps, matrices, tables] if statistics is not None else [maps + matrices, tables]
    heights = [map_height, side] if statistics is not None else [max(map_height, side)]
    rows = [Row(height, 1.1, (1.0,) * max(len(row), 1)) for height, row in zip(heights, panels, strict=False)]
    rows.append(Row(0.19 * (summary.levels + 2), 0.55, (1.9, 1.0)[: len(tables)]))
    shown = [i for i, row in enumerate(panels) if row]
    figure, grid = create_page("Topology", summary, [rows[i] for i in shown])
    for row, cells in zip([panels[i] for i in shown], grid, strict=True):
        for draw, cell in zip(row, cells, strict=True):
            draw(figure.add_subplot(cell))
    return fix_layout(figure)


def code_vectors(summary: CheckpointSummary) -> NDArray[np.float64]:
    """[codes, max D] code vectors normalised to length 1, zero-padded."""
    quantizer = summary.model.quantizer
    widest = max(codebook.dim for codebook in summary.codebooks)
    padded = []
    for g in range(len(summary.codebooks)):
        codes = quantizer.codebook(g).detach().cpu().double().numpy()
        length = np.linalg.norm(codes, axis=1, keepdims=True)
        codes = np.divide(codes, length, out=np.zeros_like(codes), where=length > 0)
        padded.append(np.pad(codes, ((0, 0), (0, widest - codes.shape[1]))))
    return np.concatenate(padded)


def tsne(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """[n, 2] t-SNE embedding (van der Maaten and Hinton 2008), deterministic."""
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    perplexity = min(_PERPLEXITY, (len(points) - 1) / 3)
    with threadpool_limits(1):  # the summation order of several threads varies
        embedded: NDArray[np.float64] = TSNE(
            perplexity=perplexity, init="pca", learning_rate="auto", random_state=_SEED
        ).fit_transform(points)
    return embedded


def principal_components(points: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """[n, 2] projection on the first two principal components, and [2] their shares of the variance."""
    centred = points - points.mean(0)
    left, size, axes = np.linalg.svd(centred, full_matrices=False)
    sign = np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(1)])  # the sign of a component is arbitrary
    total = float(np.square(size).sum())
    projected: NDArray[np.float64] = (left * size * sign)[:, :2]
    return projected, np.square(size[:2]) / (total if total > 0 else 1.0)


def clip_outliers(points: NDArray[np.float64]) -> tuple[NDArray[np.float64], int]:
    """Points clipped to a frame around the middle 96 % per axis, and the number of points that moved."""
    low, high = np.quantile(points, (0.02, 0.98), axis=0)
    margin = 0.3 * (high - low)
    inside: NDArray[np.float64] = np.clip(points, low - margin, high + margin)
    return inside, int((inside != points).any(1).sum())


def latent_similarity(summary: CheckpointSummary) -> NDArray[np.float64]:
    """[G, G] cosine similarity of the mean code vectors of codebooks, zero-padded."""
    quantizer = summary.model.quantizer
    widest = max(codebook.dim for codebook in summary.codebooks)
    means = np.zeros((len(summary.codebooks), widest))
    for g, codebook in enumerate(summary.codebooks):
        means[g, : codebook.dim] = quantizer.codebook(g).detach().cpu().double().mean(0).numpy()
    length = np.linalg.norm(means, axis=1, keepdims=True)
    unit = np.divide(means, length, out=np.zeros_like(means), where=length > 0)
    cosine: NDArray[np.float64] = np.clip(unit @ unit.T, -1.0, 1.0)
    return cosine


def feature_similarity(summary: CheckpointSummary, statistics: DataStatistics) -> NDArray[np.float64]:
    """[G, G] in [0, 1]: RV coefficient of the covariances of the conditional feature means given a token.

    Escoufier (1973): tr(S_g S_h) / (|S_g| |S_h|), computed without F x F matrices as
    tr(S_g S_h) = sum_kl p_k p_l (m_k . m_l)^2. NaN where a codebook has one code in use.
    """
    codebook_of = np.repeat(np.arange(len(summary.codebooks)), [codebook.codes for codebook in summary.codebooks])
    share = statistics.counts / statistics.rows
    means = np.where(statistics.used[:, None], statistics.centroids, 0.0)
    mean = share[codebook_of == 0] @ means[codebook_of == 0]
    deviation = np.sqrt(share)[:, None] * (means - mean)
    member = np.eye(len(summary.codebooks))[codebook_of]
    products: NDArray[np.float64] = member.T @ np.square(deviation @ deviation.T) @ member
    several = member.T @ statistics.used > 1  # a single code has no variance
    size = np.where(several, np.sqrt(np.diag(products)), 0.0)
    scale = np.outer(size, size)
    np.divide(products, scale, out=products, where=scale > 0)
    return np.where(scale > 0, np.clip(products, 0.0, 1.0), np.nan)


def _facet_grid(count: int) -> tuple[int, int]:
    columns = min(max(math.ceil(math.sqrt(count)), 1), 7)
    return columns, math.ceil(count / columns)


def _draw_codes(ax: Axes, summary: CheckpointSummary, columns: int) -> None:
    vectors = code_vectors(summary)
    _draw_map(ax, summary, tsne(vectors), np.ones(len(vectors), dtype=bool), columns)
    add_heading(
        ax,
        f"{len(vectors):,} code vectors, latent",
        "Normalised code vectors, zero-padded. Codebooks share no axes: compare points of one category and level only. "
        "t-SNE preserves neighbourhoods; long distances, gaps and areas carry no meaning.",
        5.5,
    )
    _explain_marks(ax, summary)


def _draw_centroids(ax: Axes, summary: CheckpointSummary, statistics: DataStatistics, columns: int) -> None:
    points, shares = principal_components(statistics.centroids[statistics.used])
    points, moved = clip_outliers(points)
    _draw_map(ax, summary, points, statistics.used, columns)
    pinned = f"; clipped to the edge: {moved:,}" if moved else ""
    add_heading(
        ax,
        f"{len(points):,} codes in feature space",
        f"Mean normalised features of the samples of each code in use, on {statistics.rows:,} rows of "
        f"{shorten(statistics.name, 40)}. All codes are comparable: distances are differences of mean features in the "
        f"first two principal components ({shares[0]:.0%} and {shares[1]:.0%} of the variance{pinned}).",
        5.5,
    )
    _explain_marks(ax, summary)


def _draw_map(
    ax: Axes, summary: CheckpointSummary, points: NDArray[np.float64], used: NDArray[np.bool_], columns: int
) -> None:
    codes = [codebook.codes for codebook in summary.codebooks]
    category = np.repeat([codebook.category for codebook in summary.codebooks], codes)[used]
    level = np.repeat([codebook.level for codebook in summary.codebooks], codes)[used]
    colours = category_colours(len(summary.categories))
    remove_frame(ax)
    if colours is None:
        _draw_facets(ax, summary, points, category, level, columns)
        return
    for c, colour in enumerate(colours):
        _scatter(ax, points, category == c, level, colour, 20.0)
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
    columns: int,
) -> None:
    """With more categories than colours: one map per category, which is highlighted."""
    extent = float(np.ptp(points, axis=0).max()) or 1.0
    unit = (points - (points.max(0) + points.min(0)) / 2) / extent + 0.5
    for c, label in enumerate(unique_labels(summary.categories, 70 // columns)):
        line, column = divmod(c, columns)
        place = unit * (0.9, 0.74) + (column + 0.05, -line)
        ax.scatter(place[:, 0], place[:, 1], s=2.5, color=BACKGROUND, linewidths=0)
        _scatter(ax, place, category == c, level, FOCUS, 9.0)
        ax.text(column + 0.03, -line + 0.78, label, fontsize=SMALL, va="bottom")
    ax.set_xlim(0, columns)
    ax.set_ylim(1 - math.ceil(len(summary.categories) / columns), 1)


def _scatter(
    ax: Axes, points: NDArray[np.float64], chosen: NDArray[np.bool_], level: NDArray[np.int64], colour: str, size: float
) -> None:
    for number in np.unique(level[chosen]):
        x, y = points[chosen & (level == number)].T
        ax.scatter(
            x,
            y,
            s=size,
            marker=level_marker(int(number)),
            color=colour,
            edgecolors="white",
            linewidths=0.3,
        )


def _explain_marks(ax: Axes, summary: CheckpointSummary) -> None:
    """Adds the legend below the map: levels on the left, categories on the right."""

    def below(left: float, handles: list[Line2D], columns: int) -> None:
        legend = Legend(
            ax,
            handles,
            [str(handle.get_label()) for handle in handles],
            loc="upper left",
            bbox_to_anchor=(left, 0),
            ncols=columns,
            borderaxespad=0.4,
            borderpad=0.0,
            handletextpad=0.2,
            columnspacing=1.2,
            labelspacing=0.35,
        )
        ax.add_artist(legend).set_clip_on(False)  # clipped artists are ignored by the layout

    def mark(marker: str, colour: str, size: float, label: str) -> Line2D:
        return Line2D([], [], ls="", marker=marker, color=colour, markersize=size, markeredgewidth=0, label=label)

    levels = range(summary.levels)
    colours = category_colours(len(summary.categories))
    below(0.0, [mark(level_marker(level), FAINT, 5.0, f"L{level}") for level in levels], 1 if colours else len(levels))
    if colours:
        names = unique_labels(summary.categories, 24)
        columns = min(legend_shape(names, 4.6)[0], math.ceil(len(names) / len(levels)))
        below(0.09, [mark("s", colour, 6.0, name) for colour, name in zip(colours, names, strict=True)], columns)


def _draw_latent_similarity(ax: Axes, summary: CheckpointSummary, side: float) -> None:
    image = heat_map(ax, latent_similarity(summary), SIGNED, -1.0, 1.0, aspect="equal")
    _label_codebooks(ax, summary, side)
    add_colour_bar(image, ax, "cosine", 0.04)
    add_heading(
        ax,
        "Codebook centroids, latent",
        "Cosine of the mean code vectors, zero-padded. Codebooks share no axes: values off the diagonal are chance.",
        4.7,
    )


def _draw_feature_similarity(ax: Axes, summary: CheckpointSummary, statistics: DataStatistics, side: float) -> None:
    image = heat_map(ax, feature_similarity(summary, statistics), MAGNITUDE, 0.0, 1.0, aspect="equal")
    _label_codebooks(ax, summary, side)
    add_colour_bar(image, ax, "RV", 0.04)
    add_heading(
        ax,
        "Codebooks in feature space",
        "RV coefficient of the covariances of code centroids. 1: two tokens separate samples along the same features; "
        "0: along others; white: one code in use.",
        4.7,
    )


def _label_codebooks(ax: Axes, summary: CheckpointSummary, side: float) -> None:
    """Labels each category at the middle of its codebooks, with lines between categories."""
    category = np.array([codebook.category for codebook in summary.codebooks])
    labels = unique_labels(summary.categories, 16)
    shown = labelled_ticks(len(labels), side)
    centres = [float(np.flatnonzero(category == c).mean()) for c in shown]
    ax.set_yticks(centres, [labels[c] for c in shown])
    ax.set_xticks(centres, [str(c + 1) for c in shown], rotation=90 if len(shown) > 20 else 0)
    width = 0.6 if len(labels) <= 20 else 0.25
    for edge in np.flatnonzero(np.diff(category)) + 0.5:
        ax.axhline(edge, color="white", linewidth=width)
        ax.axvline(edge, color="white", linewidth=width)


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
