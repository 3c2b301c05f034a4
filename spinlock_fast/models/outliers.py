"""Rows so far out that nothing finite can be said of them: found, named and left out of what is measured."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from spinlock_fast.data.host_rows import HostRows, Rows, row_blocks
from spinlock_fast.models.vqvae import CategoricalHierarchicalVQVAE

log = logging.getLogger(__name__)

LARGEST = 1e9  # of a feature: fourth powers of larger values, as in correlations of distances, overflow in float32
_NAMED = 5  # rows that a message names


def spoiled(reconstruction_error: float, figures: Iterable[float], shape: Sequence[int]) -> bool:
    """Whether figures of rows [N, F] are not finite, or the error is that of a feature beyond `LARGEST`."""
    total = reconstruction_error * shape[0] * shape[1]
    return total > LARGEST**2 / 4 or not all(map(math.isfinite, figures))


@torch.no_grad()
def measurable_rows(model: CategoricalHierarchicalVQVAE, x: Rows) -> NDArray[np.bool_]:
    """Which rows [N] have a code in every codebook, a finite error, and features of at most `LARGEST`."""
    was_training = model.training
    model.eval()
    found = []
    for rows in row_blocks(x):
        out = model(rows)
        error = (out["reconstruction"] - rows).square().sum(1)
        found.append((out["tokens"] >= 0).all(1) & error.isfinite() & (rows.abs().amax(1) <= LARGEST))
    model.train(was_training)
    measurable: NDArray[np.bool_] = torch.cat(found).cpu().numpy()
    return measurable


def some_rows(x: Rows, keep: NDArray[np.bool_]) -> Rows:
    """The rows that a mask [N] chooses, where the others lie."""
    places = np.flatnonzero(keep)
    if isinstance(x, HostRows):
        return HostRows(x.rows.select(places), x.device)
    return x[torch.from_numpy(places).to(x.device)]


def without_outliers(
    model: CategoricalHierarchicalVQVAE, x: Rows, numbers: NDArray[np.int64] | None, what: str
) -> tuple[Rows, NDArray[np.int64], list[int]]:
    """The measurable rows, their numbers, and the numbers of the others, which a warning names.

    Args:
        model: by which rows are judged.
        x: [N, F] rows.
        numbers: [N] of the rows in the data; 0 .. N - 1 when not given.
        what: names the rows in the warning.
    """
    numbers = np.arange(x.shape[0]) if numbers is None else numbers
    keep = measurable_rows(model, x)
    if keep.all() or not keep.any():
        return x, numbers, []
    left_out = [int(number) for number in numbers[~keep]]
    more = f" and {len(left_out) - _NAMED} more" if len(left_out) > _NAMED else ""
    log.warning(
        "%s row%s %s%s: the features are too large for a finite error or code; left out of the metrics",
        what,
        "" if len(left_out) == 1 else "s",
        ", ".join(map(str, left_out[:_NAMED])),
        more,
    )
    return some_rows(x, keep), numbers[keep], left_out


def largest_value(x: Rows) -> tuple[int, float]:
    """The row of the largest absolute value, and that value."""
    row, largest, start = 0, -1.0, 0
    for rows in row_blocks(x):
        each = rows.abs().amax(1)
        place = int(each.argmax())
        if float(each[place]) > largest:
            row, largest = start + place, float(each[place])
        start += rows.shape[0]
    return row, largest
