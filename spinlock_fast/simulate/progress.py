"""Progress display of a simulation."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_PLAIN_SECONDS = 10.0  # interval of lines without a terminal


class ProgressDisplay:
    """A context manager that shows a bar in a terminal and a line every ten seconds elsewhere.

    Args:
        total: operators of the file.
        done: operators in the file at the start.
        quiet: show nothing.
    """

    def __init__(self, total: int, done: int, quiet: bool) -> None:
        self._console = Console(stderr=True, highlight=False, quiet=quiet)
        self._total, self._first, self._start = total, done, time.monotonic()
        self._last_line = self._start
        self._bar: Progress | None = None
        if self._console.is_terminal and not quiet:
            columns = (TextColumn("operators"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, TextColumn("{task.fields[rate]}"), console=self._console)
            self._bar.add_task("", total=total, completed=done, rate="")

    def __enter__(self) -> ProgressDisplay:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, done: int) -> None:
        """Shows that `done` operators are finished, including those of an earlier run."""
        seconds = time.monotonic() - self._start
        rate = f"{(done - self._first) / max(seconds, 1e-9):.2f} operators/s"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, rate=rate)
        elif done == self._total or time.monotonic() - self._last_line >= _PLAIN_SECONDS:
            self._last_line = time.monotonic()
            self._console.print(f"  {done:,} of {self._total:,} operators  {rate}", soft_wrap=True)
