"""Heat map of what tokens tell about conditions, with the level of shuffled conditions below it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from numpy.typing import NDArray

from spinlock_fast.plot_style import MAGNITUDE, MISSING, SMALL
from spinlock_fast.report.condition_associations import Associations
from spinlock_fast.report.style import add_colour_bar, ink_on, unique_labels

LINE = 0.155  # inches of a line of text
MAX_CONDITIONS = 24  # more columns do not fit
_WRITTEN_COLUMNS = 16  # conditions; with more, no numbers fit into the cells


def draw_associations(
    ax: Axes,
    shown: Associations,
    size: tuple[float, float],
    edges: NDArray[np.floating[Any]],
    labels: Sequence[str],
) -> None:
    """Draws the AMI of each row and condition; cells without a finding are grey.

    Args:
        size: width and height of the axes in inches.
        edges: [rows + 1] vertical positions.
        labels: of the rows; none where it is empty.
    """
    M = min(len(shown.conditions), MAX_CONDITIONS)
    values = np.where(shown.found, shown.ami, np.nan)[:, :M]
    top = upper_end(float(np.nanmax([*values.ravel(), *shown.shuffled[:M]])))
    image = _cells(ax, values, edges, top)
    for column in np.flatnonzero(shown.found[:, :M].any(0)).tolist() if M <= _WRITTEN_COLUMNS else ():
        row = int(np.nanargmax(values[:, column]))
        y = (edges[row] + edges[row + 1]) / 2
        ax.text(column, y, two_decimals(values[row, column]), **_number_style(image, values[row, column]))
    ax.set_yticks((edges[1:] + edges[:-1]) / 2 if labels else [], labels)
    ax.set_ylim(edges[-1], edges[0])
    ax.tick_params(length=0, labelbottom=False)
    _draw_shuffled(ax, shown, M, top, size[1])
    add_colour_bar(image, ax, "AMI", 0.14 / size[0])


def _cells(ax: Axes, values: NDArray[np.float64], edges: NDArray[np.floating[Any]], top: float) -> QuadMesh:
    """Draws a matrix whose rows have the given edges."""
    across = np.arange(values.shape[1] + 1) - 0.5
    colours = matplotlib.colormaps[MAGNITUDE].with_extremes(bad=MISSING)
    mesh = ax.pcolormesh(across, edges, np.ma.masked_invalid(values), cmap=colours, vmin=0.0, vmax=top)
    mesh.set(edgecolor="white", linewidth=0.4)
    for spine in ax.spines.values():
        spine.set_visible(False)
    return mesh


def _number_style(image: QuadMesh, value: float) -> dict[str, Any]:
    return {"ha": "center", "va": "center", "fontsize": SMALL, "color": ink_on(image.to_rgba(np.array(value)))}


def two_decimals(value: float) -> str:
    """Two decimals of a number in [0, 1]: ".07"."""
    text = f"{value:.2f}"
    return text.removeprefix("0") if value < 0.995 else text


def _draw_shuffled(ax: Axes, shown: Associations, count: int, top: float, height: float) -> None:
    """The AMI with shuffled conditions, as a row below the heat map that carries their names."""
    share = LINE / height
    strip = ax.inset_axes((0.0, -1.6 * share, 1.0, share))
    values = shown.shuffled[None, :count]
    image = _cells(strip, values, np.array([0.0, 1.0]), top)
    for column in range(count) if count <= _WRITTEN_COLUMNS else ():
        strip.text(column, 0.5, two_decimals(values[0, column]), **_number_style(image, values[0, column]))
    strip.set_yticks([0.5], ["shuffled, 95 %"])
    strip.set_xticks(range(count), unique_labels(shown.conditions[:count], 24), rotation=90)
    strip.tick_params(length=0)


def upper_end(value: float) -> float:
    """The end of a colour scale of values in [0, 1]: the next of 0.05, 0.1, 0.2, 0.3 ... 1.0."""
    return next((end for end in (0.05, 0.1, *np.arange(0.2, 1.0, 0.1).round(1).tolist()) if value <= end), 1.0)
