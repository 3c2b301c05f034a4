"""`python -m spinlock_fast.train CONFIG`: an HDF5 file to a trained tokenizer."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from spinlock_fast.checkpoints.run_directory import PARTIAL, config_to_resume, run_to_resume
from spinlock_fast.commands.arguments import parser
from spinlock_fast.commands.exit_status import exit_with
from spinlock_fast.config.loading import help_text, load_config, load_written_config


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    options = parser("train", "Trains a tokenizer and writes its checkpoint directory.")
    options.add_argument("config", nargs="?", help="YAML file; may be left out with --resume")
    options.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="e.g. training.num_epochs=5",
    )
    options.add_argument("--output", metavar="DIR", help="checkpoint directory, instead of output_dir")
    options.add_argument("--resume", metavar="DIR", help="go on with the run that was interrupted there")
    options.add_argument("--device", help="auto, cpu, cuda or cuda:N, instead of the configuration's")
    options.add_argument("--dry-run", action="store_true", help="check and estimate, write nothing")
    options.add_argument("--quiet", action="store_true", help="print errors and the last line only")
    options.add_argument("--help-config", action="store_true", help="list every configuration key")
    chosen = options.parse_args(arguments)
    if chosen.help_config:
        sys.stdout.write(help_text() + "\n")
        return
    if chosen.config is None and chosen.resume is None:
        options.error("name a configuration file")
    exit_with(lambda: _train(chosen))


def _train(chosen: argparse.Namespace) -> None:
    resume = run_to_resume(Path(chosen.resume)) if chosen.resume else None
    overrides = list(chosen.overrides)
    if chosen.device:
        overrides.append(f"device={json.dumps(chosen.device)}")
    if output := chosen.output or resume:
        overrides += [f"output_dir={json.dumps(str(output))}", "training.checkpoint_dir=null"]
    if resume and not chosen.config:
        config = load_written_config(config_to_resume(resume), overrides)
    else:
        config = load_config(chosen.config, overrides)

    # What follows needs torch: after the checks that do not.
    if chosen.dry_run:
        from spinlock_fast.commands.dry_run import print_plan

        print_plan(config)
        return
    from spinlock_fast.commands.console import RunDisplay, print_summary
    from spinlock_fast.training.run import output_directory, run

    with RunDisplay(chosen.quiet, config.logging, output_directory(config) / PARTIAL) as display:
        outcome = run(config, display, resume)
    if not chosen.quiet:
        print_summary(outcome.metrics)
    sys.stdout.write(f"checkpoint: {outcome.directory}\n")


if __name__ == "__main__":
    main()
