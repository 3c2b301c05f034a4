"""The files of an ablation: results.csv, ablation.md and ablation.png."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from spinlock_fast.ablation.records import Record, write_csv
from spinlock_fast.ablation.tables import markdown, table_of
from spinlock_fast.output.atomic_files import write_text

CSV, MARKDOWN, PLOT = "results.csv", "ablation.md", "ablation.png"

log = logging.getLogger(__name__)


def write_tables(output: Path, records: Sequence[Record]) -> list[Path]:
    """Writes results.csv, ablation.md, and ablation.png where matplotlib is installed.

    Returns:
        The written files.

    Raises:
        OutputError: a file cannot be written.
    """
    write_csv(output / CSV, records)
    write_text(output / MARKDOWN, f"# Ablation\n\n{markdown(records)}")
    written = [output / CSV, output / MARKDOWN]
    try:
        from spinlock_fast.ablation.plot import write_plot
    except ImportError:
        log.warning("no plot: matplotlib is not installed (pip install 'spinlock-fast[report]')")
        return written
    write_plot(output / PLOT, table_of(records))
    return [*written, output / PLOT]
