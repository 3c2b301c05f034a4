"""What a person sees while operators are simulated."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_PLAIN_SECONDS = 10.0  # between two lines where there is no terminal


class ProgressDisplay:
    """A bar in a terminal, a line every ten seconds elsewhere, nothing when quiet; a context manager.

    Args:
        total: operators of the file.
        done: operators that are in it already.
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
        """`done` operators are simulated, those of an earlier run included."""
        seconds = time.monotonic() - self._start
        rate = f"{(done - self._first) / max(seconds, 1e-9):.2f} operators/s"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, rate=rate)
        elif done == self._total or time.monotonic() - self._last_line >= _PLAIN_SECONDS:
            self._last_line = time.monotonic()
            self._console.print(f"  {done:,} of {self._total:,} operators  {rate}", soft_wrap=True)
