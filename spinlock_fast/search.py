"""`python -m spinlock_fast.search CKPT_DIR TOKENS.h5 --like ROW`: the rows nearest to a row, or to given codes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from spinlock_fast.commands.arguments import (
    add_device,
    add_external,
    add_memory_budget,
    add_quiet,
    like_row,
    number,
    parser,
)
from spinlock_fast.commands.exit_status import exit_with


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    options = parser("search", "Finds the rows of a file that are nearest to a row, or to given codes.")
    options.add_argument("checkpoint", help="checkpoint directory")
    options.add_argument("index", help="HDF5 file that `tokenize` wrote; with --by latents, the file of features")
    query = options.add_mutually_exclusive_group(required=True)
    query.add_argument("--like", type=like_row, metavar="ROW", help="a row of the index, or FILE:ROW of another file")
    query.add_argument(
        "--token",
        nargs="+",
        metavar="CATEGORY=CODES",
        help="codes, level by level, such as cluster_3=12/4/7, c3=12 or c3/L1=4; * leaves a level out",
    )
    options.add_argument("--top", type=number, default=10, metavar="N", help="number of rows (10)")
    options.add_argument("--by", choices=["tokens", "latents"], default="tokens", help="what is compared (tokens)")
    options.add_argument("--json", metavar="FILE", help="also write the rows to a JSON file")
    add_memory_budget(options)
    add_external(options)
    add_device(options)
    add_quiet(options, "no table")
    chosen = options.parse_args(arguments)
    exit_with(lambda: _search(chosen))


def _search(chosen: argparse.Namespace) -> None:
    from spinlock_fast.commands.search import run_search

    run_search(chosen)


if __name__ == "__main__":
    main()
