"""The dashboards of a checkpoint directory, drawn and written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from spinlock_fast.errors import DataError, SpinlockFastError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from spinlock_fast.report.contents import Contents
    from spinlock_fast.report.sample import Sample

KINDS = ("engineering", "topological", "semantic")


def write_report(
    checkpoint: str | Path,
    output: str | Path,
    data: str | list[str] | None = None,
    kinds: Sequence[str] = KINDS,
    device: str = "auto",
) -> tuple[list[Path], list[str]]:
    """Writes <kind>.png and <kind>.svg of a checkpoint directory.

    Args:
        checkpoint: what `spinlock_fast.train` or `convert` wrote; metrics.json, training_history.json and
            config.yaml may be missing.
        output: directory, made if need be.
        data: HDF5 file, glob or list; when not given, the data of the run where they are still there.
        kinds: which dashboards.
        device: auto, cpu, cuda or cuda:N; encodes the data.

    Returns:
        The files, and a line for each thing that is left out.

    Raises:
        ConfigError: the device is not there.
        DataError: the checkpoint or `data` cannot serve.
        OutputError: a file cannot be written.
        SpinlockFastError: matplotlib or scikit-learn is not installed.
    """
    try:
        import matplotlib.style
        import sklearn  # noqa: F401 - here, to fail before the work
    except ImportError as error:
        raise SpinlockFastError(f"{error.name} is not installed: pip install 'spinlock-fast[report]'") from None
    from spinlock_fast.device import resolve_device
    from spinlock_fast.output.atomic_files import check_writable
    from spinlock_fast.output.locks import directory_written_by_one
    from spinlock_fast.report.contents import read_contents
    from spinlock_fast.report.save import save_figure
    from spinlock_fast.report.style import RC

    contents = read_contents(checkpoint, resolve_device(device))
    check_writable(Path(output))
    sample = _read_sample(contents, data, kinds)
    if "quality" not in contents.metrics:
        contents.notes.append("no measured metrics and no data: figures of quality are left out")
    files = []
    with directory_written_by_one(Path(output)), matplotlib.style.context(["default", RC]):
        for kind in kinds:
            files += save_figure(draw(kind, contents, sample), Path(output) / kind)
    return files, contents.notes


def _read_sample(contents: Contents, data: str | list[str] | None, kinds: Sequence[str]) -> Sample | None:
    from spinlock_fast.report.sample import measure_sample

    if data is not None:
        return measure_sample(contents, data)
    if set(kinds) == {"engineering"} and "quality" in contents.metrics:
        return None  # it draws nothing that needs data
    left_out = "panels that need data are left out (--data)"
    if contents.config is None or contents.config.dataset_path is None:
        contents.notes.append(f"the data of the run are not known: {left_out}")
        return None
    try:
        return measure_sample(contents, contents.config.dataset_path)
    except DataError as error:
        contents.notes.append(f"{error}: {left_out}")
        return None


def draw(kind: str, contents: Contents, sample: Sample | None) -> Figure:
    if kind == "engineering":
        from spinlock_fast.report.engineering import draw_engineering

        return draw_engineering(contents)
    if kind == "topological":
        from spinlock_fast.report.topological import draw_topological

        return draw_topological(contents, sample)
    from spinlock_fast.report.semantic import draw_semantic

    return draw_semantic(contents, sample)
