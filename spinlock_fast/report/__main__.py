"""`python -m spinlock_fast.report CKPT_DIR --output DIR`: dashboards and explorer of a checkpoint."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from spinlock_fast.commands.arguments import add_device, add_quiet, parser
from spinlock_fast.commands.exit_status import exit_with
from spinlock_fast.errors import DataError
from spinlock_fast.report.write import KINDS

if TYPE_CHECKING:
    from spinlock_fast.trajectories import TrajectorySet


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
    options.add_argument(
        "--trajectories",
        nargs="+",
        default=[],
        metavar="FILE",
        help="the files that extract read: the explorer shows first and last states as small pictures",
    )
    options.add_argument("--dataset", metavar="PATH", help="trajectories in plain arrays: path of the array")
    options.add_argument("--axes", help="trajectories in plain arrays: letters of the axes, e.g. 'n t c y x'")
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
    if chosen.trajectories and chosen.type not in ("all", "html"):
        options.error("--trajectories: shown by the explorer only, types html and all")
    if (chosen.dataset or chosen.axes) and not chosen.trajectories:
        options.error("--dataset and --axes: used with --trajectories only")
    exit_with(lambda: _report(chosen))


def _compare(chosen: argparse.Namespace) -> None:
    from spinlock_fast.report.comparison_write import write_comparison

    _print(chosen, *write_comparison(chosen.checkpoint, chosen.output, chosen.data, chosen.device))


def _report(chosen: argparse.Namespace) -> None:
    from spinlock_fast.report.explorer import write_explorer
    from spinlock_fast.report.write import write_report

    files: list[Path] = []
    notes: list[str] = []
    trajectories = _trajectories(chosen)
    if chosen.type != "html":
        kinds = KINDS if chosen.type == "all" else (chosen.type,)
        files, notes = write_report(
            chosen.checkpoint, chosen.output, chosen.data, kinds, chosen.device, chosen.conditions
        )
    if chosen.type in ("all", "html"):
        try:
            arguments = chosen.checkpoint, chosen.output, chosen.data, chosen.rows, chosen.device, chosen.conditions
            files.append(write_explorer(*arguments, trajectories))
        except DataError as error:
            if chosen.type == "html" or trajectories is not None:
                raise
            notes.append(f"explorer.html is omitted: {error}")
    _print(chosen, files, notes)


def _trajectories(chosen: argparse.Namespace) -> TrajectorySet | None:
    if not chosen.trajectories:
        return None
    from spinlock_fast.trajectories import open_trajectories
    from spinlock_fast.trajectories.options import Options

    return open_trajectories(chosen.trajectories, options=Options(dataset=chosen.dataset, axes=chosen.axes))


def _print(chosen: argparse.Namespace, files: list[Path], notes: list[str]) -> None:
    if chosen.quiet:
        return
    for note in notes:
        sys.stderr.write(f"note: {note}\n")
    for file in files:
        sys.stdout.write(f"{file}\n")


if __name__ == "__main__":
    main()
