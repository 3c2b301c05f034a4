"""`python -m spinlock_fast.report CKPT_DIR --output DIR`: dashboards of a checkpoint."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from spinlock_fast.commands.arguments import add_device, add_quiet, parser
from spinlock_fast.commands.exit_status import exit_with
from spinlock_fast.report.write import KINDS


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    options = parser("report", "Draws the dashboards of a checkpoint, as PNG and SVG.")
    options.add_argument("checkpoint", help="checkpoint directory")
    options.add_argument(
        "--data", metavar="FILE.h5", help="HDF5 file or glob; default: the data of the run, where they still exist"
    )
    options.add_argument("--output", required=True, metavar="DIR", help="directory for the pictures")
    options.add_argument("--type", default="all", choices=["all", *KINDS], help="which dashboard (default: all)")
    add_device(options)
    add_quiet(options)
    chosen = options.parse_args(arguments)
    exit_with(lambda: _report(chosen))


def _report(chosen: argparse.Namespace) -> None:
    from spinlock_fast.report.write import write_report

    kinds = KINDS if chosen.type == "all" else (chosen.type,)
    files, notes = write_report(chosen.checkpoint, chosen.output, chosen.data, kinds, chosen.device)
    if chosen.quiet:
        return
    for note in notes:
        sys.stderr.write(f"note: {note}\n")
    for file in files:
        sys.stdout.write(f"{file}\n")


if __name__ == "__main__":
    main()
