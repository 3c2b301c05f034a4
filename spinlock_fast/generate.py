"""`python -m spinlock_fast.generate --operators N --output FILE.h5`: simulates operators into a data set."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from spinlock_fast.commands.arguments import add_device, add_quiet, parser, shard
from spinlock_fast.commands.exit_status import exit_with
from spinlock_fast.simulate.config import load_generator_config


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    options = parser("generate", "Simulates stochastic neural operators and writes their features.")
    options.add_argument("--operators", type=int, metavar="N", help="operators to simulate, instead of the file's")
    options.add_argument("--output", required=True, metavar="FILE.h5", help="the data set")
    options.add_argument("--seed", type=int, metavar="S", help="seed of all random numbers, instead of random_seed")
    options.add_argument("--config", metavar="YAML", help="settings, for instance configs/data/quickstart.yaml")
    add_device(options, default=None)
    options.add_argument(
        "--shard", type=shard, default="0/1", metavar="I/N", help="simulate part I (from 0) of N consecutive parts only"
    )
    options.add_argument("--compression", choices=("none", "lzf", "gzip"), help="of the file, instead of the YAML's")
    options.add_argument("--operator-sensitivity", action="store_true", help="compute the ten Lipschitz features")
    options.add_argument("--last-fields", action="store_true", help="keep the last state of each operator")
    options.add_argument("--overwrite", action="store_true", help="replace a finished or unfinished file")
    options.add_argument("--resume", action="store_true", help="continue an unfinished file")
    add_quiet(options, "errors and the last line only")
    chosen = options.parse_args(arguments)
    if chosen.overwrite and chosen.resume:
        options.error("--overwrite and --resume exclude each other")
    exit_with(lambda: _generate(chosen), distributed=True)


def _generate(chosen: argparse.Namespace) -> None:
    changes = {
        "operators": chosen.operators,
        "random_seed": chosen.seed,
        "device": chosen.device,
        "compression": chosen.compression,
        "operator_sensitivity": chosen.operator_sensitivity or None,
        "last_fields": chosen.last_fields or None,
    }
    config = load_generator_config(chosen.config, {key: value for key, value in changes.items() if value is not None})
    from spinlock_fast.distributed import current_ranks
    from spinlock_fast.simulate.run import generate  # imports torch: after the checks that do not need it

    ranks = current_ranks()
    path = generate(config, chosen.output, chosen.shard, chosen.overwrite, chosen.resume, chosen.quiet, ranks)
    sys.stdout.write(f"data set: {path}\n")


if __name__ == "__main__":
    main()
