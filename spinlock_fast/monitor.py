"""`python -m spinlock_fast.monitor CKPT_DIR DATA.h5`: whether rows still are what the vocabulary was made for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from spinlock_fast.commands.arguments import add_device, add_external, add_memory_budget, add_quiet, parser
from spinlock_fast.commands.exit_status import exit_with


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    options = parser("monitor", "Compares the rows of a file with those that a checkpoint was trained on.")
    options.add_argument("checkpoint", help="checkpoint directory")
    options.add_argument("data", help="HDF5 file or glob")
    options.add_argument(
        "--reference",
        metavar="TRAINING.h5",
        help="data that the checkpoint was trained on; needed if it has no reference_statistics.json",
    )
    options.add_argument("--output", metavar="DIR", help="directory of drift.json and drift.png; earlier are replaced")
    options.add_argument("--json", metavar="FILE", help="also write the result to a JSON file")
    options.add_argument(
        "--fail-on", choices=["watch", "drifted"], help="exit with status 5 if the verdict is this one or worse"
    )
    add_memory_budget(options)
    add_external(options)
    add_device(options)
    add_quiet(options, "no table")
    chosen = options.parse_args(arguments)
    exit_with(lambda: _monitor(chosen), distributed=True)


def _monitor(chosen: argparse.Namespace) -> None:
    from spinlock_fast.commands.drift import run_monitor

    run_monitor(chosen)


if __name__ == "__main__":
    main()
