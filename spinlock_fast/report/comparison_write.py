"""Writes the picture and the page of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from spinlock_fast.errors import SpinlockFastError
from spinlock_fast.output.atomic_files import check_writable, write_text


def write_comparison(
    checkpoints: Sequence[str | Path],
    output: str | Path,
    data: str | Path | list[str] | None = None,
    device: str = "auto",
) -> tuple[list[Path], list[str]]:
    """Writes comparison.png, comparison.svg and comparison.md of two to eight checkpoint directories.

    Args:
        checkpoints: directories; categories and codebooks of the others are matched to those of the first one.
        output: directory, created where it does not exist.
        data: HDF5 file, glob or list. If given, all metrics are measured on all of its rows, and the tokens of these
            rows are compared; else metrics are those of metrics.json.
        device: auto, cpu, cuda or cuda:N, for encoding the data.

    Returns:
        The files, and a line for each omitted part.

    Raises:
        ConfigError: the device is not available, too few or too many checkpoints, or one of them twice.
        DataError: a checkpoint or `data` cannot be used.
        OutputError: a file cannot be written.
        SpinlockFastError: matplotlib is not installed.
    """
    try:
        from spinlock_fast.plot_style import figure_style
    except ImportError as error:
        raise SpinlockFastError(f"{error.name} is not installed: pip install 'spinlock-fast[report]'") from None
    from spinlock_fast.device import resolve_device
    from spinlock_fast.output.locks import locked_output_directory
    from spinlock_fast.report.analysis_page import markdown
    from spinlock_fast.report.comparison import compare_runs
    from spinlock_fast.report.comparison_figure import draw_comparison
    from spinlock_fast.report.comparison_page import comparison_blocks
    from spinlock_fast.report.write import save_both

    check_writable(Path(output))
    comparison = compare_runs(checkpoints, data, resolve_device(device))
    with figure_style():
        figure = draw_comparison(comparison)
    page = Path(output) / "comparison.md"
    with locked_output_directory(Path(output)):
        files = save_both(figure, Path(output) / "comparison")
        write_text(page, markdown(comparison_blocks(comparison, checkpoints), "comparison.png"))
    return [*files, page], comparison.notes
