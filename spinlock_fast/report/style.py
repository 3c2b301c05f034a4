"""Style of the dashboards: sizes in inches and points, colours, labels."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.image import AxesImage
from numpy.typing import NDArray

from spinlock_fast.messages import shortened
from spinlock_fast.plot_style import FAINT, MISSING, PALETTE, SMALL, TEXT

WIDTH = 11.7  # inches, A4 landscape; at this size no text is below 7 points
_MARKERS = "os^Dv*PX"
_GAP, _CAPTION_LINE, _LEGEND_ROW = 4.0, 8.9, 11.5  # points, above an axes
_HATCHES = ("", "////", "....", "xxxx")


def category_colours(count: int) -> list[str] | None:
    """One colour per category; None where there are more categories than distinguishable colours."""
    return list(PALETTE[:count]) if count <= len(PALETTE) else None


def level_marker(level: int) -> str:
    """The marker of a level: a shape, or its number from the ninth level on."""
    return _MARKERS[level] if level < len(_MARKERS) else f"${level}$"


def family_fills(count: int) -> list[dict[str, Any]]:
    """Colours of families, with hatches beyond eight; no page has colours of categories as well."""
    return [
        {"facecolor": PALETTE[i % len(PALETTE)], "hatch": _HATCHES[i // len(PALETTE) % len(_HATCHES)], "linewidth": 0}
        for i in range(count)
    ]


def shorten(text: str, most: int) -> str:
    """The text in at most `most` characters: words are left out in its middle, or characters of a single long word.

    Control characters are escaped, and so is $, which starts a formula in matplotlib.
    """
    return shortened(text, most).replace("$", r"\$")


def unique_labels(names: Sequence[str], most: int) -> list[str]:
    """The names in at most `most` characters each; numbered where shortening makes two of them equal."""
    labels = [shorten(name, most) for name in names]
    if len(set(labels)) == len(set(names)):
        return labels
    width = len(str(len(names))) + 1
    return [f"{i} {shorten(name, max(most - width, 1))}" for i, name in enumerate(names, start=1)]


def range_text(numbers: Sequence[int]) -> str:
    """The range of some numbers as text: "4 to 48", or "4" where all are equal."""
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def wrap_text(text: str, inches: float, points: float = SMALL) -> str:
    """The text with line breaks that fit a width."""
    # A character of DejaVu Sans is on average a little wider than half the font size.
    return textwrap.fill(text, max(int(inches * 72 / (0.54 * points)), 12))


def add_heading(
    ax: Axes, title: str, caption: str = "", width: float = 5.0, legend_rows: int = 0, room: float = 0.0
) -> None:
    """Adds a title and a caption above an axes, with space for a legend below them.

    Args:
        width: maximum width of the caption in inches.
        legend_rows: rows of the legend between the caption and the axes.
        room: minimum height in points, which aligns the titles of panels in one row.
    """
    lines = wrap_text(caption, width) if caption else ""
    count = lines.count("\n") + 1 if lines else 0
    height = heading_height(count) - heading_height()
    pad = max(heading_height(count, legend_rows), room)
    ax.set_title(title, pad=pad)
    if lines:
        ax.annotate(
            lines,
            (0, 1),
            (0, pad - height),
            xycoords="axes fraction",
            textcoords="offset points",
            fontsize=SMALL,
            color=FAINT,
            va="bottom",
            linespacing=1.15,
            annotation_clip=False,
        ).set_in_layout(False)  # the padding of the title reserves the space


def heading_height(lines: int = 0, legend_rows: int = 0) -> float:
    """Height in points of a caption and a legend above an axes."""
    return _GAP + (lines * _CAPTION_LINE + 3.0 if lines else 0.0) + legend_rows * _LEGEND_ROW


def legend_above(ax: Axes, columns: int, **options: Any) -> None:
    """Adds a legend between the heading and the axes."""
    ax.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=columns,
        borderaxespad=0.15,
        borderpad=0.1,
        labelspacing=0.35,
        columnspacing=1.4,
        handlelength=1.6,
        handletextpad=0.5,
        **options,
    ).set_in_layout(False)  # `add_heading` reserves the space


def legend_shape(labels: Sequence[str], inches: float) -> tuple[int, int]:
    """(columns, rows) of a legend that fits a width, filled column by column."""
    most = inches * 72 / (0.56 * SMALL)
    for rows in range(1, len(labels) + 1):
        columns = [labels[i : i + rows] for i in range(0, len(labels), rows)]
        if rows == len(labels) or sum(max(map(len, column)) + 6 for column in columns) <= most:
            return len(columns), rows
    return 1, 1


def labelled_ticks(count: int, inches: float) -> range:
    """The ticks, of `count` along a length, that have room for a label."""
    return range(0, count, max(1, -(-int(1000 * count * 0.125) // int(1000 * inches))))


def remove_frame(ax: Axes) -> None:
    """Removes the frame and the ticks."""
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_visible(False)


def heat_map(
    ax: Axes, values: NDArray[Any], colours: str, low: float, high: float, *, aspect: str = "auto"
) -> AxesImage:
    """Draws a matrix on a fixed colour scale; NaN is grey."""
    ax.set_anchor("NW")
    shown = matplotlib.colormaps[colours].with_extremes(bad=MISSING)
    image = ax.imshow(values, cmap=shown, vmin=low, vmax=high, aspect=aspect, interpolation="nearest")  # type: ignore[arg-type]
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.tick_params(length=0)
    return image


def annotate_cells(ax: Axes, image: AxesImage, texts: Sequence[Sequence[str]]) -> None:
    """Writes a text into each cell of a heat map, in black or white by contrast."""
    values = np.ma.filled(np.ma.masked_invalid(image.get_array()), np.nan)  # type: ignore[arg-type]
    for i, row in enumerate(texts):
        for j, text in enumerate(row):
            if text:
                ax.text(j, i, text, ha="center", va="center", fontsize=SMALL, color=ink_on(image.to_rgba(values[i, j])))


def ink_on(background: Any) -> str:
    """Black or white, whichever has more contrast (WCAG 2) with a colour [4]."""
    colour = np.ravel(background)[:3]
    linear = np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
    luminance = float(linear @ (0.2126, 0.7152, 0.0722))
    return "black" if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else "white"


def add_colour_bar(image: AxesImage | QuadMesh, ax: Axes, label: str, width: float) -> None:
    """Adds a colour bar of `width` times the axes' width at the right, labelled at both ends and in the middle."""
    low, high = image.get_clim()
    place = ax.inset_axes((1.0 + width / 2, 0.0, width, 1.0))
    bar = ax.figure.colorbar(image, cax=place, ticks=[low, (low + high) / 2, high])
    bar.outline.set_visible(False)
    place.tick_params(length=0, pad=2)
    bar.set_label(label, fontsize=SMALL)


def write_table(
    ax: Axes, rows: Sequence[Sequence[str]], places: Sequence[float], bold_first: bool = False, height: float = 0.0
) -> None:
    """Writes rows of texts: the first column starts at places[0], others end at their place (shares of the width).

    Args:
        height: of the axes in inches, where the rows shall not fill it.
    """
    remove_frame(ax)
    ax.set_xlim(0, 1)
    ax.set_ylim(max(len(rows), height / 0.19), 0)
    for i, row in enumerate(rows):
        for j, (text, place) in enumerate(zip(row, places, strict=True)):
            weight = "bold" if bold_first and i == 0 else "normal"
            ax.text(place, i + 0.5, text, ha="right" if j else "left", va="center", fontsize=TEXT, fontweight=weight)
        ax.axhline(i + 1, color="#dddddd", linewidth=0.5)
