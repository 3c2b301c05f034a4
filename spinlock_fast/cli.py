"""The command line: `spinlock-fast <verb>`, and what the verbs share."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from types import FrameType
from typing import NoReturn

from spinlock_fast.errors import Interrupted, SpinlockFastError

VERBS = {
    "generate": "simulate operators and write their features to an HDF5 file",
    "train": "train a tokenizer on an HDF5 file",
    "evaluate": "measure a checkpoint on an HDF5 file",
    "tokenize": "turn an HDF5 file into tokens",
    "analyze": "tell what the tokens of a checkpoint mean",
    "convert": "convert a checkpoint of the original project",
    "report": "draw the dashboards of a checkpoint",
}


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line and status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def parser(verb: str, description: str) -> Parser:
    """The parser of one command."""
    return Parser(prog=f"python -m spinlock_fast.{verb}", description=description)


def add_external(options: argparse.ArgumentParser) -> None:
    """The option of commands that read data files."""
    options.add_argument(
        "--no-external",
        action="store_true",
        help="refuse links, virtual and external sources that lead out of the directory of a data file",
    )


def exit_with(command: Callable[[], None]) -> NoReturn:
    """Runs a command and ends the process: a foreseen error is one line on stderr and its status."""
    # A SIGTERM unwinds the stack, so that unfinished files are removed; `train` has a handler of its own.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        command()
    except SpinlockFastError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted\n")
        sys.exit(Interrupted("", 2).exit_status)
    except BrokenPipeError:
        sys.exit(141)
    sys.exit(0)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise Interrupted("interrupted", number)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """`spinlock-fast <verb> ...`."""
    top = Parser(prog="spinlock-fast", description="Turns simulated dynamical systems into discrete tokens.")
    top.add_argument(
        "verb",
        choices=list(VERBS),
        metavar="verb",
        help="; ".join(f"{verb}: {text}" for verb, text in VERBS.items()),
    )
    top.add_argument("arguments", nargs=argparse.REMAINDER, help="see spinlock-fast <verb> --help")
    chosen = top.parse_args(arguments)
    import_module(f"spinlock_fast.{chosen.verb}").main(chosen.arguments)
    sys.exit(0)
