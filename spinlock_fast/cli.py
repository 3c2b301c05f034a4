"""The command line: `spinlock-fast <verb>`, and what the verbs share."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from types import FrameType
from typing import NoReturn

from spinlock_fast.errors import ConfigError, Interrupted, SpinlockFastError, is_out_of_memory
from spinlock_fast.messages import one_line
from spinlock_fast.signals import handling
from spinlock_fast.streams import ReaderGone, tolerant_streams

VERBS = {
    "generate": "simulate operators and write their features to an HDF5 file",
    "train": "train a tokenizer on an HDF5 file",
    "evaluate": "measure a checkpoint on an HDF5 file",
    "tokenize": "turn an HDF5 file into tokens",
    "analyze": "tell what the tokens of a checkpoint mean",
    "convert": "convert a checkpoint of the original project",
    "report": "draw the dashboards of a checkpoint",
}

READER_GONE = 141  # the exit status where standard output is a pipe that nobody reads, as after SIGPIPE


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line and status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {one_line(message)} (see {self.prog} --help)\n")


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
    with tolerant_streams():
        status = _status_of(command)
    sys.exit(status)


def _status_of(command: Callable[[], None]) -> int:
    try:
        # A signal unwinds the stack, so that unfinished files are removed; `train` has a handler of its own.
        with handling(_interrupt):
            _refuse_several_processes()
            command()
            sys.stdout.flush()
    except SpinlockFastError as error:
        sys.stderr.write(f"error: {one_line(error)}\n")
        sys.stderr.flush()
        return error.exit_status
    except ReaderGone:
        return READER_GONE
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        sys.stderr.write(f"error: out of memory: {one_line(error, 200)}\n")
        sys.stderr.flush()
        return SpinlockFastError.exit_status
    return 0


def _refuse_several_processes() -> None:
    """Raises ConfigError under a launcher such as torchrun: every process would write the same output."""
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes.strip() not in ("", "1"):
        raise ConfigError(
            f"WORLD_SIZE is {processes}: this command runs in one process; start it without torchrun, "
            "or unset WORLD_SIZE"
        )


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
