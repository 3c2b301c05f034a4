"""Draws the dashboards of a checkpoint directory and writes them as PNG and SVG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from spinlock_fast.errors import ConfigError, DataError, SpinlockFastError
from spinlock_fast.messages import shown
from spinlock_fast.output.atomic_files import check_writable, write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from spinlock_fast.report.checkpoint_summary import CheckpointSummary
    from spinlock_fast.report.data_statistics import DataStatistics

KINDS = ("engineering", "topological", "semantic")


def write_report(
    checkpoint: str | Path,
    output: str | Path,
    data: str | Path | list[str] | None = None,
    kinds: Sequence[str] = KINDS,
    device: str = "auto",
    conditions: Sequence[str] = (),
) -> tuple[list[Path], list[str]]:
    """Writes <kind>.png and <kind>.svg of a checkpoint directory.

    Args:
        checkpoint: directory written by `spinlock_fast.train` or `convert`; metrics.json, training_history.json and
            config.yaml may be missing.
        output: directory, created where it does not exist.
        data: HDF5 file, glob or list; by default the data of the run, where they still exist.
        kinds: dashboards to draw: engineering, topological, semantic.
        device: auto, cpu, cuda or cuda:N, for encoding the data.
        conditions: further conditions of the semantic dashboard, see `add_named_conditions`.

    Returns:
        The files, and a line for each omitted part.

    Raises:
        ConfigError: an unknown kind, a device that is not available, or conditions that none of `kinds` shows.
        DataError: the checkpoint, `data` or a condition cannot be used.
        OutputError: a file cannot be written.
        SpinlockFastError: matplotlib or scikit-learn is not installed.
    """
    from spinlock_fast.output.locks import locked_output_directory

    figures, notes = draw_reports(checkpoint, data, kinds, device, conditions, Path(output))
    with locked_output_directory(Path(output)):
        return [path for kind, figure in figures for path in save_both(figure, Path(output) / kind)], notes


def draw_reports(
    checkpoint: str | Path,
    data: str | Path | list[str] | None,
    kinds: Sequence[str],
    device: str,
    conditions: Sequence[str] = (),
    output: Path | None = None,
) -> tuple[list[tuple[str, Figure]], list[str]]:
    """The figures of `write_report` with their kinds, and its notes; `output` is checked before data are read."""
    try:
        import matplotlib  # noqa: F401 - fails early
        import sklearn  # noqa: F401
    except ImportError as error:
        raise SpinlockFastError(f"{error.name} is not installed: pip install 'spinlock-fast[report]'") from None
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise ConfigError(f"kinds: expected some of {', '.join(KINDS)}, got {shown(unknown[0])}")
    if conditions and "semantic" not in kinds:
        raise ConfigError("--conditions: shown by the types semantic, html and all only")
    from spinlock_fast.device import resolve_device
    from spinlock_fast.plot_style import figure_style
    from spinlock_fast.report.checkpoint_summary import read_checkpoint_summary

    summary = read_checkpoint_summary(checkpoint, resolve_device(device))
    if output is not None:
        check_writable(output)
    statistics = _measure_run_data(summary, data, kinds, conditions)
    if "quality" not in summary.metrics:
        summary.notes.append("no measured metrics and no data: measured figures are omitted")
    with figure_style():
        return [(kind, draw(kind, summary, statistics)) for kind in kinds], summary.notes


def _measure_run_data(
    summary: CheckpointSummary, data: str | Path | list[str] | None, kinds: Sequence[str], conditions: Sequence[str]
) -> DataStatistics | None:
    from spinlock_fast.report.data_statistics import measure_data

    if data is not None:
        return measure_data(summary, data, conditions)
    if set(kinds) == {"engineering"} and "quality" in summary.metrics:
        return None  # no panel of it needs data
    omitted = "panels that need data are omitted (--data)"
    if summary.config is None or summary.config.dataset_path is None:
        if conditions:
            raise DataError("--conditions: the data of the run are unknown: name them with --data")
        summary.notes.append(f"the data of the run are unknown: {omitted}")
        return None
    try:
        return measure_data(summary, summary.config.dataset_path, conditions)
    except DataError as error:
        if conditions:
            raise
        summary.notes.append(f"{error}: {omitted}")
        return None


def draw(kind: str, summary: CheckpointSummary, statistics: DataStatistics | None) -> Figure:
    """Draws one dashboard; without statistics, panels that need data are omitted."""
    from spinlock_fast.report.engineering_figure import draw_engineering
    from spinlock_fast.report.semantic_figure import draw_semantic
    from spinlock_fast.report.topological_figure import draw_topological

    if kind == "engineering":
        return draw_engineering(summary)
    return (draw_topological if kind == "topological" else draw_semantic)(summary, statistics)


def save_both(figure: Figure, stem: Path) -> list[Path]:
    """Writes stem.png and stem.svg; raises OutputError."""
    from spinlock_fast.plot_style import METADATA, save_figure

    paths = []
    for suffix in METADATA:
        path = stem.with_name(stem.name + suffix)
        write_atomically(path, lambda temporary: save_figure(figure, temporary))
        paths.append(path)
    return paths
