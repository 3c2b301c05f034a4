"""The work of `search`: finds the nearest rows, writes and prints them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from spinlock_fast.analysis.search import nearest, parse_codes
from spinlock_fast.commands.console import RunDisplay
from spinlock_fast.config.schema import LoggingConfig
from spinlock_fast.device import resolve_device
from spinlock_fast.output.atomic_files import write_json
from spinlock_fast.tokenizer import Tokenizer


def run_search(options: argparse.Namespace) -> None:
    """Runs the command; raises ConfigError, DataError or OutputError with one line."""
    tokenizer = Tokenizer.from_checkpoint(options.checkpoint, resolve_device(options.device))
    tokenizer.allow_external = not options.no_external
    like = options.like
    with RunDisplay(options.quiet, LoggingConfig(level="warning")):
        found = nearest(
            tokenizer,
            options.index,
            int(like[1]) if like is not None and like[0] is None else like,
            options.token,
            by=options.by,
            top=options.top,
            memory_budget=options.memory_budget,
        )
    if options.json:
        query = {"like": like and (like[1] if like[0] is None else list(like)), "tokens": options.token}
        result = {"checkpoint_sha256": tokenizer.checkpoint_hash, "by": options.by, "query": query}
        write_json(Path(options.json), {**result, "codebooks": tokenizer.model.codebook_names, "rows": found})
    if options.quiet:
        return
    table = Table("row", "distance", box=None, padding=(0, 2, 0, 0))
    if options.by == "tokens":
        table.add_column("equal tokens")
    counted = tokenizer.model.num_codebooks
    if options.token is not None:
        counted = int((parse_codes(tokenizer, options.token) >= 0).sum())
    for entry in found:
        equal = [f"{entry['equal_tokens']} of {counted}"] if options.by == "tokens" else []
        table.add_row(str(entry["row"]), f"{entry['distance']:.4f}", *equal)
    Console(highlight=False, width=None if sys.stdout.isatty() else 80).print(table)
