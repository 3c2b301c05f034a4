"""`spinlock-fast <verb> ...` and `python -m spinlock_fast <verb> ...`."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import NoReturn

from spinlock_fast._native import __version__
from spinlock_fast.commands.arguments import Parser
from spinlock_fast.messages import shown

VERBS = {
    "generate": "simulate operators and write their features to an HDF5 file",
    "extract": "describe trajectories of any simulation as features",
    "train": "train a tokenizer on an HDF5 file",
    "ablate": "compare variants of a configuration",
    "evaluate": "measure a checkpoint on an HDF5 file",
    "monitor": "compare a file with the data of a checkpoint",
    "tokenize": "turn an HDF5 file into tokens",
    "search": "find the rows nearest to a row or to codes",
    "analyze": "relate the tokens of a checkpoint to parameters and features",
    "predict": "predict tokens from parameters and initial fields",
    "convert": "convert a checkpoint of the original project",
    "report": "draw the dashboards of a checkpoint",
}


def command_of(verb: str) -> Callable[[Sequence[str] | None], None]:
    """The main function of a verb, which takes the arguments after it."""
    module = "report.__main__" if verb == "report" else verb
    command: Callable[[Sequence[str] | None], None] = import_module(f"spinlock_fast.{module}").main
    return command


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """`spinlock-fast <verb> ...`."""
    top = Parser(
        prog="spinlock-fast",
        description="Turns simulated dynamical systems into discrete tokens.",
        epilog="verbs:\n" + "\n".join(f"  {verb:9} {text}" for verb, text in VERBS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"spinlock-fast {__version__}")
    top.add_argument("verb", help="one of the verbs below")
    top.add_argument("arguments", nargs=argparse.REMAINDER, help="see spinlock-fast <verb> --help")
    chosen = top.parse_args(arguments)
    if chosen.verb not in VERBS:
        close = difflib.get_close_matches(chosen.verb, VERBS, 1)
        hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(VERBS)}"
        top.error(f"unknown verb {shown(chosen.verb)}; {hint}")
    command_of(chosen.verb)(chosen.arguments)
    sys.exit(0)
