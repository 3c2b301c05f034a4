"""The argument parser of every command, and options that several commands have."""

from __future__ import annotations

import argparse
from typing import NoReturn

from spinlock_fast.messages import one_line


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
