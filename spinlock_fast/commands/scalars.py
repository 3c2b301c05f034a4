"""Training curves: the scalars of each epoch as a CSV file, as TensorBoard events, and to Weights & Biases."""

from __future__ import annotations

import csv
import importlib.util
import io
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol, TextIO

from spinlock_fast.checkpoints.run_directory import PARTIAL, SCALARS, TENSORBOARD
from spinlock_fast.commands.tensorboard import ScalarFile
from spinlock_fast.config.schema import LoggingConfig
from spinlock_fast.errors import ConfigError, OutputError
from spinlock_fast.output.atomic_files import write_text
from spinlock_fast.training.observer import EpochRecord


class ScalarWriter(Protocol):
    """Where the scalars of each epoch are written."""

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Writes the scalars of a step, the number of finished epochs; raises OutputError."""

    def close(self) -> None:
        """Completes the output."""


def check_writers(config: LoggingConfig) -> None:
    """Raises ConfigError if a setting needs a package that is not installed."""
    if config.wandb and importlib.util.find_spec("wandb") is None:
        raise ConfigError("logging.wandb: wandb is not installed: pip install 'spinlock-fast[wandb]'")


def open_writers(
    directory: Path, config: LoggingConfig, first_epoch: int, settings: Mapping[str, Any]
) -> list[ScalarWriter]:
    """The writers of a run that are switched on.

    Args:
        directory: checkpoint directory.
        config: which of them.
        first_epoch: finished epochs of the resumed run; what it wrote of later epochs is replaced.
        settings: of the run, shown by Weights & Biases.

    Raises:
        ConfigError: Weights & Biases cannot be used.
        OutputError: a file cannot be written.
    """
    with ExitStack() as opened:
        writers: list[ScalarWriter] = []
        for writer in _opened(directory, config, first_epoch, settings):
            opened.callback(writer.close)
            writers.append(writer)
        opened.pop_all()
    return writers


def _opened(
    directory: Path, config: LoggingConfig, first_epoch: int, settings: Mapping[str, Any]
) -> Iterator[ScalarWriter]:
    if config.csv:
        yield CsvScalars(directory, first_epoch)
    if config.tensorboard is not False:
        try:
            yield ScalarFile(directory / PARTIAL / TENSORBOARD, first_epoch)
        except ImportError:
            if config.tensorboard:
                logging.getLogger(__name__).warning(
                    "logging.tensorboard is true, but it is not installed: pip install 'spinlock-fast[tensorboard]'"
                )
    if config.wandb:
        from spinlock_fast.commands.wandb_run import WandbScalars

        yield WandbScalars(directory, config, first_epoch, settings)


def epoch_scalars(record: EpochRecord) -> dict[str, float]:
    """The scalars of an epoch by name, such as "train/loss" and "validation/quality"."""
    values = {
        "train/loss": record.train_loss,
        "train/utilization": record.utilization,
        "train/learning_rate": record.learning_rate,
    }
    values |= {f"train/{name}": value for name, value in record.terms.items()}
    return values | {f"validation/{name}": value for name, value in (record.validation or {}).items()}


class CsvScalars:
    """scalars.csv: a row for each epoch, a column for each scalar; empty where an epoch has no such scalar.

    Args:
        directory: checkpoint directory; the file is in `.partial` until the run is complete.
        first_epoch: rows of later epochs, of a run that is resumed, are dropped.

    Raises:
        OutputError: the file cannot be written, or that of the resumed run cannot be read.
    """

    def __init__(self, directory: Path, first_epoch: int) -> None:
        self.path = directory / PARTIAL / SCALARS
        self._file: TextIO | None = None
        self._names = ["epoch"]
        self._rows: list[dict[str, str]] = []
        if first_epoch:
            earlier = self.path if os.path.exists(self.path) else directory / SCALARS  # of a finished run
            self._read(earlier, first_epoch)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._write_all()

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Appends a row; rewrites the file if there is a new scalar."""
        row = {"epoch": str(step), **{name: repr(float(value)) for name, value in values.items()}}
        self._rows.append(row)
        new = [name for name in row if name not in self._names]
        self._names += new
        if new or self._file is None:
            self._write_all()
            return
        try:
            self._file.write(self._text([row]))
            self._file.flush()
        except OSError as error:
            raise self._failed(error) from None

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _read(self, path: Path, last_epoch: int) -> None:
        try:
            with open(path, newline="", encoding="utf-8") as file:
                text = file.read()
            reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]), restval="")  # without half a line
            rows = list(reader)
            epochs = [int(row["epoch"]) for row in rows]
            if epochs != sorted(set(epochs)) or any(None in row for row in rows):
                raise ValueError
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, csv.Error):
            raise OutputError(
                f"{path}: is not a table of epochs that can be continued; move it away, or logging.csv=false"
            ) from None
        self._names = list(reader.fieldnames or self._names)
        self._rows = [row for row, epoch in zip(rows, epochs, strict=True) if epoch <= last_epoch]

    def _write_all(self) -> None:
        self.close()
        write_text(self.path, self._text([{name: name for name in self._names}, *self._rows]))
        try:
            self._file = open(self.path, "a", newline="", encoding="utf-8")  # noqa: SIM115 - open during the run
        except OSError as error:
            raise self._failed(error) from None

    def _text(self, rows: list[dict[str, str]]) -> str:
        text = io.StringIO()
        csv.DictWriter(text, self._names, restval="", extrasaction="ignore", lineterminator="\n").writerows(rows)
        return text.getvalue()

    def _failed(self, error: OSError) -> OutputError:
        return OutputError(f"{self.path}: cannot be written: {error.strerror}; logging.csv=false disables it")
