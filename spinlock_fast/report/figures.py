"""The dashboards as matplotlib figures."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from spinlock_fast.report.write import draw_reports

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)


def engineering(checkpoint: str | Path, data: str | Path | list[str] | None = None, *, device: str = "auto") -> Figure:
    """Draws sizes of the model, training curves, and the quality of each category.

    The figure is that of `report --type engineering`, 11.7 inches wide. It can be changed and saved like any figure of
    matplotlib; it is not registered with pyplot, so nothing has to be closed.

    Args:
        checkpoint: directory written by `spinlock_fast.train` or `convert`.
        data: HDF5 file, glob or list; by default the data of the run, where they still exist. They are read only if
            the checkpoint has no metrics.json.
        device: auto, cpu, cuda or cuda:N, for encoding the data.

    Returns:
        The figure, with fixed positions of all axes. A logged line names each panel that is omitted.

    Raises:
        ConfigError: the device is not available.
        DataError: the checkpoint or `data` cannot be used.
        SpinlockFastError: matplotlib or scikit-learn is not installed.
    """
    return _figure("engineering", checkpoint, data, (), device)


def topological(checkpoint: str | Path, data: str | Path | list[str] | None = None, *, device: str = "auto") -> Figure:
    """Draws the codes and codebooks in feature space, t-SNE of the code vectors, and tables by level.

    Args, returns and raises: as `engineering`. Without data, the panels in feature space are omitted.
    """
    return _figure("topological", checkpoint, data, (), device)


def semantic(
    checkpoint: str | Path,
    data: str | Path | list[str] | None = None,
    *,
    conditions: Sequence[str] = (),
    device: str = "auto",
) -> Figure:
    """Draws the categories with their strongest members, and what their tokens tell about conditions.

    Args:
        conditions: further conditions: paths of datasets [N] or [N, k] of the data, or "FILE.csv:COLUMN", see
            docs/tokens.md.

    Others, returns and raises: as `engineering`. Without data, associations and correlations are omitted.
    """
    return _figure("semantic", checkpoint, data, conditions, device)


def _figure(
    kind: str, checkpoint: str | Path, data: str | Path | list[str] | None, conditions: Sequence[str], device: str
) -> Figure:
    ((_, figure),), notes = draw_reports(checkpoint, data, (kind,), device, conditions)
    for note in notes:
        log.warning("%s", note)
    return figure
