"""Runs a command and turns its outcome into the exit status of the process; docs/reliability.md has the table."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from spinlock_fast.commands.standard_streams import ReaderGone, tolerant_streams
from spinlock_fast.errors import ConfigError, Interrupted, SpinlockFastError, is_out_of_memory
from spinlock_fast.interrupts import handle_signals
from spinlock_fast.messages import one_line

READER_GONE = 141  # standard output is a closed pipe, as after SIGPIPE


def exit_with(command: Callable[[], None]) -> NoReturn:
    """Runs a command and ends the process: a foreseen error is one line on stderr and its status."""
    with tolerant_streams():
        status = _status_of(command)
    sys.exit(status)


def _status_of(command: Callable[[], None]) -> int:
    try:
        # A signal unwinds the stack, so that unfinished files are removed; `train` has a handler of its own.
        with handle_signals(_interrupt):
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
