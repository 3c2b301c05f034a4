"""`python -m spinlock_fast.tokenize CKPT_DIR DATA.h5 --output TOKENS.h5`: raw features to tokens."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from spinlock_fast.commands.arguments import add_external, parser
from spinlock_fast.commands.exit_status import exit_with
from spinlock_fast.config.schema import parse_bytes
from spinlock_fast.errors import ConfigError


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    options = parser("tokenize", "Turns an HDF5 file of features into an HDF5 file of tokens.")
    options.add_argument("checkpoint", help="checkpoint directory")
    options.add_argument("data", help="HDF5 file or glob")
    options.add_argument("--output", required=True, metavar="TOKENS.h5", help="file to write; replaced if there")
    options.add_argument("--memory-budget", default="1.25GB", help="most bytes of raw features at once")
    add_external(options)
    options.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    options.add_argument("--quiet", action="store_true", help="print nothing but errors")
    chosen = options.parse_args(arguments)
    exit_with(lambda: _tokenize(chosen))


def _tokenize(chosen: argparse.Namespace) -> None:
    try:
        budget = parse_bytes(chosen.memory_budget)
    except ValueError as error:
        raise ConfigError(f"--memory-budget: {error}, got {chosen.memory_budget!r}") from None

    from spinlock_fast.commands.console import RunDisplay
    from spinlock_fast.config.schema import LoggingConfig
    from spinlock_fast.device import resolve_device
    from spinlock_fast.tokenizer import Tokenizer, write_tokens

    tokenizer = Tokenizer.from_checkpoint(chosen.checkpoint, resolve_device(chosen.device))
    tokenizer.allow_external = not chosen.no_external
    output = Path(chosen.output)
    with RunDisplay(chosen.quiet, LoggingConfig()) as display:
        rows = write_tokens(
            tokenizer,
            chosen.data,
            output,
            budget,
            lambda done, total: display.encoded("tokens", done, total),
        )
    if not chosen.quiet:
        sys.stdout.write(f"tokens: {output} [{rows}, {tokenizer.model.num_codebooks}]\n")


if __name__ == "__main__":
    main()
