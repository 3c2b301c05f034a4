"""`python -m spinlock_fast.ablate CONFIG ...`: compares variants of a configuration."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from spinlock_fast.commands.arguments import add_device, add_quiet, counts, number, parser, shard
from spinlock_fast.commands.exit_status import exit_with


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    options = parser("ablate", "Trains variants of a configuration, each with the same seeds, and compares them.")
    options.add_argument("config", nargs="?", help="YAML file of `train`, the base; not needed with --collect")
    variants = options.add_argument_group("variants, each with one change of the base")
    variants.add_argument(
        "--drop",
        action="append",
        default=[],
        metavar="family:NAME|loss:NAME",
        help="without a feature family, or with weight 0 of a loss term: reconstruction, vq, orthogonality, "
        "informativeness, topographic",
    )
    variants.add_argument(
        "--set", dest="sets", action="append", default=[], metavar="KEY=V,V", help="e.g. model.decay=0.9,0.99"
    )
    variants.add_argument("--levels", type=counts, default=[], metavar="N,N", help="first N levels of each category")
    variants.add_argument("--grid", action="store_true", help="all combinations of the values of several --set")
    options.add_argument(
        "--base", action="append", default=[], metavar="KEY=VALUE", help="a change of the base, and so of all variants"
    )
    options.add_argument(
        "--seeds", type=number, default=3, metavar="N", help="seeds of each variant, from random_seed on (3)"
    )
    options.add_argument(
        "--jobs", type=number, metavar="N", help="runs side by side (CPU: 1; CUDA: one for each device)"
    )
    options.add_argument("--output", metavar="DIR", help="directory of the results (ablations/<name of CONFIG>)")
    options.add_argument("--shard", type=shard, metavar="I/N", help="do part I of N of the runs, counted from 0")
    options.add_argument("--collect", action="store_true", help="make the table of the finished runs in --output")
    options.add_argument("--keep-checkpoints", action="store_true", help="keep the checkpoint of each run")
    add_device(options, default=None)
    options.add_argument("--dry-run", action="store_true", help="list the runs and estimate the time, write nothing")
    add_quiet(options, "errors and the tables only")
    chosen = options.parse_args(arguments)
    if chosen.config is None and not chosen.collect:
        options.error("name a configuration file")
    if chosen.collect and chosen.output is None and chosen.config is None:
        options.error("--collect needs --output DIR")
    if chosen.collect and (chosen.shard or chosen.dry_run):
        options.error("--collect makes the table: leave out --shard and --dry-run")
    exit_with(lambda: _ablate(chosen))


def _ablate(chosen: argparse.Namespace) -> None:
    from spinlock_fast.commands.ablation import ablate  # needs torch

    ablate(chosen)


if __name__ == "__main__":
    main()
