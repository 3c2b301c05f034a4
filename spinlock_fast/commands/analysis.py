"""The work of `analyze`: analyses a file with progress, writes the tables, prints a summary."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console

from spinlock_fast.analysis import AnalysisConfig, analyze, write_tables
from spinlock_fast.analysis.summary_text import print_analysis
from spinlock_fast.commands.console import RunDisplay
from spinlock_fast.config.schema import LoggingConfig
from spinlock_fast.device import resolve_device
from spinlock_fast.distributed import current_ranks
from spinlock_fast.errors import ConfigError
from spinlock_fast.output.atomic_files import check_writable, write_json
from spinlock_fast.output.locks import locked_output_directory
from spinlock_fast.output.token_files import parquet_available
from spinlock_fast.report.analysis_write import write_analysis_page


def run_analysis(options: argparse.Namespace, settings: Mapping[str, Any]) -> None:
    """Runs the command.

    Args:
        options: arguments of the command line.
        settings: of `AnalysisConfig`, those that were given.

    Raises:
        ConfigError, DataError, OutputError: with one line.
    """
    config = _analysis_config(settings)
    formats = _table_formats(options.format)
    output = Path(options.output)
    device = str(resolve_device(options.device))
    check_writable(output)
    ranks = current_ranks()
    with RunDisplay(options.quiet or not ranks.is_main, LoggingConfig()) as display:
        analysis = analyze(
            options.checkpoint,
            options.data,
            config,
            options.compare,
            device,
            options.memory_budget,
            display.stage,
            lambda done, total: display.encoded("operators", done, total),
            allow_external=not options.no_external,
            conditions=options.conditions,
            ranks=ranks,
        )
        if not ranks.is_main:
            return
        display.stage("Writing")
        with locked_output_directory(output):
            written = write_tables(analysis.tables, output, formats)
            write_json(output / "summary.json", analysis.summary)
            pages = write_analysis_page(analysis, output)
    if options.quiet:
        return
    print_analysis(analysis, Console(highlight=False, width=None if sys.stdout.isatty() else 100))
    sys.stdout.write(f"\n{len(written)} tables and summary.json: {output}\npage: {pages[-1]}\n")
    if options.format is None and "parquet" not in formats:
        sys.stdout.write("Parquet files as well: pip install 'spinlock-fast[analysis]'\n")


def _analysis_config(settings: Mapping[str, Any]) -> AnalysisConfig:
    try:
        return AnalysisConfig(**settings)
    except ValidationError as error:
        problems = error.errors()
        raise ConfigError(*(f"--{p['loc'][0]}: {p['msg'].lower()}, got {p['input']}" for p in problems)) from None


def _table_formats(choice: str | None) -> tuple[str, ...]:
    """Formats of the tables; without a choice, Parquet files are written where pyarrow is installed."""
    if choice is None:
        return ("csv", "parquet") if parquet_available() else ("csv",)
    if choice != "csv" and not parquet_available():
        raise ConfigError("--format: Parquet needs pyarrow: pip install 'spinlock-fast[analysis]'")
    return ("csv", "parquet") if choice == "both" else (choice,)
