"""The work of `monitor`: compares a file with training, writes the result, prints the verdict."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

from spinlock_fast.commands.console import RunDisplay
from spinlock_fast.config.schema import LoggingConfig
from spinlock_fast.distributed import current_ranks
from spinlock_fast.drift import monitor
from spinlock_fast.drift.verdict import STABLE, STATUSES
from spinlock_fast.errors import DriftError
from spinlock_fast.messages import printable
from spinlock_fast.output.atomic_files import check_writable, write_json
from spinlock_fast.output.locks import locked_output_directory

log = logging.getLogger(__name__)

JSON, PICTURE = "drift.json", "drift.png"
_SHOWN = 10
_LABELS = {
    "features": {"psi": "PSI"},
    "codebooks": {"usage_psi": "PSI of usage", "distance_psi": "PSI of distances"},
}


def run_monitor(options: argparse.Namespace) -> None:
    """Runs the command.

    Raises:
        DataError, OutputError: with one line.
        DriftError: the verdict is that of --fail-on, or worse.
    """
    ranks = current_ranks()
    output = None if options.output is None else Path(options.output)
    with RunDisplay(options.quiet or not ranks.is_main, LoggingConfig(level="warning")):
        if output is not None:
            ranks.on_main(lambda: check_writable(output))
        result = monitor(
            options.checkpoint,
            options.data,
            options.reference,
            device=options.device,
            memory_budget=options.memory_budget,
            allow_external=not options.no_external,
            ranks=ranks,
        )
        ranks.on_main(lambda: _write(result, output, options.json))
    if ranks.is_main and not options.quiet:
        sys.stdout.write(verdict_text(result))
    if options.fail_on and STATUSES.index(result["verdict"]) >= STATUSES.index(options.fail_on):
        raise DriftError(f"verdict {result['verdict']}: {'; '.join(result['reasons'])}")


def _write(result: dict[str, Any], output: Path | None, json: str | None) -> None:
    if json:
        write_json(Path(json), result)
    if output is None:
        return
    with locked_output_directory(output):
        write_json(output / JSON, result)
        try:
            from spinlock_fast.drift.picture import write_picture
        except ImportError:
            log.warning("no picture: matplotlib is not installed (pip install 'spinlock-fast[report]')")
            return
        write_picture(output / PICTURE, result)


def verdict_text(result: dict[str, Any]) -> str:
    """The verdict, its reasons, and the features and codebooks of the largest changes."""
    apart = ""
    if result["rows_without_a_family"]:
        apart = f" ({result['rows_without_a_family']:,} rows without a family left out)"
    lines = [f"{result['verdict']}: {result['rows']:,} rows{apart} against {result['reference']['rows']:,} of the run"]
    lines += [f"  {reason}" for reason in result["reasons"]]
    for kind, labels in _LABELS.items():
        changed = [entry for entry in result[kind] if entry["status"] != STABLE]
        changed.sort(key=lambda entry: -max(entry[key] for key in labels))
        for entry in changed[:_SHOWN]:
            values = ", ".join(f"{label} {entry[key]:.2f}" for key, label in labels.items())
            lines.append(
                f"  {entry['status']:8} {printable(entry['name'])}: {values}, {entry['beyond']:.1%} beyond percentiles"
            )
        if len(changed) > _SHOWN:
            lines.append(f"  and {len(changed) - _SHOWN} more {kind}")
    return "\n".join(lines) + "\n"
