"""A page: a title, the totals, and rows of panels."""

from __future__ import annotations

from typing import NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec

from spinlock_fast.report.contents import Contents
from spinlock_fast.report.style import DPI, FAINT, TEXT, TITLE, WIDTH, bare, shorten

_HEADER = 0.36


class Row(NamedTuple):
    """Panels beside each other."""

    height: float  # inches of the axes
    around: float  # inches of headings and tick labels
    widths: tuple[float, ...]  # shares


def page(title: str, contents: Contents, rows: list[Row]) -> tuple[Figure, list[list[SubplotSpec]]]:
    """A figure with a header, and the cells of its rows."""
    heights = [_HEADER, *(row.height + row.around for row in rows)]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.15), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    lines = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    header = figure.add_subplot(lines[0])
    bare(header)
    header.text(0, 1, f"{title}: {shorten(contents.name, 70)}", fontsize=TITLE, fontweight="bold", va="top")
    header.text(0, -0.15, contents.line(), fontsize=TEXT, color=FAINT, va="bottom")
    cells = []
    for i, row in enumerate(rows, start=1):
        grid = lines[i].subgridspec(1, len(row.widths), width_ratios=row.widths)
        cells.append([grid[0, j] for j in range(len(row.widths))])
    return figure, cells


def settle(figure: Figure) -> Figure:
    """The figure with its places fixed: each way to draw or save it gives the same picture."""
    for _ in range(2):  # what hangs on an axes follows it one pass later
        figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for ax in figure.axes:  # the solver's last digits vary, and identifiers in an SVG are made of all digits
        left, bottom, width, height = (round(float(x), 6) for x in ax.get_position(original=True).bounds)
        ax.set_position((left, bottom, width, height))
    return figure
