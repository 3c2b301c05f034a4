"""Outlier rows whose error or code is not finite: detection, and exclusion from metrics."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from spinlock_fast.data.host_rows import HostRows, Rows, row_blocks
from spinlock_fast.distributed import SINGLE, Ranks
from spinlock_fast.models.vqvae import CategoricalHierarchicalVQVAE

log = logging.getLogger(__name__)

MAX_MAGNITUDE = 1e9  # of a feature; fourth powers of larger values overflow float32 in correlations of distances
_LISTED_ROWS = 5  # in a message


def has_unusable_values(reconstruction_error: float, metrics: Iterable[float], shape: Sequence[int]) -> bool:
    """Whether a metric of rows [N, F] is not finite, or the error implies a feature beyond `MAX_MAGNITUDE`."""
    total = reconstruction_error * shape[0] * shape[1]
    return total > MAX_MAGNITUDE**2 / 4 or not all(map(math.isfinite, metrics))


@torch.no_grad()
def measurable_rows(model: CategoricalHierarchicalVQVAE, x: Rows) -> NDArray[np.bool_]:
    """Mask [N] of rows with a code in every codebook, a finite error, and features of at most `MAX_MAGNITUDE`."""
    if not x.shape[0]:
        return np.zeros(0, np.bool_)
    was_training = model.training
    model.eval()
    masks = []
    for rows in row_blocks(x):
        out = model(rows)
        error = (out["reconstruction"] - rows).square().sum(1)
        masks.append((out["tokens"] >= 0).all(1) & error.isfinite() & (rows.abs().amax(1) <= MAX_MAGNITUDE))
    model.train(was_training)
    measurable: NDArray[np.bool_] = torch.cat(masks).cpu().numpy()
    return measurable


def masked_rows(x: Rows, mask: NDArray[np.bool_]) -> Rows:
    """The rows of x selected by a mask [N], on the same device or in host memory."""
    selected = np.flatnonzero(mask)
    if isinstance(x, HostRows):
        return HostRows(x.rows.select(selected), x.device)
    return x[torch.from_numpy(selected).to(x.device)]


def without_outliers(
    model: CategoricalHierarchicalVQVAE,
    x: Rows,
    numbers: NDArray[np.int64] | None,
    what: str,
    ranks: Ranks = SINGLE,
) -> tuple[Rows, NDArray[np.int64], list[int]]:
    """Removes rows without a finite error or code, and logs a warning that lists them.

    All rows are kept if none of them is measurable.

    Args:
        model: computes errors and codes.
        x: [N, F] rows.
        numbers: [N] numbers of the rows in the data; 0 .. N - 1 if not given.
        what: kind of the rows, for the warning.
        ranks: if there are several, x and numbers are the rows of this rank; all of them call this.

    Returns:
        The remaining rows, their numbers, and the numbers of the removed rows of all ranks.
    """
    if numbers is None:
        first = sum(ranks.gather_objects(x.shape[0])[: ranks.rank])
        numbers = np.arange(first, first + x.shape[0])
    keep = measurable_rows(model, x)
    parts = ranks.gather_objects((numbers[~keep].tolist(), bool(keep.any())))
    left_out = [number for removed, _ in parts for number in removed]
    if not left_out or not any(some_kept for _, some_kept in parts):
        return x, numbers, []
    more = f" and {len(left_out) - _LISTED_ROWS} more" if len(left_out) > _LISTED_ROWS else ""
    log.warning(
        "%s row%s %s%s: the features are too large for a finite error or code; left out of the metrics",
        what,
        "" if len(left_out) == 1 else "s",
        ", ".join(map(str, left_out[:_LISTED_ROWS])),
        more,
    )
    return masked_rows(x, keep), numbers[keep], left_out


def largest_magnitude(x: Rows) -> tuple[int, float]:
    """The row number of the largest absolute value, and that value."""
    row, largest, start = 0, -1.0, 0
    for rows in row_blocks(x):
        magnitudes = rows.abs().amax(1)
        i = int(magnitudes.argmax())
        if float(magnitudes[i]) > largest:
            row, largest = start + i, float(magnitudes[i])
        start += rows.shape[0]
    return row, largest
