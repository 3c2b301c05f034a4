"""The picture of an ablation; needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from spinlock_fast.ablation.records import MEASURES
from spinlock_fast.ablation.tables import Row
from spinlock_fast.messages import printable
from spinlock_fast.output.atomic_files import write_atomically
from spinlock_fast.plot_style import FAINT, FOCUS, TEXT, figure_style, new_figure, save_figure

_SHOWN = ["reconstruction_error", "utilization", "topo_post"]
_LABEL = 40  # characters of a variant's name


def write_plot(path: Path, rows: Sequence[Row]) -> None:
    """Draws the paired difference of each variant to the base with its 95 % interval; raises OutputError."""
    rows = [row for row in rows if row.differences]
    with figure_style():
        figure = _draw(rows)
        write_atomically(path, lambda temporary: save_figure(figure, temporary))


def _draw(rows: Sequence[Row]) -> Figure:
    figure = new_figure(8.5, 1.0 + 0.22 * max(1, len(rows)))
    axes = figure.subplots(1, len(_SHOWN), sharey=True)
    places = range(len(rows))
    for ax, name in zip(axes, _SHOWN, strict=True):
        ax.axvline(0.0, color=FAINT, linewidth=0.8, linestyle="--")
        for place, row in zip(places, rows, strict=True):
            difference = row.differences[name]
            if difference.low is not None and difference.high is not None:
                ax.plot([difference.low, difference.high], [place, place], color=FOCUS, linewidth=1.6)
            ax.plot([difference.mean], [place], "o", color=FOCUS, markersize=4)
        ax.set_title(MEASURES[name])
        ax.grid(axis="x")
        ax.tick_params(axis="y", length=0)
        ax.xaxis.set_major_locator(MaxNLocator(4))
    axes[0].set_yticks(list(places), [_label(row.variant) for row in rows])
    axes[0].invert_yaxis()
    figure.supxlabel("difference to the base, with its 95 % interval", fontsize=TEXT)
    return figure


def _label(variant: str) -> str:
    text = printable(variant).replace("$", r"\$")  # no formulas
    return text if len(text) <= _LABEL else f"{text[: _LABEL - 3]}..."
