"""The picture of a comparison with training; needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from spinlock_fast.drift.verdict import PSI_LIMITS, SHARE_LIMITS, STATUSES
from spinlock_fast.messages import printable
from spinlock_fast.output.atomic_files import write_atomically

_COLOURS = dict(zip(STATUSES, ("#8c96a0", "#e69f00", "#d55e00"), strict=True))
_SHOWN = 20
_LABEL = 40

Entry = dict[str, Any]


def write_picture(path: Path, result: Entry) -> None:
    """Draws the 20 features and codebooks of the largest changes; raises OutputError."""
    features = _largest(result["features"], "psi")
    codebooks = _largest(result["codebooks"], "usage_psi")
    height = 1.6 + 0.24 * max(len(features), len(codebooks), 4)
    figure = Figure(figsize=(12.0, height), layout="constrained")
    FigureCanvasAgg(figure)
    first, second, third = figure.subplots(1, 3)
    _bars(first, features, "psi", "Features: PSI in excess of noise", PSI_LIMITS)
    _bars(second, codebooks, "usage_psi", "Codebooks: PSI of the use of codes", PSI_LIMITS)
    distances = _largest(result["codebooks"], "beyond")
    _bars(third, distances, "beyond", "Codebooks: distances beyond training's 99th percentile", SHARE_LIMITS)
    figure.suptitle(f"{result['verdict']}: {result['rows']:,} rows against {result['reference']['rows']:,} of the run")
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150))


def _excess(entry: Entry, key: str) -> float:
    expected = entry["beyond_in_training" if key == "beyond" else f"{key}_expected"]
    return float(max(0.0, entry[key] - expected))


def _largest(entries: list[Entry], key: str) -> list[Entry]:
    return sorted(entries, key=lambda entry: -_excess(entry, key))[:_SHOWN]


def _bars(ax: Axes, entries: list[Entry], key: str, title: str, limits: tuple[float, float]) -> None:
    places = range(len(entries))
    colours = [_COLOURS[entry["status"]] for entry in entries]
    ax.barh(places, [_excess(entry, key) for entry in entries], color=colours)
    for limit, status in zip(limits, STATUSES[1:], strict=True):
        ax.axvline(limit, color=_COLOURS[status], linewidth=1.0, linestyle="--", label=status)
    ax.set_yticks(list(places), [_label(entry["name"]) for entry in entries], fontsize=7)
    ax.invert_yaxis()
    ax.set_title(title, fontsize=9)
    ax.tick_params(axis="x", labelsize=8)
    ax.legend(fontsize=7, frameon=False, loc="lower right")


def _label(name: str) -> str:
    text = printable(name).replace("$", r"\$")  # no formulas
    return text if len(text) <= _LABEL else f"{text[: _LABEL - 3]}..."
