"""Draws engineering.png, topological.png, semantic.png and analysis.png of docs/images.

    python docs/make_dashboards.py [CHECKPOINT] [DATA.h5]

By default of the checkpoint and the data of `make train`. Needs the extra `report`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from spinlock_fast import report
from spinlock_fast.analysis import analyze
from spinlock_fast.plot_style import METADATA, figure_style
from spinlock_fast.report.analysis_figure import draw_analysis

IMAGES = Path(__file__).parent / "images"


def write_small(figure: Figure, path: Path) -> None:
    """Writes a PNG of about 100 KB in all its colours: fewer would merge those of the palette."""
    figure.savefig(path, dpi=110, metadata=METADATA[".png"], pil_kwargs={"optimize": True})


def draw_dashboards(checkpoint: str, data: str, images: Path) -> None:
    """Draws the pictures of a checkpoint."""
    dashboards: list[Callable[..., Figure]] = [report.engineering, report.topological, report.semantic]
    for draw in dashboards:
        write_small(draw(checkpoint, data), images / f"{draw.__name__}.png")
    analysis = analyze(checkpoint, data)
    with figure_style():
        write_small(draw_analysis(analysis), images / "analysis.png")


def main() -> None:
    options = argparse.ArgumentParser(description="Draws the pictures of the dashboards.")
    options.add_argument("checkpoint", nargs="?", default="checkpoints/quickstart")
    options.add_argument("data", nargs="?", default="data/quickstart.h5")
    chosen = options.parse_args()
    draw_dashboards(chosen.checkpoint, chosen.data, IMAGES)


if __name__ == "__main__":
    main()
