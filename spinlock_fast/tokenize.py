"""`python -m spinlock_fast.tokenize CKPT_DIR DATA.h5 --output TOKENS.h5`: raw features to tokens."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from spinlock_fast.commands.arguments import (
    add_device,
    add_external,
    add_memory_budget,
    add_quiet,
    parser,
    perturbations,
    sweeps,
    weight,
)
from spinlock_fast.commands.exit_status import exit_with


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    options = parser("tokenize", "Encodes an HDF5 file of features as tokens.")
    options.add_argument("checkpoint", help="checkpoint directory")
    options.add_argument("data", help="HDF5 file or glob")
    options.add_argument(
        "--output",
        required=True,
        metavar="FILE",
        help="file to write or replace: .csv, .npy, .parquet, or HDF5 (any other ending)",
    )
    options.add_argument(
        "--search",
        choices=["nearest", "joint"],
        default="nearest",
        help="nearest: the code nearest to each latent; joint: from there, codes with a lower reconstruction error",
    )
    options.add_argument("--sweeps", type=sweeps, default=2, metavar="N", help="passes of the joint search (2)")
    options.add_argument(
        "--search-weight",
        type=weight,
        default=0.0,
        metavar="W",
        help="weight of the distances between latents and codes in the joint search (0); larger: closer to nearest",
    )
    options.add_argument(
        "--perturbations",
        type=perturbations,
        default=0,
        metavar="N",
        help="how often the joint search leaves a local minimum (0); 8: 5 to 8 %% less error, 8 times the time",
    )
    options.add_argument(
        "--scores",
        action="store_true",
        help="also write the distance of each latent to its code, and how much farther the nearest other code is",
    )
    add_memory_budget(options)
    add_external(options)
    add_device(options)
    add_quiet(options)
    chosen = options.parse_args(arguments)
    if chosen.search == "nearest" and (chosen.sweeps, chosen.search_weight, chosen.perturbations) != (2, 0.0, 0):
        options.error("--sweeps, --search-weight and --perturbations are settings of --search joint")
    exit_with(lambda: _tokenize(chosen), distributed=True)


def _tokenize(chosen: argparse.Namespace) -> None:
    from spinlock_fast.commands.console import RunDisplay
    from spinlock_fast.commands.tokenize import write_tokens
    from spinlock_fast.config.schema import LoggingConfig
    from spinlock_fast.device import resolve_device
    from spinlock_fast.distributed import current_ranks
    from spinlock_fast.models.code_search import TokenSearch
    from spinlock_fast.tokenizer import Tokenizer

    ranks = current_ranks()
    tokenizer = Tokenizer.from_checkpoint(chosen.checkpoint, resolve_device(chosen.device))
    tokenizer.allow_external = not chosen.no_external
    with RunDisplay(chosen.quiet or not ranks.is_main, LoggingConfig()) as display:
        rows = write_tokens(
            tokenizer,
            chosen.data,
            Path(chosen.output),
            chosen.memory_budget,
            lambda done, total: display.encoded("tokens", done, total),
            ranks,
            TokenSearch(chosen.search, chosen.sweeps, chosen.search_weight, chosen.perturbations),
            chosen.scores,
        )
    if not chosen.quiet:
        sys.stdout.write(f"tokens: {chosen.output} [{rows}, {tokenizer.model.num_codebooks}]\n")


if __name__ == "__main__":
    main()
