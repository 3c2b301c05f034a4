"""Page layout of a dashboard: a title, the totals, and rows of panels."""

from __future__ import annotations

from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec

from spinlock_fast.plot_style import FAINT, TEXT, TITLE, new_figure
from spinlock_fast.report.checkpoint_summary import CheckpointSummary
from spinlock_fast.report.style import WIDTH, remove_frame, shorten

_HEADER = 0.36


class Row(NamedTuple):
    """A row of panels."""

    height: float  # inches of the axes
    margin: float  # inches for headings and tick labels
    widths: tuple[float, ...]  # relative widths of the panels


def create_page(title: str, summary: CheckpointSummary, rows: list[Row]) -> tuple[Figure, list[list[SubplotSpec]]]:
    """A figure with a header, and the grid cells of each row."""
    return new_page(f"{title}: {shorten(summary.name, 70)}", summary.totals_line(), rows)


def new_page(title: str, subtitle: str, rows: list[Row]) -> tuple[Figure, list[list[SubplotSpec]]]:
    """A figure with a title and a subtitle, and the grid cells of each row."""
    heights = [_HEADER, *(row.height + row.margin for row in rows)]
    figure = new_figure(WIDTH, sum(heights) + 0.15)
    lines = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    header = figure.add_subplot(lines[0])
    remove_frame(header)
    header.text(0, 1, title, fontsize=TITLE, fontweight="bold", va="top")
    header.text(0, -0.15, subtitle, fontsize=TEXT, color=FAINT, va="bottom")
    cells = []
    for i, row in enumerate(rows, start=1):
        grid = lines[i].subgridspec(1, len(row.widths), width_ratios=row.widths)
        cells.append([grid[0, j] for j in range(len(row.widths))])
    return figure, cells


def fix_layout(figure: Figure) -> Figure:
    """The figure with fixed axes positions, so that every way of drawing or saving gives the same picture."""
    for _ in range(2):  # inset axes follow their parent one pass later
        figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for ax in figure.axes:  # the last digits of the layout solver vary and would change SVG identifiers
        left, bottom, width, height = (round(float(x), 6) for x in ax.get_position(original=True).bounds)
        ax.set_position((left, bottom, width, height))
    return figure
