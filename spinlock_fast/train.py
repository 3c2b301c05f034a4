"""`python -m spinlock_fast.train CONFIG`: trains a tokenizer on an HDF5 file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from spinlock_fast.commands.arguments import add_device, add_initial, add_quiet, initial_overrides, parser
from spinlock_fast.commands.exit_status import exit_with
from spinlock_fast.commands.run_settings import run_settings
from spinlock_fast.config.help import help_text
from spinlock_fast.distributed import current_ranks


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    options = parser("train", "Trains a tokenizer and writes its checkpoint directory.")
    options.add_argument("config", nargs="?", help="YAML file; optional with --resume")
    options.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="e.g. training.num_epochs=5"
    )
    options.add_argument("--output", metavar="DIR", help="checkpoint directory, instead of output_dir")
    options.add_argument(
        "--resume",
        metavar="DIR",
        help="continue the interrupted run of this directory; auto: that of the output directory, if there is one",
    )
    add_initial(options)
    add_device(options, default=None)
    options.add_argument("--dry-run", action="store_true", help="check and estimate, write nothing")
    add_quiet(options, "errors and the last line only")
    options.add_argument("--help-config", action="store_true", help="list every configuration key")
    chosen = options.parse_args(arguments)
    if chosen.help_config:
        sys.stdout.write(help_text() + "\n")
        return
    if chosen.config is None and chosen.resume in (None, "auto"):
        options.error("name a configuration file")
    exit_with(lambda: _train(chosen), distributed=True)


def _train(chosen: argparse.Namespace) -> None:
    ranks = current_ranks()
    # Rank 0 reads the settings: other hosts may not have the file, or see a run to resume later.
    overrides = [*chosen.overrides, *initial_overrides(chosen)]
    config, resume = ranks.on_main(
        lambda: run_settings(chosen.config, overrides, chosen.output, chosen.resume, chosen.device)
    )
    # The imports below need torch: after the checks that do not.
    if chosen.dry_run and not ranks.is_main:
        return
    if chosen.dry_run:
        from spinlock_fast.commands.dry_run import print_plan

        print_plan(config)
        return
    from spinlock_fast.commands.console import RunDisplay, print_summary
    from spinlock_fast.commands.scalars import check_writers
    from spinlock_fast.training.run import output_directory, run

    ranks.on_main(lambda: check_writers(config.logging))
    quiet = chosen.quiet or not ranks.is_main
    directory = output_directory(config) if ranks.is_main else None
    with RunDisplay(quiet, config.logging, directory, config.model_dump(mode="json")) as display:
        outcome = run(config, display, resume)
    if not quiet:
        print_summary(outcome.metrics)
    sys.stdout.write(f"checkpoint: {outcome.directory}\n")


if __name__ == "__main__":
    main()
