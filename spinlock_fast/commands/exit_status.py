"""Runs a command and sets the exit status of the process; see the table in docs/reliability.md."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import NoReturn

from spinlock_fast.commands.standard_streams import ReaderGone, redirect_to_null, tolerant_streams
from spinlock_fast.distributed import SINGLE, Ranks, launched_ranks, process_group
from spinlock_fast.errors import ConfigError, DistributedError, Interrupted, SpinlockFastError, is_out_of_memory
from spinlock_fast.interrupts import handle_signals
from spinlock_fast.messages import one_line

READER_GONE = 141  # standard output is a closed pipe, the status of SIGPIPE

# Delays of error messages under torchrun, which ends all ranks soon after one has failed.
_OTHER_RANKS_SECONDS = 3.0  # if all ranks fail alike, rank 0 prints the lines
_LOST_SECONDS = 6.0  # a rank that failed by itself prints its lines before those that lost contact with it


def exit_with(command: Callable[[], None], distributed: bool = False) -> NoReturn:
    """Runs a command and exits: an expected error prints one line per problem on stderr and sets its exit status.

    Args:
        command: the command.
        distributed: whether it runs in several processes under torchrun. It then finds its ranks with
            `spinlock_fast.distributed.current_ranks`; only rank 0 prints.
    """
    with tolerant_streams():
        status = _status_of(command, distributed)
    sys.exit(status)


def _status_of(command: Callable[[], None], distributed: bool) -> int:
    ranks = SINGLE
    try:
        # A signal raises, so that unfinished files are removed; `train` installs its own handler.
        with handle_signals(_interrupt):
            ranks = launched_ranks()
            if ranks.size > 1 and not distributed:
                raise ConfigError(
                    f"WORLD_SIZE is {ranks.size}: this command runs in one process; start it without torchrun, "
                    "or unset WORLD_SIZE"
                )
            if not ranks.is_main:
                redirect_to_null(sys.stdout)
                logging.disable(logging.WARNING)  # rank 0 prints the same messages
            with process_group():
                command()
            sys.stdout.flush()
    except SpinlockFastError as error:
        problems = [] if error.repeats_rank_0 else error.lines
        return _report(problems, error.exit_status, ranks, lost=isinstance(error, DistributedError))
    except ReaderGone:
        return READER_GONE
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return _report([f"out of memory: {one_line(error, 200)}"], SpinlockFastError.exit_status, ranks)
    return 0


def _report(problems: Sequence[str], status: int, ranks: Ranks, *, lost: bool = False) -> int:
    """Writes one line per problem to stderr; returns the exit status.

    Args:
        problems: the lines.
        status: exit status.
        ranks: of the command; ranks other than 0 write nothing if they are ended while they wait.
        lost: whether the problem is the loss of another rank.
    """
    delayed = ranks.size > 1 and (lost or not ranks.is_main)
    if delayed and _wait(_LOST_SECONDS if lost else _OTHER_RANKS_SECONDS) and not lost:
        return status
    prefix = f"error: rank {ranks.rank}: " if not (ranks.is_main or lost) else "error: "
    sys.stderr.write("".join(f"{prefix}{one_line(problem)}\n" for problem in problems))
    sys.stderr.flush()
    return status


def _wait(seconds: float) -> bool:
    """Waits, at most until a signal; returns whether there was one."""
    try:
        with handle_signals(_interrupt):
            time.sleep(seconds)
    except Interrupted:
        return True
    return False


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise Interrupted("interrupted", number)
