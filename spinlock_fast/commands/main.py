"""`spinlock-fast <verb> ...` and `python -m spinlock_fast <verb> ...`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import NoReturn

from spinlock_fast.commands.arguments import Parser

VERBS = {
    "generate": "simulate operators and write their features to an HDF5 file",
    "extract": "describe trajectories of any simulation as features",
    "train": "train a tokenizer on an HDF5 file",
    "evaluate": "measure a checkpoint on an HDF5 file",
    "tokenize": "turn an HDF5 file into tokens",
    "analyze": "tell what the tokens of a checkpoint mean",
    "convert": "convert a checkpoint of the original project",
    "report": "draw the dashboards of a checkpoint",
}


def command_of(verb: str) -> Callable[[Sequence[str] | None], None]:
    """The function of `python -m spinlock_fast.<verb>`, which takes the command line without the verb."""
    module = "report.__main__" if verb == "report" else verb
    command: Callable[[Sequence[str] | None], None] = import_module(f"spinlock_fast.{module}").main
    return command


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
    command_of(chosen.verb)(chosen.arguments)
    sys.exit(0)
