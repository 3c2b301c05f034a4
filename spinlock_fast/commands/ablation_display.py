"""Terminal output of `ablate`: a live table of the variants, and the tables of the results."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Table

from spinlock_fast.ablation.plan import Run
from spinlock_fast.ablation.records import MEASURES, Record
from spinlock_fast.ablation.statistics import summarize
from spinlock_fast.ablation.tables import COMPARED, difference_cell, summary_cell, table_of
from spinlock_fast.config.schema import LoggingConfig
from spinlock_fast.errors import SpinlockFastError

_LIVE = ["reconstruction_error", "quality", "utilization", "topo_post"]

# What a narrow terminal has room for: the quality is 1 - error, see ablation.md.
_PRINTED = [name for name in MEASURES if name != "quality"]
_SHORT = {"utilization": "util.", "perplexity_over_k": "perpl. / K", "topo_pre": "topo pre", "topo_post": "topo post"}

log = logging.getLogger("spinlock_fast.ablation")


class SweepDisplay:
    """A context manager that shows the progress of an ablation: a live table in a terminal, a line per run elsewhere.

    Args:
        runs: all runs, also those that were finished before.
        jobs: how many are performed side by side.
        quiet: show errors only.
        logging_config: log level.
    """

    def __init__(self, runs: Sequence[Run], jobs: int, quiet: bool, logging_config: LoggingConfig) -> None:
        self._runs, self._jobs, self._quiet = runs, jobs, quiet
        self._console = Console(stderr=True, highlight=False)
        self._live: Live | None = None
        self._records: dict[Run, Record] = {}
        self._active: dict[Run, str] = {}
        self._failed: set[Run] = set()
        self._warnings: set[str] = set()
        self._started = time.monotonic()
        self._earlier = 0  # runs that were finished before
        self._stage = ""
        self._level = logging_config.level
        self._logger = logging.getLogger("spinlock_fast")
        self._handler = RichHandler(console=self._console, show_time=False, show_path=False)
        self._logger_state = (self._logger.level, self._logger.propagate)

    def __enter__(self) -> SweepDisplay:
        self._logger.addHandler(self._handler)
        self._logger.setLevel("ERROR" if self._quiet else self._level.upper())
        self._logger.propagate = False
        if self._console.is_terminal and not self._quiet and self._runs:
            self._live = Live(self._table(), console=self._console, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end_live()
        self._logger.removeHandler(self._handler)
        self._logger.setLevel(self._logger_state[0])
        self._logger.propagate = self._logger_state[1]

    def already_finished(self, run: Run, record: Record) -> None:
        """Counts a run that was finished before."""
        self._records[run] = record
        self._earlier += 1
        self._show()

    def preparing(self, runs: Sequence[Run]) -> None:
        """Shows that the features of runs are encoded."""
        self._stage = f"encoding the features of {len(runs)} run{'s' * (len(runs) > 1)} with seed {runs[0].seed}"
        self._show(self._stage)

    def started(self, run: Run) -> None:
        """Shows a run as in progress."""
        self._active[run] = f"seed {run.seed}"
        self._stage = ""
        self._show()

    def epoch(self, run: Run, epoch: int, epochs: int) -> None:
        """Shows the progress of a run."""
        self._active[run] = f"seed {run.seed}: epoch {epoch}/{epochs}"
        self._show()

    def finished(self, run: Run, result: Record) -> None:
        """Shows the measures of a finished run."""
        self._active.pop(run, None)
        self._records[run] = result
        measures = "  ".join(f"{MEASURES[name]} {result.measures[name]:.4f}" for name in _LIVE)
        self._show(f"{self._count()}  {run.name}: {measures}  {result.measures['seconds']:.1f} s")

    def failed(self, run: Run, error: SpinlockFastError) -> None:
        """Shows that a run failed."""
        self._active.pop(run, None)
        self._failed.add(run)
        self._show(f"{self._count()}  {run.name}: failed: {error}")

    def warning(self, text: str) -> None:
        """Logs a warning of a worker, unless the same text was logged before."""
        if text not in self._warnings:
            self._warnings.add(text)
            log.warning("%s", text)

    def end_live(self) -> None:
        """Removes the live table."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _show(self, line: str = "") -> None:
        if self._live is not None:
            self._live.update(self._table())
        elif line and not self._quiet:
            self._console.print(line, soft_wrap=True, markup=False)

    def _count(self) -> str:
        return f"{len(self._records) + len(self._failed)}/{len(self._runs)}"

    def _table(self) -> Table:
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, caption=self._caption(), caption_justify="left")
        table.add_column("variant")
        table.add_column("done", justify="right")
        for name in _LIVE:
            table.add_column(MEASURES[name], justify="right", no_wrap=True)
        table.add_column("now")
        for variant in dict.fromkeys(run.variant for run in self._runs):
            runs = [run for run in self._runs if run.variant == variant]
            records = [self._records[run] for run in runs if run in self._records]
            cells = []
            for name in _LIVE:
                summary = summarize([record.measures[name] for record in records])
                cells.append("" if summary is None else summary_cell(name, summary))
            now = [text for run, text in self._active.items() if run.variant == variant]
            now += [f"seed {run.seed} failed" for run in runs if run in self._failed]
            table.add_row(escape(variant), f"{len(records)}/{len(runs)}", *cells, ", ".join(now))
        return table

    def _caption(self) -> str:
        performed = len(self._records) + len(self._failed) - self._earlier
        left = len(self._runs) - len(self._records) - len(self._failed)
        text = f"{self._count()} runs"
        if performed:
            seconds = (time.monotonic() - self._started) / performed * left
            text += f", about {seconds / 60:.0f} min left" if seconds > 90 else f", about {seconds:.0f} s left"
        return f"{text}; {self._stage}" if self._stage else text


def print_tables(records: Sequence[Record]) -> None:
    """Prints the means and the differences to the base to standard output."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 240)
    rows = table_of(records)
    means = _result_table(["seeds", *(_SHORT.get(name, MEASURES[name]) for name in _PRINTED)])
    for row in rows:
        means.add_row(
            escape(row.variant), str(len(row.seeds)), *(summary_cell(name, row.summaries[name]) for name in _PRINTED)
        )
    console.print("Mean ± standard deviation over seeds")
    console.print(means)
    if not any(row.differences for row in rows):
        return
    changes = _result_table([_SHORT.get(name, MEASURES[name]) for name in _PRINTED if name in COMPARED])
    for row in rows:
        if row.differences:
            texts = [difference_cell(row.differences.get(name)) for name in _PRINTED if name in COMPARED]
            changes.add_row(escape(row.variant), *map(escape, texts))
    console.print("\nPaired difference to the base, with its 95 % interval")
    console.print(changes)


def _result_table(headings: Sequence[str]) -> Table:
    """A table whose cells are broken at spaces where the terminal is narrow."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("variant", overflow="fold", max_width=60)
    for heading in headings:
        table.add_column(heading, justify="right", min_width=5 if heading == "seeds" else 7)
    return table
