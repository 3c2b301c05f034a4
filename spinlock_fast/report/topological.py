"""The topological dashboard: where the codes lie, and which codebooks tell the same things apart."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from spinlock_fast.report.contents import Contents
from spinlock_fast.report.layout import Row, page, settle
from spinlock_fast.report.sample import Sample
from spinlock_fast.report.style import (
    FAINT,
    FOCUS,
    MAGNITUDE,
    REST,
    SIGNED,
    SMALL,
    bare,
    category_colours,
    distinct,
    every,
    heading,
    heat_map,
    legend_shape,
    level_marker,
    scale_bar,
    shorten,
    spread,
    write_table,
)

_SEED = 0
_PERPLEXITY = 30.0
_FEWEST = 5  # points that are worth a map

Panel = Callable[[Axes], None]


def draw_topological(contents: Contents, sample: Sample | None) -> Figure:
    """Maps of the codes, similarities of the codebooks, statistics."""
    count = len(contents.categories)
    columns, lines = _facets(count)
    map_height = 4.3 if category_colours(count) else lines * 0.92
    side = min(max(2.6, 0.16 * len(contents.codebooks)), 4.05)
    maps: list[Panel] = []
    matrices: list[Panel] = [lambda ax: _draw_latent_similarity(ax, contents, side)]
    if contents.total_codes >= _FEWEST:
        maps.append(lambda ax: _draw_codes(ax, contents, columns))
    if sample is not None:
        matrices.append(lambda ax: _draw_feature_similarity(ax, contents, sample, side))
        if sample.used.sum() >= _FEWEST:
            maps.append(lambda ax: _draw_centroids(ax, contents, sample, columns))
    tables: list[Panel] = [lambda ax: _write_levels(ax, contents, sample)]
    if contents.metrics:
        tables.append(lambda ax: _write_totals(ax, contents))
    panels = [maps, matrices, tables] if sample is not None else [maps + matrices, tables]
    heights = [map_height, side] if sample is not None else [max(map_height, side)]
    rows = [Row(height, 1.1, (1.0,) * max(len(row), 1)) for height, row in zip(heights, panels, strict=False)]
    rows.append(Row(0.19 * (contents.levels + 2), 0.55, (1.9, 1.0)[: len(tables)]))
    shown = [i for i, row in enumerate(panels) if row]
    figure, grid = page("Topology", contents, [rows[i] for i in shown])
    for row, cells in zip([panels[i] for i in shown], grid, strict=True):
        for draw, cell in zip(row, cells, strict=True):
            draw(figure.add_subplot(cell))
    return settle(figure)


def code_vectors(contents: Contents) -> NDArray[np.float64]:
    """[codes, largest D] code vectors of length 1, zero-padded."""
    quantizer = contents.model.quantizer
    widest = max(book.dim for book in contents.codebooks)
    padded = []
    for g in range(len(contents.codebooks)):
        codes = quantizer.codebook(g).detach().cpu().double().numpy()
        length = np.linalg.norm(codes, axis=1, keepdims=True)
        codes = np.divide(codes, length, out=np.zeros_like(codes), where=length > 0)
        padded.append(np.pad(codes, ((0, 0), (0, widest - codes.shape[1]))))
    return np.concatenate(padded)


def embed(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """[n, 2] t-SNE (van der Maaten and Hinton 2008), the same on each call."""
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    perplexity = min(_PERPLEXITY, (len(points) - 1) / 3)
    with threadpool_limits(1):  # several threads add up in an order that varies
        found: NDArray[np.float64] = TSNE(
            perplexity=perplexity, init="pca", learning_rate="auto", random_state=_SEED
        ).fit_transform(points)
    return found


def project(points: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """[n, 2] the two principal components, and [2] their shares of the variance."""
    centred = points - points.mean(0)
    left, size, axes = np.linalg.svd(centred, full_matrices=False)
    sign = np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(1)])  # else either way round is right
    total = float(np.square(size).sum())
    placed: NDArray[np.float64] = (left * size * sign)[:, :2]
    return placed, np.square(size[:2]) / (total if total > 0 else 1.0)


def pin_outliers(points: NDArray[np.float64]) -> tuple[NDArray[np.float64], int]:
    """Points far outside of the middle 96 %, which would squeeze all others, moved to a frame; how many were."""
    low, high = np.quantile(points, (0.02, 0.98), axis=0)
    margin = 0.3 * (high - low)
    inside: NDArray[np.float64] = np.clip(points, low - margin, high + margin)
    return inside, int((inside != points).any(1).sum())


def latent_similarity(contents: Contents) -> NDArray[np.float64]:
    """[G, G] cosine between the mean code vectors of codebooks, zero-padded."""
    quantizer = contents.model.quantizer
    widest = max(book.dim for book in contents.codebooks)
    means = np.zeros((len(contents.codebooks), widest))
    for g, book in enumerate(contents.codebooks):
        means[g, : book.dim] = quantizer.codebook(g).detach().cpu().double().mean(0).numpy()
    length = np.linalg.norm(means, axis=1, keepdims=True)
    unit = np.divide(means, length, out=np.zeros_like(means), where=length > 0)
    cosine: NDArray[np.float64] = np.clip(unit @ unit.T, -1.0, 1.0)
    return cosine


def feature_similarity(contents: Contents, sample: Sample) -> NDArray[np.float64]:
    """[G, G] in 0..1, cosine between the covariances (F x F) of the features' means given a token; NaN for one code.

    The RV coefficient of Escoufier (1973), without F x F matrices: tr(S_g S_h) = sum_kl p_k p_l (m_k . m_l)^2.
    """
    book_of = np.repeat(np.arange(len(contents.codebooks)), [book.codes for book in contents.codebooks])
    share = sample.counts / sample.rows
    means = np.where(sample.used[:, None], sample.centroids, 0.0)
    mean = share[book_of == 0] @ means[book_of == 0]
    deviation = np.sqrt(share)[:, None] * (means - mean)
    member = np.eye(len(contents.codebooks))[book_of]
    products: NDArray[np.float64] = member.T @ np.square(deviation @ deviation.T) @ member
    several = member.T @ sample.used > 1  # one code alone tells nothing apart
    size = np.where(several, np.sqrt(np.diag(products)), 0.0)
    scale = np.outer(size, size)
    np.divide(products, scale, out=products, where=scale > 0)
    return np.where(scale > 0, np.clip(products, 0.0, 1.0), np.nan)


def _facets(count: int) -> tuple[int, int]:
    columns = min(max(math.ceil(math.sqrt(count)), 1), 7)
    return columns, math.ceil(count / columns)


def _draw_codes(ax: Axes, contents: Contents, columns: int) -> None:
    vectors = code_vectors(contents)
    _draw_map(ax, contents, embed(vectors), np.ones(len(vectors), dtype=bool), columns)
    heading(
        ax,
        f"{len(vectors):,} code vectors, latent",
        "Directions in the latent space of each codebook, padded with zeros. The spaces share no axes: only points of "
        "one category and level may be compared. t-SNE keeps neighbours together; long distances, gaps and areas say "
        "nothing.",
        5.5,
    )
    _explain_marks(ax, contents)


def _draw_centroids(ax: Axes, contents: Contents, sample: Sample, columns: int) -> None:
    points, shares = project(sample.centroids[sample.used])
    points, moved = pin_outliers(points)
    _draw_map(ax, contents, points, sample.used, columns)
    pinned = f"; farther out, at the edge: {moved:,}" if moved else ""
    heading(
        ax,
        f"{len(points):,} codes in feature space",
        f"Mean normalised features of the samples of each code that occurs among {sample.rows:,} rows of "
        f"{shorten(sample.name, 40)}. All may be compared: distances are differences of mean features, as far as the "
        f"two principal components tell ({shares[0]:.0%} and {shares[1]:.0%} of the variance{pinned}).",
        5.5,
    )
    _explain_marks(ax, contents)


def _draw_map(ax: Axes, contents: Contents, points: NDArray[np.float64], used: NDArray[np.bool_], columns: int) -> None:
    codes = [book.codes for book in contents.codebooks]
    category = np.repeat([book.category for book in contents.codebooks], codes)[used]
    level = np.repeat([book.level for book in contents.codebooks], codes)[used]
    colours = category_colours(len(contents.categories))
    bare(ax)
    if colours is None:
        _draw_facets(ax, contents, points, category, level, columns)
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
    contents: Contents,
    points: NDArray[np.float64],
    category: NDArray[np.int64],
    level: NDArray[np.int64],
    columns: int,
) -> None:
    """Too many categories for colours: the same map once for each, which alone is in colour."""
    extent = float(np.ptp(points, axis=0).max()) or 1.0
    unit = (points - (points.max(0) + points.min(0)) / 2) / extent + 0.5
    for c, label in enumerate(distinct(contents.categories, 70 // columns)):
        line, column = divmod(c, columns)
        place = unit * (0.9, 0.74) + (column + 0.05, -line)
        ax.scatter(place[:, 0], place[:, 1], s=2.5, color=REST, linewidths=0)
        _scatter(ax, place, category == c, level, FOCUS, 9.0)
        ax.text(column + 0.03, -line + 0.78, label, fontsize=SMALL, va="bottom")
    ax.set_xlim(0, columns)
    ax.set_ylim(1 - math.ceil(len(contents.categories) / columns), 1)


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


def _explain_marks(ax: Axes, contents: Contents) -> None:
    """Below the map: a column of levels, and at its right the categories."""

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
        ax.add_artist(legend).set_clip_on(False)  # what is clipped takes no part in the layout

    def mark(marker: str, colour: str, size: float, label: str) -> Line2D:
        return Line2D([], [], ls="", marker=marker, color=colour, markersize=size, markeredgewidth=0, label=label)

    levels = range(contents.levels)
    colours = category_colours(len(contents.categories))
    below(0.0, [mark(level_marker(level), FAINT, 5.0, f"L{level}") for level in levels], 1 if colours else len(levels))
    if colours:
        names = distinct(contents.categories, 24)
        columns = min(legend_shape(names, 4.6)[0], math.ceil(len(names) / len(levels)))
        below(0.09, [mark("s", colour, 6.0, name) for colour, name in zip(colours, names, strict=True)], columns)


def _draw_latent_similarity(ax: Axes, contents: Contents, side: float) -> None:
    image = heat_map(ax, latent_similarity(contents), SIGNED, -1.0, 1.0, aspect="equal")
    _label_codebooks(ax, contents, side)
    scale_bar(image, ax, "cosine", 0.04)
    heading(
        ax,
        "Codebook centroids, latent",
        "Cosine of the mean code vectors, padded with zeros. The spaces share no axes: what lies off the diagonal is "
        "chance, not likeness.",
        4.7,
    )


def _draw_feature_similarity(ax: Axes, contents: Contents, sample: Sample, side: float) -> None:
    image = heat_map(ax, feature_similarity(contents, sample), MAGNITUDE, 0.0, 1.0, aspect="equal")
    _label_codebooks(ax, contents, side)
    scale_bar(image, ax, "cosine", 0.04)
    heading(
        ax,
        "Codebooks in feature space",
        "1: two tokens tell samples apart along the same features, 0: along others. Cosine of the covariances of code "
        "centroids; white: one code alone occurs.",
        4.7,
    )


def _label_codebooks(ax: Axes, contents: Contents, side: float) -> None:
    """Categories at the middle of their codebooks, lines between them."""
    category = np.array([book.category for book in contents.codebooks])
    labels = distinct(contents.categories, 16)
    shown = every(len(labels), side)
    centres = [float(np.flatnonzero(category == c).mean()) for c in shown]
    ax.set_yticks(centres, [labels[c] for c in shown])
    ax.set_xticks(centres, [str(c + 1) for c in shown], rotation=90 if len(shown) > 20 else 0)
    width = 0.6 if len(labels) <= 20 else 0.25
    for edge in np.flatnonzero(np.diff(category)) + 0.5:
        ax.axhline(edge, color="white", linewidth=width)
        ax.axvline(edge, color="white", linewidth=width)


def _write_levels(ax: Axes, contents: Contents, sample: Sample | None) -> None:
    rows = _by_level(contents, sample)
    widths = np.array([len(text) + 4 for text in rows[0]])
    write_table(ax, rows, (0.0, *(np.cumsum(widths) / widths.sum())[1:].tolist()), bold_first=True)
    measured = "utilization" in rows[0]
    heading(ax, "By level", f"utilization and perplexity on {contents.measured_on}" if measured else "", 6.0)


def _write_totals(ax: Axes, contents: Contents) -> None:
    write_table(ax, _totals(contents), (0.0, 1.0))
    heading(ax, "Model", f"on {contents.measured_on}", 3.0)


def _by_level(contents: Contents, sample: Sample | None) -> list[list[str]]:
    """A head, a row for each level, a row for all."""
    used, entropy = contents.per_category("utilization"), contents.per_category("perplexity")
    measured = used is not None and entropy is not None
    head = ["level", "codebooks", "dimensions", "codes"]
    head += [f"occur in {sample.rows:,} rows"] if sample is not None else []
    head += ["utilization", "perplexity / K"] if measured else []
    first = np.cumsum([0, *(book.codes for book in contents.codebooks)])
    rows = [head]
    for level in [*range(contents.levels), None]:
        chosen = [g for g, book in enumerate(contents.codebooks) if level in (None, book.level)]
        books = [contents.codebooks[g] for g in chosen]
        dims = [book.dim for book in books]
        row = ["all" if level is None else f"L{level}", f"{len(books)}", spread(dims)]
        row.append(f"{sum(book.codes for book in books):,}")
        if sample is not None:
            row.append(f"{sum(int(sample.used[first[g] : first[g + 1]].sum()) for g in chosen):,}")
        if used is not None and entropy is not None:
            row.append(f"{np.mean([used[book.category][book.level] for book in books]):.3f}")
            row.append(f"{np.mean([entropy[book.category][book.level] / book.codes for book in books]):.3f}")
        rows.append(row)
    return rows


def _totals(contents: Contents) -> list[list[str]]:
    """What was measured on the model as a whole."""
    shown = (
        ("quality", "quality"),
        ("distances kept: features to latents", "topo_pre"),
        ("distances kept: latents to codes", "topo_post"),
    )
    rows = [[label, f"{contents.metrics[key]:.3f}"] for label, key in shown if key in contents.metrics]
    rows.append(["latent dimensions, all codebooks", f"{sum(book.dim for book in contents.codebooks):,}"])
    return rows
