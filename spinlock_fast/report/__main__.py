"""`python -m spinlock_fast.report CKPT_DIR --output DIR`: dashboards and explorer of a checkpoint."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from spinlock_fast.commands.arguments import add_device, add_quiet, parser
from spinlock_fast.commands.exit_status import exit_with
from spinlock_fast.errors import DataError
from spinlock_fast.report.write import KINDS


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    options = parser(
        "report", "Draws the dashboards of a checkpoint, as PNG and SVG, and its explorer, as one HTML page."
    )
    options.add_argument("checkpoint", nargs="+", help="checkpoint directory; two to eight of them for --type compare")
    options.add_argument(
        "--data", metavar="FILE.h5", help="HDF5 file or glob; default: the data of the run, where they still exist"
    )
    options.add_argument("--output", required=True, metavar="DIR", help="directory for the files")
    options.add_argument(
        "--type",
        default="all",
        choices=["all", *KINDS, "html", "compare"],
        help="html: the explorer; compare: several runs side by side; all: everything for one run (default)",
    )
    options.add_argument(
        "--rows",
        type=int,
        default=100_000,
        metavar="N",
        help="maximum number of rows in the explorer; evenly spaced ones are taken from a larger file (100000)",
    )
    options.add_argument(
        "--conditions",
        nargs="+",
        default=[],
        metavar="PATH",
        help="further conditions: datasets of the data with a value or a short vector a row, or FILE.csv:COLUMN",
    )
    add_device(options)
    add_quiet(options)
    chosen = options.parse_args(arguments)
    if chosen.type == "compare":
        if chosen.conditions:
            options.error("--conditions: not used by the type compare")
        exit_with(lambda: _compare(chosen))
    if len(chosen.checkpoint) > 1:
        options.error(f"one checkpoint expected, got {len(chosen.checkpoint)} (--type compare takes several)")
    chosen.checkpoint = chosen.checkpoint[0]
    exit_with(lambda: _report(chosen))


def _compare(chosen: argparse.Namespace) -> None:
    from spinlock_fast.report.comparison_write import write_comparison

    _print(chosen, *write_comparison(chosen.checkpoint, chosen.output, chosen.data, chosen.device))


def _report(chosen: argparse.Namespace) -> None:
    from spinlock_fast.report.explorer import write_explorer
    from spinlock_fast.report.write import write_report

    files: list[Path] = []
    notes: list[str] = []
    if chosen.type != "html":
        kinds = KINDS if chosen.type == "all" else (chosen.type,)
        files, notes = write_report(
            chosen.checkpoint, chosen.output, chosen.data, kinds, chosen.device, chosen.conditions
        )
    if chosen.type in ("all", "html"):
        try:
            files.append(
                write_explorer(
                    chosen.checkpoint, chosen.output, chosen.data, chosen.rows, chosen.device, chosen.conditions
                )
            )
        except DataError as error:
            if chosen.type == "html":
                raise
            notes.append(f"explorer.html is omitted: {error}")
    _print(chosen, files, notes)


def _print(chosen: argparse.Namespace, files: list[Path], notes: list[str]) -> None:
    if chosen.quiet:
        return
    for note in notes:
        sys.stderr.write(f"note: {note}\n")
    for file in files:
        sys.stdout.write(f"{file}\n")


if __name__ == "__main__":
    main()
