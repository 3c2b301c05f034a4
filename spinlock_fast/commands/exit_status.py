"""Runs a command and sets the exit status of the process; see the table in docs/reliability.md."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import NoReturn

from spinlock_fast.commands.standard_streams import ReaderGone, tolerant_streams
from spinlock_fast.errors import ConfigError, Interrupted, SpinlockFastError, is_out_of_memory
from spinlock_fast.interrupts import handle_signals
from spinlock_fast.messages import one_line

READER_GONE = 141  # standard output is a closed pipe, the status of SIGPIPE


def exit_with(command: Callable[[], None]) -> NoReturn:
    """Runs a command and exits: an expected error prints one line per problem on stderr and sets its exit status."""
    with tolerant_streams():
        status = _status_of(command)
    sys.exit(status)


def _status_of(command: Callable[[], None]) -> int:
    try:
        # A signal raises, so that unfinished files are removed; `train` installs its own handler.
        with handle_signals(_interrupt):
            _refuse_several_processes()
            command()
            sys.stdout.flush()
    except SpinlockFastError as error:
        return _report(error.lines, error.exit_status)
    except ReaderGone:
        return READER_GONE
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return _report([f"out of memory: {one_line(error, 200)}"], SpinlockFastError.exit_status)
    return 0


def _report(problems: Sequence[str], status: int) -> int:
    """Writes one line per problem to stderr; returns the exit status."""
    sys.stderr.write("".join(f"error: {one_line(problem)}\n" for problem in problems))
    sys.stderr.flush()
    return status


def _refuse_several_processes() -> None:
    """Raises ConfigError under a launcher such as torchrun, where every process would write the same output."""
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes.strip() not in ("", "1"):
        raise ConfigError(
            f"WORLD_SIZE is {processes}: this command runs in one process; start it without torchrun, "
            "or unset WORLD_SIZE"
        )


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise Interrupted("interrupted", number)
