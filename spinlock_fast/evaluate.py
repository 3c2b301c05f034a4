"""`python -m spinlock_fast.evaluate CKPT_DIR DATA.h5`: metrics of a checkpoint on a file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from spinlock_fast.commands.arguments import add_device, add_external, add_memory_budget, add_quiet, parser
from spinlock_fast.commands.exit_status import exit_with


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    options = parser("evaluate", "Measures a checkpoint on held-out samples of a file.")
    options.add_argument("checkpoint", help="checkpoint directory")
    options.add_argument("data", help="HDF5 file or glob")
    options.add_argument(
        "--rows",
        choices=["auto", "heldout", "all", "train", "validation", "test"],
        default="auto",
        help="heldout: rows not used for training; train, validation, test: a part of the run's split; auto: heldout "
        "where the file contains training rows, else all",
    )
    options.add_argument("--json", metavar="FILE", help="also write the metrics to a JSON file")
    add_memory_budget(options)
    add_external(options)
    add_device(options)
    add_quiet(options, "no table")
    chosen = options.parse_args(arguments)
    exit_with(lambda: _evaluate(chosen), distributed=True)


def _evaluate(chosen: argparse.Namespace) -> None:
    from spinlock_fast.commands.console import RunDisplay, print_summary
    from spinlock_fast.config.schema import LoggingConfig
    from spinlock_fast.distributed import current_ranks
    from spinlock_fast.output.atomic_files import write_json
    from spinlock_fast.training.evaluation import evaluate_file

    ranks = current_ranks()
    with RunDisplay(chosen.quiet or not ranks.is_main, LoggingConfig(level="warning")):
        metrics = evaluate_file(
            chosen.checkpoint,
            chosen.data,
            chosen.device,
            chosen.rows,
            allow_external=not chosen.no_external,
            memory_budget=chosen.memory_budget,
            ranks=ranks,
        )
    if chosen.json and ranks.is_main:
        write_json(Path(chosen.json), metrics)
    if ranks.is_main and not chosen.quiet:
        print_summary(metrics)


if __name__ == "__main__":
    main()
