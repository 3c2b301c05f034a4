"""Terminal output: progress, log messages, the summary of a run."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from spinlock_fast.commands.scalars import ScalarWriter, epoch_scalars, open_writers
from spinlock_fast.config.schema import LoggingConfig
from spinlock_fast.models.metrics import Metrics
from spinlock_fast.training.observer import EpochRecord

_PLAIN_SECONDS = 10.0  # interval of progress lines without a terminal


class RunDisplay:
    """A context manager that shows progress: bars in a terminal, a line every ten seconds elsewhere.

    Args:
        quiet: show errors only.
        logging_config: log level, and where the scalars of each epoch are written.
        directory: checkpoint directory for the scalars; None: none are written.
        settings: of the run, for writers of scalars that show them.
    """

    def __init__(
        self,
        quiet: bool,
        logging_config: LoggingConfig,
        directory: Path | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.quiet = quiet
        self.console = Console(stderr=True, highlight=False)
        self._live = self.console.is_terminal and not quiet
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._last_line = 0.0
        self._rows = 0
        self._epochs = 0
        self._latest: dict[str, float] = {}
        self._directory = directory
        self._logging = logging_config
        self._settings = settings or {}
        self._writers: list[ScalarWriter] = []
        self._logger = logging.getLogger("spinlock_fast")
        self._handler = RichHandler(console=self.console, show_time=False, show_path=False)
        self._logger_state = (self._logger.level, self._logger.propagate)

    def __enter__(self) -> RunDisplay:
        self._logger.addHandler(self._handler)
        self._logger.setLevel("ERROR" if self.quiet else self._logging.level.upper())
        self._logger.propagate = False
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.training_finished()
        self._logger.removeHandler(self._handler)
        self._logger.setLevel(self._logger_state[0])
        self._logger.propagate = self._logger_state[1]

    def stage(self, text: str) -> None:
        """Shows the name of the next stage."""
        self._end_bar()
        if not self.quiet:
            self.console.print(text)

    def encoded(self, family: str, done: int, rows: int) -> None:
        """Shows the progress of encoding one family."""
        if self._live:
            if self._progress is None or self._progress.tasks[-1].description != family:
                self._start_bar(family, rows, "")
            self._update(done, "")
        elif done == rows or self._line_due():
            self._line(f"  {family}: {done:,} of {rows:,} samples")

    def training_started(self, epochs: int, first_epoch: int, rows: int) -> None:
        """Starts the display of training, from an epoch on."""
        self._rows, self._epochs = rows, epochs
        if self._directory is not None:
            self._writers = open_writers(self._directory, self._logging, first_epoch, self._settings)
        if self._live:
            self._start_bar("epochs", epochs, "")
            self._update(first_epoch, "")

    def epoch_finished(self, record: EpochRecord) -> None:
        """Shows the figures of a finished epoch."""
        if record.validation is not None:
            self._latest = record.validation
        text = f"loss {record.train_loss:.4f}"
        if self._latest:
            text += f"  quality {self._latest['quality']:.4f}  utilization {self._latest['utilization']:.3f}"
        text += f"  {self._rows / max(record.seconds, 1e-9):,.0f} samples/s"
        if self._live:
            self._update(record.epoch, text)
        elif record.epoch == self._epochs or self._line_due():
            self._line(f"  epoch {record.epoch}/{self._epochs}  {text}")
        for writer in self._writers:
            writer.add(epoch_scalars(record), record.epoch)

    def training_finished(self) -> None:
        """Ends the display of training and completes the scalars."""
        self._end_bar()
        writers, self._writers = self._writers, []
        for writer in writers:
            writer.close()

    def save(self, state: dict[str, Any]) -> None:
        """Does nothing: states are saved elsewhere."""

    def _start_bar(self, text: str, total: int, fields: str) -> None:
        self._end_bar()
        self._progress = Progress(
            TextColumn("  {task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
            console=self.console,
        )
        self._task = self._progress.add_task(text, total=total, text=fields)
        self._progress.start()

    def _update(self, done: int, text: str) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done, text=text)

    def _end_bar(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._progress = self._task = None

    def _line_due(self) -> bool:
        return time.monotonic() - self._last_line >= _PLAIN_SECONDS

    def _line(self, text: str) -> None:
        self._last_line = time.monotonic()
        if not self.quiet:
            self.console.print(text, soft_wrap=True)


def _joint_rows(joint: Metrics | None) -> list[tuple[str, str]]:
    if joint is None:
        return []
    rows = [("  with joint search", f"{joint['reconstruction_error']:.4f}")]
    if perturbed := joint.get("perturbed"):
        count = perturbed["perturbations"]
        rows.append((f"  and {count} perturbations", f"{perturbed['reconstruction_error']:.4f}"))
    return rows


def print_summary(metrics: Metrics, console: Console | None = None) -> None:
    """Prints the figures of a run and one row per category to standard output."""
    console = console or Console(highlight=False, width=None if sys.stdout.isatty() else 80)
    figures = Table.grid(padding=(0, 2))
    rows = [
        ("quality", f"{metrics['quality']:.4f}"),
        ("reconstruction error", f"{metrics['reconstruction_error']:.4f}"),
        *_joint_rows(metrics.get("joint")),
        ("utilization", f"{metrics['utilization']:.3f}"),
        ("perplexity / K", f"{metrics['perplexity_over_k']:.3f}"),
        ("distance preservation", f"{metrics['topo_pre']:.3f} latents, {metrics['topo_post']:.3f} codes"),
        ("loss, all terms", f"{metrics['val_loss']:.4f}"),
        ("codes in use", f"{metrics['active_codes']} of {metrics['total_codes']}"),
    ]
    if compared := metrics.get("compared_with_training"):
        outside, usual = compared["outside_range"], compared["outside_range_in_training"]
        rows.append(("outside training", f"{outside:.1%} of features ({usual:.1%} in training)"))
    if "parameters" in metrics:
        rows.append(("parameters", f"{metrics['parameters']:,}"))
    if "best_epoch" in metrics:
        rows.append(("epochs", f"{metrics['epochs']}, best {metrics['best_epoch']}"))
    if "seconds" in metrics:
        rows.append(("seconds", ", ".join(f"{name} {value:.1f}" for name, value in metrics["seconds"].items())))
    for name, value in rows:
        figures.add_row(f"  {name}", value)
    console.print(f"\nMeasured on {describe_rows(metrics)}")
    console.print(figures)

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("category", no_wrap=True)
    table.add_column("features", justify="right")
    table.add_column("families")
    for name in ("purity", "MSE", "utilization", "codes"):
        table.add_column(name, justify="right", no_wrap=True)
    for category in metrics["categories"]:
        families = category.get("families", {})
        table.add_row(
            escape(category["name"]),
            str(category["features"]),
            escape(", ".join(f"{name[:3].upper()} {count}" for name, count in families.items())),
            f"{category['purity']:.0%}" if "purity" in category else "",
            f"{category['mse']:.4f}",
            " ".join(f"{value:.2f}" for value in category["utilization"]),
            " ".join(f"{k:2d}" for k in category["codes"]),
        )
    console.print()
    console.print(table)
    console.print(
        "MSE: features of the category, decoded from all codes; utilization and codes: levels L0, L1, L2\n", style="dim"
    )


def describe_rows(metrics: Metrics) -> str:
    """The rows that metrics were measured on, as text such as "77 held-out samples"."""
    count, trained = metrics["val_rows"], metrics.get("trained_rows")
    names = {"heldout": "held-out ", "train": "training ", "validation": "validation ", "test": "test "}
    text = f"{count:,} {names.get(metrics.get('rows', ''), '')}samples"
    if metrics.get("rows") != "all":
        return text
    return f"all {text}" if trained is None else f"all {text}, {trained:,} of them training samples"
