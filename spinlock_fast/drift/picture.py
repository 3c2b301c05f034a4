"""The picture of a comparison with training; needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from spinlock_fast.drift.verdict import PSI_LIMITS, STATUSES
from spinlock_fast.messages import shortened
from spinlock_fast.output.atomic_files import write_atomically

_COLOURS = dict(zip(STATUSES, ("#8c96a0", "#e69f00", "#d55e00"), strict=True))
_SHOWN = 20
_LABEL = 40

Entry = dict[str, Any]


def write_picture(path: Path, result: Entry) -> None:
    """Draws the 20 features and codebooks of the largest changes; raises OutputError."""
    panels = {
        "Features: PSI": ("features", "psi"),
        "Codebooks: PSI of the use of codes": ("codebooks", "usage_psi"),
        "Codebooks: PSI of distances": ("codebooks", "distance_psi"),
    }
    most = max(4, *(min(_SHOWN, len(result[kind])) for kind, _ in panels.values()))
    figure = Figure(figsize=(12.0, 1.8 + 0.24 * most), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels))
    for ax, (title, (kind, key)) in zip(axes, panels.items(), strict=True):
        _bars(ax, result[kind], key)
        ax.set_title(title, fontsize=9)
    handles, labels = axes[0].get_legend_handles_labels()
    title = "Grey: stable. A change beyond a limit counts only where it is significant."
    style: dict[str, Any] = {"ncols": 2, "fontsize": 8, "frameon": False, "title": title, "title_fontsize": 8}
    figure.legend(handles, labels, loc="outside lower center", **style)
    figure.suptitle(f"{result['verdict']}: {result['rows']:,} rows against {result['reference']['rows']:,} of the run")
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150))


def _bars(ax: Axes, entries: list[Entry], key: str) -> None:
    """The largest excesses of a PSI over its expectation without drift, in the colour of each entry's status."""
    excess = sorted(((entry[key] - entry[f"{key}_expected"], i) for i, entry in enumerate(entries)), reverse=True)
    largest = [(max(0.0, value), entries[i]) for value, i in excess[:_SHOWN]]
    places = range(len(largest))
    ax.barh(places, [value for value, _ in largest], color=[_COLOURS[entry["status"]] for _, entry in largest])
    for limit, status in zip(PSI_LIMITS, STATUSES[1:], strict=True):
        ax.axvline(limit, color=_COLOURS[status], linewidth=1.0, linestyle="--", label=f"limit of {status}")
    ax.set_yticks(list(places), [_label(entry["name"]) for _, entry in largest], fontsize=7)
    ax.invert_yaxis()
    ax.set_xlabel("in excess of chance", fontsize=8)
    ax.tick_params(axis="x", labelsize=8)


def _label(name: str) -> str:
    return shortened(name, _LABEL).replace("$", r"\$")  # no formulas
