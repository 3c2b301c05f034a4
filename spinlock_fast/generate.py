"""`python -m spinlock_fast.generate --operators N --output FILE.h5`: simulated operators as a data set."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from typing import Any

from spinlock_fast.commands.arguments import parser
from spinlock_fast.commands.exit_status import exit_with
from spinlock_fast.errors import ConfigError
from spinlock_fast.simulate.config import load_generator_config


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    options = parser("generate", "Simulates stochastic neural operators and writes their features.")
    options.add_argument("--operators", type=int, metavar="N", help="operators to simulate, instead of the file's")
    options.add_argument("--output", required=True, metavar="FILE.h5", help="the data set")
    options.add_argument("--seed", type=int, metavar="S", help="seed of everything random, instead of random_seed")
    options.add_argument("--config", metavar="YAML", help="settings, for instance configs/data/quickstart.yaml")
    options.add_argument("--device", help="auto, cpu, cuda or cuda:N, instead of the file's")
    options.add_argument(
        "--shard", default="0/1", metavar="I/N", help="only part I (from 0) of N: files of all parts follow each other"
    )
    options.add_argument("--compression", choices=("none", "lzf", "gzip"), help="of the file, instead of the YAML's")
    options.add_argument("--operator-sensitivity", action="store_true", help="fill the ten Lipschitz features")
    options.add_argument("--overwrite", action="store_true", help="replace the file, or an unfinished one")
    options.add_argument("--resume", action="store_true", help="go on with an unfinished file")
    options.add_argument("--quiet", action="store_true", help="print errors and the last line only")
    chosen = options.parse_args(arguments)
    if chosen.overwrite and chosen.resume:
        options.error("--overwrite and --resume exclude each other")
    exit_with(lambda: _generate(chosen))


def _generate(chosen: argparse.Namespace) -> None:
    changes: dict[str, Any] = {
        "operators": chosen.operators,
        "random_seed": chosen.seed,
        "device": chosen.device,
        "compression": chosen.compression,
        "operator_sensitivity": chosen.operator_sensitivity or None,
    }
    config = load_generator_config(chosen.config, {key: value for key, value in changes.items() if value is not None})
    shard = _parse_shard(chosen.shard)

    # What follows needs torch: after the checks that do not.
    from spinlock_fast.simulate.run import generate

    path = generate(config, chosen.output, shard, chosen.overwrite, chosen.resume, chosen.quiet)
    sys.stdout.write(f"data set: {path}\n")


def _parse_shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not int(match[1]) < int(match[2]):
        raise ConfigError(f"--shard {text}: expected I/N with I from 0 to N - 1, such as 0/4")
    return int(match[1]), int(match[2])


if __name__ == "__main__":
    main()
