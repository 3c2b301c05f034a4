"""The argument parser of every command, and the options that several commands have."""

from __future__ import annotations

import argparse
import json
import math
import re
from typing import NoReturn

from spinlock_fast.config.byte_sizes import parse_bytes
from spinlock_fast.messages import one_line, shown


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and exit status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {one_line(message)} (see {self.prog} --help)\n")


def parser(verb: str, description: str) -> Parser:
    """The parser of one command."""
    return Parser(prog=f"python -m spinlock_fast.{verb}", description=description)


def add_external(options: argparse.ArgumentParser) -> None:
    """Adds --no-external."""
    options.add_argument(
        "--no-external",
        action="store_true",
        help="refuse links, virtual and external sources that lead out of the directory of a data file",
    )


def add_memory_budget(options: argparse.ArgumentParser) -> None:
    """Adds --memory-budget, a number of bytes."""
    options.add_argument(
        "--memory-budget",
        type=_size,
        default="1.25GB",
        metavar="SIZE",
        help="most bytes of raw features held at once (1.25GB)",
    )


def add_device(options: argparse.ArgumentParser, default: str | None = "auto") -> None:
    """Adds --device; without a default, the configuration file decides."""
    source = "" if default else ", instead of the configuration's"
    options.add_argument("--device", default=default, help=f"auto, cpu, cuda or cuda:N{source}")


def add_quiet(options: argparse.ArgumentParser, printed: str = "errors only") -> None:
    """Adds --quiet."""
    options.add_argument("--quiet", action="store_true", help=f"print {printed}")


def add_initial(options: argparse.ArgumentParser) -> None:
    """Adds --init-from and --freeze, see `initial_overrides`."""
    options.add_argument("--init-from", metavar="CKPT", help="train the model of this checkpoint further, on any data")
    options.add_argument(
        "--freeze", metavar="PARTS", help="parts of CKPT that do not change: none, encoders, codes, or both (tokens)"
    )


def initial_overrides(chosen: argparse.Namespace) -> list[str]:
    """Overrides of `training.init_from` and `training.freeze` from the options that are given."""
    given = {"training.init_from": chosen.init_from, "training.freeze": chosen.freeze}
    return [f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None]


def shard(text: str) -> tuple[int, int]:
    """(I, N) of "I/N", part I of N, counted from 0."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not int(match[1]) < int(match[2]):
        raise argparse.ArgumentTypeError(f"expected I/N with I from 0 to N - 1, such as 0/4, got {shown(text)}")
    return int(match[1]), int(match[2])


def sweeps(text: str) -> int:
    """A number of sweeps, at least 1."""
    if not re.fullmatch(r"0*[1-9]\d{0,3}", text):
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 to 9999, got {shown(text)}")
    return int(text)


def perturbations(text: str) -> int:
    """A number of perturbations, at least 0."""
    if not re.fullmatch(r"\d{1,4}", text):
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to 9999, got {shown(text)}")
    return int(text)


def like_row(text: str) -> tuple[str | None, int]:
    """(None, row) of "ROW", or (file, row) of "FILE:ROW"."""
    file, _, row = text.rpartition(":")
    if not re.fullmatch(r"\d{1,18}", row, re.ASCII):
        raise argparse.ArgumentTypeError(f"expected ROW or FILE:ROW, a row being a number from 0, got {shown(text)}")
    return file or None, int(row)


def weight(text: str) -> float:
    """A finite number of at least 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0.0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {shown(text)}")
    return number


def number(text: str) -> int:
    """A positive number."""
    if not re.fullmatch(r"0*[1-9]\d{0,5}", text):
        raise argparse.ArgumentTypeError(f"expected a number from 1 to 999999, got {shown(text)}")
    return int(text)


def counts(text: str) -> list[int]:
    """Positive numbers separated by commas."""
    return [number(part.strip()) for part in text.split(",")]


def _size(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}, got {shown(text)}") from None
