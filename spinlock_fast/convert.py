"""`python -m spinlock_fast.convert SRC --output DIR`: a checkpoint of the original project to ours."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from spinlock_fast.commands.arguments import parser
from spinlock_fast.commands.exit_status import exit_with


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    options = parser("convert", "Converts a checkpoint of the original project.")
    options.add_argument("source", help="checkpoint directory of the original project, or its model file")
    options.add_argument("--output", required=True, metavar="DIR", help="checkpoint directory to write")
    options.add_argument(
        "--data", metavar="FILE.h5", help="its training data: recomputes the clip bounds and measures the model"
    )
    chosen = options.parse_args(arguments)
    exit_with(lambda: _convert(chosen))


def _convert(chosen: argparse.Namespace) -> None:
    from spinlock_fast.compat.original import convert, write_converted

    converted = convert(Path(chosen.source), chosen.data)
    write_converted(converted, Path(chosen.output))
    if not converted.clips:
        sys.stderr.write(
            "note: the original does not store its clip bounds, so this tokenizer does not clip; "
            "--data with its training file recomputes them\n"
        )
    sys.stdout.write(f"checkpoint: {chosen.output}\n")


if __name__ == "__main__":
    main()
