"""`python -m spinlock_fast.analyze CKPT_DIR DATA.h5 --output DIR`: what the tokens of a checkpoint mean."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from spinlock_fast.commands.arguments import add_external, parser
from spinlock_fast.commands.exit_status import exit_with
from spinlock_fast.config.schema import parse_bytes
from spinlock_fast.errors import ConfigError

_SETTINGS = ("bins", "alpha", "rows", "samples", "neighbours", "queries", "seed")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    options = parser("analyze", "Tells what the tokens of a checkpoint mean on an HDF5 file; see docs/tokens.md.")
    options.add_argument("checkpoint", help="checkpoint directory")
    options.add_argument("data", help="HDF5 file or glob, with parameters and metadata where it has them")
    options.add_argument("--output", required=True, metavar="DIR", help="directory of the tables; theirs are replaced")
    options.add_argument(
        "--compare", nargs="+", default=[], metavar="CKPT", help="checkpoints whose tokens are compared"
    )
    options.add_argument("--format", choices=("csv", "parquet", "both"), help="both where pyarrow is installed")
    options.add_argument("--bins", type=int, help="quantile bins of a parameter (5)")
    options.add_argument("--alpha", type=float, help="false discovery rate (0.05)")
    options.add_argument("--rows", type=int, help="most operators; more are thinned evenly (200000)")
    options.add_argument("--samples", type=int, help="operators of each kind that show a code (3)")
    options.add_argument("--neighbours", type=int, help="nearest operators that are listed (5)")
    options.add_argument("--queries", type=int, help="most operators whose neighbours are sought (1000)")
    options.add_argument("--seed", type=int, help="of permutations and random samples (0)")
    options.add_argument("--memory-budget", default="1.25GB", help="most bytes of raw features at once")
    add_external(options)
    options.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N: where operators are encoded")
    options.add_argument("--quiet", action="store_true", help="print nothing but errors")
    chosen = options.parse_args(arguments)
    exit_with(lambda: _analyze(chosen))


def _analyze(chosen: argparse.Namespace) -> None:
    try:
        budget = parse_bytes(chosen.memory_budget)
    except ValueError as error:
        raise ConfigError(f"--memory-budget: {error}, got {chosen.memory_budget!r}") from None

    from pydantic import ValidationError
    from rich.console import Console

    from spinlock_fast.analysis import AnalysisConfig, analyze, write_tables
    from spinlock_fast.analysis.tables import parquet_available
    from spinlock_fast.analysis.words import print_analysis
    from spinlock_fast.commands.console import RunDisplay
    from spinlock_fast.config.schema import LoggingConfig
    from spinlock_fast.device import resolve_device
    from spinlock_fast.output.atomic_files import check_writable, write_json
    from spinlock_fast.output.locks import locked_output_directory

    given = {name: getattr(chosen, name) for name in _SETTINGS if getattr(chosen, name) is not None}
    try:
        config = AnalysisConfig(**given)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"--{first['loc'][0]}: {first['msg'].lower()}, got {first['input']}") from None
    with_parquet = parquet_available()
    formats = {None: ("csv", "parquet") if with_parquet else ("csv",), "both": ("csv", "parquet")}
    kinds = formats.get(chosen.format, (chosen.format,))
    if "parquet" in kinds and not with_parquet:
        raise ConfigError("--format: Parquet needs pyarrow: pip install 'spinlock-fast[analysis]'")
    output = Path(chosen.output)
    device = str(resolve_device(chosen.device))
    check_writable(output)
    with RunDisplay(chosen.quiet, LoggingConfig()) as display:
        found = analyze(
            chosen.checkpoint,
            chosen.data,
            config,
            chosen.compare,
            device,
            budget,
            display.stage,
            lambda done, total: display.encoded("operators", done, total),
            allow_external=not chosen.no_external,
        )
        display.stage("Writing")
        with locked_output_directory(output):
            written = write_tables(found.tables, output, kinds)
            write_json(output / "summary.json", found.summary)
    if not chosen.quiet:
        print_analysis(found, Console(highlight=False, width=None if sys.stdout.isatty() else 100))
        sys.stdout.write(f"\n{len(written)} tables and summary.json: {output}\n")
        if not with_parquet and chosen.format is None:
            sys.stdout.write("Parquet files as well: pip install 'spinlock-fast[analysis]'\n")


if __name__ == "__main__":
    main()
