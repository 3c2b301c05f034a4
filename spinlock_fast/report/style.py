"""How the dashboards look: sizes in inches and points, colours, labels."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.image import AxesImage
from numpy.typing import NDArray

from spinlock_fast.messages import printable

# A4 landscape across; printed at this size, no text is below 7 points.
WIDTH = 11.7
DPI = 150
SMALL, TEXT, HEADING, TITLE = 7.0, 7.5, 9.0, 13.0  # points

# Told apart with each of the three colour-vision deficiencies. No longer palette is.
CATEGORY_COLOURS = (
    "#e69f00", "#56b4e9", "#009e73", "#0072b2", "#d55e00", "#cc79a7", "#000000", "#0800aa", "#7d0400", "#3d145d",
    "#245951",
)  # fmt: skip
FOCUS, REST, NEUTRAL = "#0072b2", "#cfcfcf", "#5f6b76"
INK, FAINT = "#1a1a1a", "#555555"
MAGNITUDE, SIGNED = "cividis", "PuOr"
_MARKERS = "os^Dv*PX"
_GAP, _CAPTION_LINE, _LEGEND_ROW = 4.0, 8.9, 11.5  # points, above an axes
_HATCHES = ("", "////", "....", "xxxx")

RC: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same picture everywhere
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
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "legend.fontsize": SMALL,
    "legend.frameon": False,
    "hatch.linewidth": 0.5,
    "hatch.color": "white",
    "figure.constrained_layout.w_pad": 0.06,
    "figure.constrained_layout.h_pad": 0.06,
    "figure.constrained_layout.wspace": 0.03,
    "figure.constrained_layout.hspace": 0.03,
    "svg.fonttype": "path",
    "svg.hashsalt": "spinlock-fast",  # identifiers in the file depend on its contents alone
    "path.simplify": True,
}


def category_colours(count: int) -> list[str] | None:
    """One colour a category; None where there are more than a reader can tell apart."""
    return list(CATEGORY_COLOURS[:count]) if count <= len(CATEGORY_COLOURS) else None


def level_marker(level: int) -> str:
    """The marker of a level: a shape, its number after the eighth."""
    return _MARKERS[level] if level < len(_MARKERS) else f"${level}$"


def family_fills(count: int) -> list[dict[str, Any]]:
    """Greys, and hatches where greys run out: hue belongs to the categories."""
    shades = np.linspace(0.28, 0.82, min(max(count, 2), 4))
    return [
        {
            "facecolor": str(round(float(shades[i % len(shades)]), 3)),
            "hatch": _HATCHES[i // len(shades) % len(_HATCHES)],
            "linewidth": 0,
        }
        for i in range(count)
    ]


def shorten(text: str, most: int) -> str:
    """At most `most` characters to draw; what is left out of the middle becomes an ellipsis.

    Control characters become escapes, and a $ does not begin a formula.
    """
    text = printable(text)
    if len(text) > most:
        tail = (most - 1) // 2
        text = f"{text[: most - 1 - tail]}…{text[len(text) - tail :]}"
    return text.replace("$", r"\$")


def distinct(names: Sequence[str], most: int) -> list[str]:
    """Names of at most `most` characters that differ where the names do."""
    labels = [shorten(name, most) for name in names]
    if len(set(labels)) == len(set(names)):
        return labels
    width = len(str(len(names))) + 1
    return [f"{i} {shorten(name, max(most - width, 1))}" for i, name in enumerate(names, start=1)]


def spread(numbers: Sequence[int]) -> str:
    """ "4 to 48", or the one number."""
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def wrapped(text: str, inches: float, points: float = SMALL) -> str:
    """The text with line breaks, to fit a width."""
    # DejaVu Sans takes a little more than half its size per character of running text.
    return textwrap.fill(text, max(int(inches * 72 / (0.54 * points)), 12))


def heading(
    ax: Axes, title: str, caption: str = "", width: float = 5.0, legend_rows: int = 0, room: float = 0.0
) -> None:
    """A title and a caption above an axes; between them and the axes, rows of a legend.

    Args:
        width: inches that the caption may take.
        room: points that all of it takes at least: panels beside each other have their titles at one height.
    """
    lines = wrapped(caption, width) if caption else ""
    count = lines.count("\n") + 1 if lines else 0
    height = room_for(count) - room_for()
    pad = max(room_for(count, legend_rows), room)
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
        ).set_in_layout(False)  # the padding of the title has made room


def room_for(lines: int = 0, legend_rows: int = 0) -> float:
    """Points that a caption and a legend take above an axes."""
    return _GAP + (lines * _CAPTION_LINE + 3.0 if lines else 0.0) + legend_rows * _LEGEND_ROW


def legend_above(ax: Axes, columns: int, **options: Any) -> None:
    """A legend between the heading and the axes."""
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
    ).set_in_layout(False)  # `heading` has made room


def legend_shape(labels: Sequence[str], inches: float) -> tuple[int, int]:
    """Columns and rows of a legend that fits a width; it is filled column by column."""
    most = inches * 72 / (0.56 * SMALL)
    for rows in range(1, len(labels) + 1):
        columns = [labels[i : i + rows] for i in range(0, len(labels), rows)]
        if rows == len(labels) or sum(max(map(len, column)) + 6 for column in columns) <= most:
            return len(columns), rows
    return 1, 1


def every(count: int, inches: float) -> range:
    """Which of `count` ticks along a length can have a label."""
    return range(0, count, max(1, -(-int(1000 * count * 0.125) // int(1000 * inches))))


def bare(ax: Axes) -> None:
    """No frame, no ticks."""
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_visible(False)


def heat_map(
    ax: Axes, values: NDArray[Any], colours: str, low: float, high: float, *, aspect: str = "auto"
) -> AxesImage:
    """An image of a matrix on a fixed scale; NaN is left white."""
    ax.set_anchor("NW")
    image = ax.imshow(values, cmap=colours, vmin=low, vmax=high, aspect=aspect, interpolation="nearest")  # type: ignore[arg-type]
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.tick_params(length=0)
    return image


def write_cells(ax: Axes, image: AxesImage, texts: Sequence[Sequence[str]]) -> None:
    """A text in each cell of a heat map, black or white, whichever is read better."""
    values = np.ma.filled(np.ma.masked_invalid(image.get_array()), np.nan)  # type: ignore[arg-type]
    for i, row in enumerate(texts):
        for j, text in enumerate(row):
            if text:
                ax.text(
                    j, i, text, ha="center", va="center", fontsize=SMALL, color=_ink_on(image.to_rgba(values[i, j]))
                )


def _ink_on(background: Any) -> str:
    """Black or white on a colour [4], by the contrast of WCAG 2."""
    colour = np.ravel(background)[:3]
    linear = np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
    luminance = float(linear @ (0.2126, 0.7152, 0.0722))
    return "black" if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else "white"


def scale_bar(image: AxesImage, ax: Axes, label: str, width: float) -> None:
    """The colour scale of a heat map at its right, `width` times as wide: the ends and the middle of the range."""
    low, high = image.get_clim()
    place = ax.inset_axes((1.0 + width / 2, 0.0, width, 1.0))
    bar = ax.figure.colorbar(image, cax=place, ticks=[low, (low + high) / 2, high])
    bar.outline.set_visible(False)
    place.tick_params(length=0, pad=2)
    bar.set_label(label, fontsize=SMALL)


def write_table(ax: Axes, rows: Sequence[Sequence[str]], places: Sequence[float], bold_first: bool = False) -> None:
    """Rows of texts: the first column begins at places[0], the others end at theirs (shares of the width)."""
    bare(ax)
    ax.set_xlim(0, 1)
    ax.set_ylim(len(rows), 0)
    for i, row in enumerate(rows):
        for j, (text, place) in enumerate(zip(row, places, strict=True)):
            weight = "bold" if bold_first and i == 0 else "normal"
            ax.text(place, i + 0.5, text, ha="right" if j else "left", va="center", fontsize=TEXT, fontweight=weight)
        ax.axhline(i + 1, color="#dddddd", linewidth=0.5)
