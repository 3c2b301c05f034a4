"""Categories as named groups of features, and beside them what their tokens tell."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from numpy.typing import NDArray

from spinlock_fast.features.names import column_of, family_of
from spinlock_fast.plot_style import FAINT, SMALL
from spinlock_fast.report.association_panel import LINE, MAX_CONDITIONS, draw_associations, two_decimals
from spinlock_fast.report.checkpoint_summary import CheckpointSummary
from spinlock_fast.report.condition_associations import Associations
from spinlock_fast.report.data_statistics import DataStatistics
from spinlock_fast.report.style import (
    WIDTH,
    add_heading,
    family_fills,
    heading_height,
    legend_above,
    legend_shape,
    remove_frame,
    shorten,
    unique_labels,
)

MAX_WRITTEN = 12  # categories; with more, each has one line
_CHARACTER = 0.058  # inches, of SMALL text
_BARS = 1.5  # inches
_BESIDE_HEAT_MAP = 1.5  # inches of its labels and colour bar


class CategoryPanels:
    """Sizes of the panels of the categories, which share their rows."""

    def __init__(
        self, summary: CheckpointSummary, statistics: DataStatistics | None, associations: Associations | None
    ) -> None:
        self.summary, self.statistics, self.associations = summary, statistics, associations
        count = len(summary.categories)
        self.detailed = count <= MAX_WRITTEN
        self.lines = max(summary.levels, 3) if self.detailed else 1  # of each category
        self.height = max(count * self.lines * LINE, 0.7)
        labels = max(map(len, unique_labels(summary.categories, 22))) * _CHARACTER
        room = WIDTH - 0.5 - labels - _BARS
        shown = min(len(associations.conditions), MAX_CONDITIONS) if associations is not None else 0
        heat = min(0.27 * max(shown, 4), 4.9) if shown else 0.0
        self.text_width = room - (heat + _BESIDE_HEAT_MAP if shown else 0.0)
        self.widths: tuple[float, ...] = (_BARS, self.text_width, heat) if shown else (_BARS, self.text_width)

    @property
    def margin(self) -> float:
        """Inches for headings and for the names of conditions."""
        if self.associations is None:
            return 0.75
        longest = max(len(shorten(name, 24)) for name in self.associations.conditions[:MAX_CONDITIONS])
        return 1.0 + min(0.06 * longest, 1.4)

    def draw(self, figure: Figure, cells: list[SubplotSpec]) -> None:
        """Draws the panels into the cells of a row."""
        _draw_sizes(figure.add_subplot(cells[0]), self)
        _write_members(figure.add_subplot(cells[1]), self)
        if self.associations is not None:
            _draw_associations(figure.add_subplot(cells[2]), self, self.associations)

    def fit_rows(self, ax: Axes) -> None:
        """Sets the vertical limits: category c spans [c - 0.5, c + 0.5]."""
        count = len(self.summary.categories)
        ax.set_ylim(count - 0.5, -0.5)
        for row in range(1, count) if self.detailed else ():
            ax.axhline(row - 0.5, color="#dddddd", linewidth=0.5, zorder=0)


def _room(panels: CategoryPanels) -> float:
    labels = unique_labels(panels.summary.families, 24)
    return max(heading_height(3), heading_height(0, legend_shape(labels, _BARS)[1]))


def _draw_sizes(ax: Axes, panels: CategoryPanels) -> None:
    summary = panels.summary
    counts = summary.family_counts()
    left = np.zeros(len(counts))
    labels = unique_labels(summary.families, 24)
    height = 0.8 / panels.lines if panels.detailed else 0.7
    for family, label, fill in zip(summary.families, labels, family_fills(len(labels)), strict=True):
        values = np.array([count.get(family, 0) for count in counts])
        ax.barh(range(len(counts)), values, left=left, height=height, label=label, **fill)
        left += values
    for row, total in enumerate(left):
        ax.annotate(f"{total:.0f}", (total, row), (3, 0), textcoords="offset points", va="center", fontsize=SMALL)
    ax.set_yticks(range(len(counts)), unique_labels(summary.categories, 22))
    panels.fit_rows(ax)
    ax.set_xlim(0, 1.25 * left.max())
    remove_x_axis(ax)
    columns, rows = legend_shape(labels, _BARS)
    add_heading(ax, "Features by family", "", _BARS, rows, room=_room(panels))
    legend_above(ax, columns)


def remove_x_axis(ax: Axes) -> None:
    """Removes ticks and the lower spine of bars that carry their values."""
    ax.set_xticks([])
    ax.tick_params(axis="y", length=0)
    ax.spines["bottom"].set_visible(False)


def _write_members(ax: Axes, panels: CategoryPanels) -> None:
    summary = panels.summary
    remove_frame(ax)
    ax.set_xlim(0, panels.text_width)
    panels.fit_rows(ax)
    fills = dict(zip(summary.families, family_fills(len(summary.families)), strict=True))
    nameless = set(summary.nameless_families)
    columns = max(1, int(panels.text_width / 1.8)) if panels.detailed else max(1, int(panels.text_width / 2.1))
    width = panels.text_width / columns
    for c, members in enumerate(summary.groups):
        named = [i for i in _by_strength(panels, c, members) if family_of(summary.feature_names[i]) not in nameless]
        facts = _facts(panels, c, len(members) - len(named), int(panels.text_width / _CHARACTER))
        lines = panels.lines - len(facts) if named else 0
        most = int((width - 0.2) / _CHARACTER)
        for k, i in enumerate(named[: max(lines, 0) * columns]):
            family, name = family_of(summary.feature_names[i]), column_of(summary.feature_names[i])
            place, y = k % columns * width, _line(panels, c, k // columns)
            fill = fills[family]["facecolor"]
            ax.plot([place + 0.05], [y], "s", color=fill, markersize=4, markeredgewidth=0)
            ax.text(place + 0.12, y, shorten(name, most), fontsize=SMALL, va="center")
        for k, fact in enumerate(facts):
            y = _line(panels, c, (lines if named else 0) + k)
            ax.text(0.0, y, fact, fontsize=SMALL, va="center", color=FAINT)
    title, caption = _member_heading(panels, nameless)
    add_heading(ax, title, caption, panels.text_width - 0.3, room=_room(panels))


def _line(panels: CategoryPanels, category: int, line: int) -> float:
    return category - 0.5 + (line + 0.5) / panels.lines


def _by_strength(panels: CategoryPanels, category: int, members: list[int]) -> list[int]:
    """The members by decreasing mean |correlation| with the others; without data, in the order of the columns."""
    if panels.statistics is None:
        return members
    own = np.nan_to_num(panels.statistics.affinity[category, members], nan=1.0)
    return [members[k] for k in np.argsort(-own, kind="stable")]


def _facts(panels: CategoryPanels, category: int, nameless: int, most: int) -> list[str]:
    """For a category with columns without names: their number, and the conditions that its tokens tell."""
    if not nameless:
        return []
    summary, associations = panels.summary, panels.associations
    counts = summary.family_counts()[category]
    of = [f"{counts[name]:,} of {name}" for name in counts if name in summary.nameless_families]
    facts = [shorten(f"without names: {', '.join(of)}", most)]
    if associations is not None:
        rows = [g for g, codebook in enumerate(summary.codebooks) if codebook.category == category]
        told = [f"{shorten(name, 24)} {two_decimals(ami)}" for name, ami in associations.strongest(rows, 5)]
        while len(told) > 1 and len(f"tells {', '.join(told)}") > most:
            told.pop()
        facts.append(f"tells {', '.join(told)}" if told else "tells nothing of the conditions")
    return facts if panels.detailed else facts[-1:]


def _member_heading(panels: CategoryPanels, nameless: set[str]) -> tuple[str, str]:
    measured = panels.statistics is not None
    kept = [family for family in panels.summary.families if family in nameless]
    order = "By mean |correlation| with the others of the category." if measured else "In the order of the columns."
    if not kept:
        return ("Strongest members" if measured else "Members"), order
    text = f"{shorten(', '.join(kept), 40)}: outputs of a random network have no names; instead, their families"
    text += " and what their tokens tell (AMI)." if panels.associations is not None else " are shown."
    return "Members", text if len(kept) == len(panels.summary.families) else f"{order} {text}"


def _draw_associations(ax: Axes, panels: CategoryPanels, associations: Associations) -> None:
    """AMI of each codebook, or of the best codebook of each category, with each condition."""
    codebooks = panels.summary.codebooks
    labels = [f"L{codebook.level}  {codebook.codes} codes" for codebook in codebooks]
    shown = associations if panels.detailed else associations.by_category([codebook.category for codebook in codebooks])
    size = (panels.widths[2], panels.height)
    draw_associations(ax, shown, size, _row_edges(panels), labels if panels.detailed else [])
    text = "Adjusted mutual information of a token and a condition; grey: not above chance (q\u00a0>\u00a00.05)."
    if not panels.detailed:
        text += " Each category is shown by its level with the strongest association."
    if (more := len(shown.conditions) - MAX_CONDITIONS) > 0:
        text += f" {more:,} conditions with weaker associations are omitted."
    add_heading(ax, "What the tokens tell", text, panels.widths[2] + 0.4, room=_room(panels))


def _row_edges(panels: CategoryPanels) -> NDArray[np.float64]:
    """[rows + 1]: the codebooks of a category share its height."""
    starts = np.arange(len(panels.summary.categories)) - 0.5
    if panels.detailed:
        levels = [len(codebooks) for codebooks in panels.summary.model.levels.values()]
        starts = np.concatenate([c + np.arange(n) / n for c, n in zip(starts, levels, strict=True)])
    return np.append(starts, len(panels.summary.categories) - 0.5)
