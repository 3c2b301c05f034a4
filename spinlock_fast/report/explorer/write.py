"""Encodes a data file with a checkpoint and writes its explorer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spinlock_fast.analysis.named_conditions import add_named_conditions
from spinlock_fast.analysis.observations import collect_observations
from spinlock_fast.data.feature_source import FeatureSource
from spinlock_fast.device import resolve_device
from spinlock_fast.errors import ConfigError, DataError
from spinlock_fast.messages import printable
from spinlock_fast.output.atomic_files import check_writable, write_text
from spinlock_fast.output.locks import locked_output_directory
from spinlock_fast.report.checkpoint_summary import CheckpointSummary, read_checkpoint_summary
from spinlock_fast.report.explorer.data import MIN_ROWS, ExplorerData, explorer_data
from spinlock_fast.report.explorer.fields import pictures_of_datasets, pictures_of_trajectories
from spinlock_fast.report.explorer.page_size import FILE, fitting_page
from spinlock_fast.report.explorer.series import time_series
from spinlock_fast.trajectories.samples import TrajectorySet

_MEMORY_BUDGET = 1_250_000_000  # bytes of raw values held at a time


def write_explorer(
    checkpoint: str | Path,
    output: str | Path,
    data: str | Path | list[str] | None = None,
    rows: int = 100_000,
    device: str = "auto",
    conditions: Sequence[str] = (),
    trajectories: TrajectorySet | None = None,
) -> Path:
    """Writes explorer.html, one page that works without a network.

    Args:
        checkpoint: directory written by `spinlock_fast.train` or `convert`.
        output: directory, created where it does not exist.
        data: HDF5 file, glob or list; by default the data of the run.
        rows: maximum number of rows; evenly spaced rows are taken from larger data.
        device: auto, cpu, cuda or cuda:N, for encoding the data.
        conditions: further conditions, see `add_named_conditions`.
        trajectories: those that `extract` read, a sample for each row of the data; their states are shown as small
            pictures. Without them, the initial and last fields in the data are.

    Returns:
        The file. Notes on omitted parts are on the page.

    Raises:
        ConfigError: `rows` is less than 20, or the device is not available.
        DataError: the checkpoint or the data cannot be used, no data are known, or the page would exceed 20 MB even
            with fewer pictures, series and ranks.
        OutputError: the file cannot be written.
    """
    if rows < MIN_ROWS:
        raise ConfigError(f"--rows: the explorer needs at least {MIN_ROWS} rows, got {rows}")
    summary = read_checkpoint_summary(checkpoint, resolve_device(device))
    check_writable(Path(output))
    data = data if data is not None else _data_of_the_run(summary)
    observed = collect_observations(summary.tokenizer, data, rows, _MEMORY_BUDGET)
    assert observed is not None  # without other ranks
    with summary.tokenizer.source(data) as source:
        add_named_conditions(observed, source, conditions)
        contents = explorer_data(observed, _about(summary, data))
        _add_pictures(contents, source, trajectories, observed.rows)
        series = time_series(source, observed, contents.examples())
        if series is not None:
            contents.add_series(series)
    page = fitting_page(contents, f"Tokens of {printable(summary.name)}")
    path = Path(output) / FILE
    with locked_output_directory(Path(output)):
        write_text(path, page)
    return path


def _add_pictures(
    contents: ExplorerData, source: FeatureSource, trajectories: TrajectorySet | None, rows: NDArray[np.int64]
) -> None:
    """Adds pictures of trajectories, or of fields in the data; a note on the page if the latter cannot be used."""
    examples = contents.examples()
    if trajectories is not None:
        contents.add_pictures(pictures_of_trajectories(trajectories, source.rows, rows, examples))
        return
    try:
        pictures = pictures_of_datasets(source, rows, examples)
    except DataError as error:
        contents.header["notes"].append(printable(f"fields are not shown: {error}"))
        return
    if pictures is not None:
        contents.add_pictures(pictures)


def _data_of_the_run(summary: CheckpointSummary) -> str | list[str]:
    if summary.config is None or summary.config.dataset_path is None:
        raise DataError("the data of the run are unknown: name them with --data")
    return summary.config.dataset_path


def _about(summary: CheckpointSummary, data: str | Path | list[str]) -> dict[str, Any]:
    metrics = summary.metrics
    return {
        "checkpoint": printable(summary.name),
        "sha256": summary.tokenizer.checkpoint_hash,
        "data": printable(Path(data).name) if isinstance(data, (str, Path)) else f"{len(data)} files",
        "quality": metrics.get("quality"),
        "measured_on": summary.measured_on if metrics else "",
    }
