"""`python -m spinlock_fast.analyze CKPT_DIR DATA.h5 --output DIR`: relates tokens to parameters and features."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from spinlock_fast.commands.arguments import add_device, add_external, add_memory_budget, add_quiet, parser
from spinlock_fast.commands.exit_status import exit_with

_SETTINGS = {
    "bins": (int, "quantile bins of a parameter (5)"),
    "alpha": (float, "false discovery rate (0.05)"),
    "rows": (int, "maximum number of operators; evenly spaced ones are taken from a larger file (200000)"),
    "samples": (int, "operators of each kind listed as examples of a code (3)"),
    "neighbours": (int, "nearest operators listed for each query (5)"),
    "queries": (int, "maximum number of operators whose neighbours are searched (1000)"),
    "seed": (int, "seed of permutations and random samples (0)"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    options = parser(
        "analyze", "Relates the tokens of a checkpoint to parameters, labels and features of an HDF5 file."
    )
    options.add_argument("checkpoint", help="checkpoint directory")
    options.add_argument("data", help="HDF5 file or glob, with parameters and metadata where available")
    options.add_argument("--output", required=True, metavar="DIR", help="directory of the tables; earlier are replaced")
    options.add_argument("--compare", nargs="+", default=[], metavar="CKPT", help="checkpoints to compare tokens with")
    options.add_argument(
        "--conditions",
        nargs="+",
        default=[],
        metavar="PATH",
        help="further conditions: datasets of DATA with a value or a short vector a row, or FILE.csv:COLUMN",
    )
    options.add_argument(
        "--format", choices=("csv", "parquet", "both"), help="default: both where pyarrow is installed"
    )
    for name, (kind, text) in _SETTINGS.items():
        options.add_argument(f"--{name}", type=kind, help=text)
    add_memory_budget(options)
    add_external(options)
    add_device(options)
    add_quiet(options)
    chosen = options.parse_args(arguments)
    exit_with(lambda: _analyze(chosen), distributed=True)


def _analyze(chosen: argparse.Namespace) -> None:
    from spinlock_fast.commands.analysis import run_analysis

    run_analysis(chosen, {name: value for name in _SETTINGS if (value := getattr(chosen, name)) is not None})


if __name__ == "__main__":
    main()
