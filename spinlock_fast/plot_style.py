"""Colours and matplotlib settings of all figures; needs matplotlib."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

SMALL, TEXT, HEADING, TITLE = 7.0, 7.5, 9.0, 13.0  # points
DPI = 150

# Eight colours whose CIELAB distance is at least 27 with normal vision, protanopia, deuteranopia and tritanopia.
PALETTE = ("#0072b2", "#e69f00", "#14db9a", "#b84801", "#a3c8e7", "#381ea6", "#9f7288", "#672b19")
FOCUS = PALETTE[0]  # what the figure is about: the model, validation rows
HIGHLIGHT = PALETTE[3]  # a single mark: the best epoch
NEUTRAL = "#5f6b76"  # what it is compared with: training rows, other methods
BACKGROUND, GRID = "#cfcfcf", "#e3e6e8"
INK, FAINT = "#1a1a1a", "#555555"
MISSING = "#ebebeb"  # a cell without a value
MAGNITUDE, SIGNED = "YlGnBu", "PuOr"  # colour maps: light is little, dark is much

# Metadata of savefig by suffix: without dates and versions, equal contents give equal bytes.
METADATA: dict[str, dict[str, None]] = {".png": {"Software": None}, ".svg": {"Date": None, "Creator": None}}

RC: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # part of matplotlib: the same picture on every system
    "font.size": TEXT,
    "text.color": INK,
    "axes.titlesize": HEADING,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": TEXT,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.axisbelow": True,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.fontsize": SMALL,
    "legend.frameon": False,
    "hatch.linewidth": 0.5,
    "hatch.color": "white",
    "figure.constrained_layout.w_pad": 0.06,
    "figure.constrained_layout.h_pad": 0.06,
    "figure.constrained_layout.wspace": 0.03,
    "figure.constrained_layout.hspace": 0.03,
    "svg.fonttype": "path",
    "svg.hashsalt": "spinlock-fast",  # identifiers depend on the contents of the file only
    "path.simplify": True,
}


@contextmanager
def figure_style() -> Iterator[None]:
    """Draws figures in the style of the project, whatever the settings of the user are:

    with figure_style():
        figure = new_figure(7.0, 4.0)
        ax = figure.subplots()
        ax.plot(bits, error, color=FOCUS, label="spinlock-fast")
        label_line_ends(ax)
        save_figure(figure, "rate_distortion.png")
    """
    with matplotlib.style.context(["default", RC]):
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, with constrained layout and no window."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def label_line_ends(ax: Axes, *, least: float = 1.15 * SMALL) -> None:
    """Writes the label of each line beside its last point, instead of a legend.

    Labels are moved apart vertically until they are `least` points from each other. Call it after the limits and scales
    of the axes are set.
    """
    labels = [str(line.get_label()) for line in ax.lines if not str(line.get_label()).startswith("_")]
    ends = np.array([line.get_xydata()[-1] for line in ax.lines if not str(line.get_label()).startswith("_")])  # type: ignore[index]
    heights = ax.transData.transform(ends)[:, 1] / ax.figure.dpi * 72.0
    order = np.argsort(heights, kind="stable")
    places = _apart(heights[order].tolist(), least)
    for i, place in zip(order.tolist(), places, strict=True):
        ax.annotate(
            labels[i],
            tuple(ends[i].tolist()),
            (6.0, place - float(heights[i])),
            textcoords="offset points",
            va="center",
            fontsize=SMALL,
            color=INK,
            annotation_clip=False,
        )


def _apart(places: list[float], least: float) -> list[float]:
    """Sorted places, moved as little as possible such that neighbours are `least` apart: isotonic regression."""
    blocks: list[list[float]] = []  # [mean, size] of the places less i * least
    for i, place in enumerate(places):
        blocks.append([place - i * least, 1.0])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (a, m), (b, n) = blocks[-2:]
            blocks[-2:] = [[(a * m + b * n) / (m + n), m + n]]
    level = [mean for mean, size in blocks for _ in range(int(size))]
    return [value + i * least for i, value in enumerate(level)]


def save_figure(figure: Figure, path: str | Path) -> None:
    """Writes a PNG or SVG file; equal figures give equal bytes."""
    figure.savefig(path, metadata=METADATA[Path(path).suffix])
