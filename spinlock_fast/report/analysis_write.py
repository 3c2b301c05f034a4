"""Writes the picture and the page of an analysis."""

from __future__ import annotations

import logging
from pathlib import Path

from spinlock_fast.analysis.run import Analysis
from spinlock_fast.output.atomic_files import write_text
from spinlock_fast.report.analysis_page import PICTURE, html_page, markdown, page_blocks
from spinlock_fast.report.write import save_both

log = logging.getLogger(__name__)


def write_analysis_page(analysis: Analysis, output: Path) -> list[Path]:
    """Writes analysis.md and analysis.html and, where matplotlib is installed, analysis.png and analysis.svg.

    Raises:
        OutputError: a file cannot be written.
    """
    pictures = _pictures(analysis, output)
    blocks = page_blocks(analysis, bool(pictures))
    write_text(output / "analysis.md", markdown(blocks))
    picture = (output / PICTURE).read_bytes() if pictures else None
    write_text(output / "analysis.html", html_page(blocks, picture))
    return [*pictures, output / "analysis.md", output / "analysis.html"]


def _pictures(analysis: Analysis, output: Path) -> list[Path]:
    try:
        from spinlock_fast.plot_style import figure_style
    except ImportError:
        log.warning("no picture: matplotlib is not installed (pip install 'spinlock-fast[report]')")
        return []
    from spinlock_fast.report.analysis_figure import draw_analysis

    with figure_style():
        return save_both(draw_analysis(analysis), output / "analysis")
