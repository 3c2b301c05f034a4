"""Draws engineering.png, topological.png, semantic.png, analysis.png and explorer.png of docs/images.

    python docs/make_dashboards.py [CHECKPOINT] [DATA.h5]

By default of the checkpoint and the data of `make train`. Needs the extra `report`, and
Chromium for explorer.png, which is left as it is without.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from spinlock_fast import report
from spinlock_fast.analysis import analyze
from spinlock_fast.plot_style import METADATA, figure_style
from spinlock_fast.report.analysis_figure import draw_analysis
from spinlock_fast.report.explorer import write_explorer

IMAGES = Path(__file__).parent / "images"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


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
    draw_explorer(checkpoint, data, images / "explorer.png")


def draw_explorer(checkpoint: str, data: str, path: Path) -> None:
    """The top of the explorer with the diverged operators as filter, in 256 colours."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        return
    with tempfile.TemporaryDirectory() as directory:
        page = write_explorer(checkpoint, directory, data, conditions=["metadata/diverged"])
        picture = Path(directory) / "page.png"
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=60000"]
        flags += ["--window-size=1280,1830", f"--user-data-dir={directory}/profile", f"--screenshot={picture}"]
        address = page.resolve().as_uri() + "#f=metadata_diverged=1"
        subprocess.run([program, *flags, address], check=True, stderr=subprocess.DEVNULL)
        Image.open(picture).convert("RGB").quantize(256).save(path, optimize=True)


def main() -> None:
    options = argparse.ArgumentParser(description="Draws the pictures of the dashboards.")
    options.add_argument("checkpoint", nargs="?", default="checkpoints/quickstart")
    options.add_argument("data", nargs="?", default="data/quickstart.h5")
    chosen = options.parse_args()
    draw_dashboards(chosen.checkpoint, chosen.data, IMAGES)


if __name__ == "__main__":
    main()
