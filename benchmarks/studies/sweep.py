"""The runs of a study, performed by the worker processes of `ablate`; a line of JSON for each finished one."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from spinlock_fast.ablation.runs import Display, Group, perform_groups
from spinlock_fast.ablation.worker import Reply
from spinlock_fast.errors import SpinlockFastError, TrainingError

Row = dict[str, Any]
ArgumentT = TypeVar("ArgumentT")


def lines_of(output: Path) -> list[Row]:
    """The rows of a JSON lines file; an incomplete last line of a killed process is ignored."""
    rows = []
    for line in output.read_text(encoding="utf-8").splitlines() if output.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def append(output: Path, *rows: Row) -> None:
    """Appends lines with a single write: those of several processes do not mix, and those of one run are all there."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("ab+", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        incomplete = size > 0 and os.pread(file.fileno(), 1, size - 1) != b"\n"
        file.write(("\n" * incomplete + "".join(f"{json.dumps(row)}\n" for row in rows)).encode())


def sweep(
    runs: Mapping[str, ArgumentT],
    measure: Callable[[ArgumentT], Sequence[Row]],
    keep: Callable[..., object],
    shown: Sequence[str],
    *,
    jobs: int = 1,
    threads: int = 1,
    deadline: float = math.inf,
) -> int:
    """Performs the runs and prints a line for each row; one that fails does not end the others.

    Args:
        runs: argument of `measure` by the name of the run, started in order.
        measure: trains and measures a run in a worker process; pickled. Returns the rows of the run.
        keep: called with the rows of a finished run.
        shown: printed entries of the rows.
        jobs: number of worker processes.
        threads: CPU threads of each.
        deadline: `time.time()` after which no run is started.

    Returns:
        The number of runs that failed.
    """
    if not runs:
        return 0
    group = Group([_Run(*item, measure) for item in runs.items()], lambda run, _: run)
    workers = [""] * min(jobs, len(runs))  # `measure` knows its device
    try:
        failures = perform_groups([group], workers, threads, _Lines(len(runs), keep, shown), deadline)
    except SpinlockFastError as error:  # a worker process was killed
        raise SystemExit(f"error: {error}") from None
    if group.pending:
        print(f"time limit: {len(group.pending)} runs are left", flush=True)
    return len(failures)


@dataclass(frozen=True)
class _Run(Generic[ArgumentT]):
    """A run, and the task that performs it."""

    name: str
    argument: ArgumentT = field(compare=False)
    measure: Callable[[ArgumentT], Sequence[Row]] = field(compare=False)

    def perform(self, device: str, reply: Reply) -> Sequence[Row]:
        try:
            return self.measure(self.argument)
        except SpinlockFastError:
            raise
        except (AssertionError, ImportError, RuntimeError, ValueError) as error:
            raise TrainingError(f"{type(error).__name__}: {error}") from None


class _Lines(Display["_Run[ArgumentT]"]):
    """Prints a line for each row."""

    def __init__(self, runs: int, keep: Callable[..., object], shown: Sequence[str]) -> None:
        self._runs, self._keep, self._shown = runs, keep, shown
        self._done, self._started = 0, time.monotonic()

    def _print(self, run: _Run[ArgumentT], text: str) -> None:
        seconds = time.monotonic() - self._started
        print(f"[{self._done}/{self._runs}, {seconds:.0f} s] {run.name}: {text}", flush=True)

    def finished(self, run: _Run[ArgumentT], result: Sequence[Row]) -> None:
        self._done += 1
        self._keep(*result)
        for row in result:
            values = [(name, row[name]) for name in self._shown]
            self._print(run, " ".join(f"{k}={f'{v:.4g}' if isinstance(v, float) else v}" for k, v in values))

    def failed(self, run: _Run[ArgumentT], error: SpinlockFastError) -> None:
        self._done += 1
        self._print(run, f"failed: {error}")
