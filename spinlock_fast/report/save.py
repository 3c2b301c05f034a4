"""A figure as PNG and SVG, the same bytes for the same contents."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from spinlock_fast.output.atomic_files import write_atomically

_METADATA = {".png": {"Software": None}, ".svg": {"Date": None, "Creator": None}}


def save_figure(figure: Figure, stem: Path) -> list[Path]:
    """Writes stem.png and stem.svg; raises OutputError."""
    paths = []
    for suffix, metadata in _METADATA.items():
        path = stem.with_name(stem.name + suffix)
        write_atomically(path, lambda temporary, metadata=metadata: figure.savefig(temporary, metadata=metadata))  # type: ignore[misc]
        paths.append(path)
    return paths
