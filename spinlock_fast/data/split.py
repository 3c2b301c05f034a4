"""Split of the rows into training, validation and test rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from spinlock_fast.config.random_streams import Stream, generator
from spinlock_fast.config.schema import TrainingConfig
from spinlock_fast.errors import DataError


@dataclass
class Split:
    """Ascending row numbers of the training, validation and test rows."""

    train: np.ndarray[Any, np.dtype[np.int64]]
    val: np.ndarray[Any, np.dtype[np.int64]]
    test: np.ndarray[Any, np.dtype[np.int64]]


def split_rows(rows: int, config: TrainingConfig, seed: int, val_rows: ArrayLike | None = None) -> Split:
    """Splits rows at random; the split depends only on the arguments.

    Args:
        rows: number of rows.
        config: provides val_fraction and test_fraction.
        seed: seed of the permutation.
        val_rows: validation rows; drawn at random by default.

    Raises:
        DataError: no training rows are left, or `val_rows` are not distinct rows.
    """
    if rows < 2:
        raise DataError(f"the data have {rows} row{'' if rows == 1 else 's'}: training and validation need at least 2")
    order = generator(seed, Stream.SPLIT).permutation(rows)
    if val_rows is None:
        val = order[: max(1, round(rows * config.val_fraction))]
        order = order[len(val) :]
    else:
        val = np.unique(np.asarray(val_rows, dtype=np.int64))
        if val.size != np.size(val_rows) or val.size == 0 or val[0] < 0 or val[-1] >= rows:
            raise DataError(f"val_rows must be distinct rows in 0..{rows - 1}")
        order = order[~np.isin(order, val)]
    test_size = max(1, round(rows * config.test_fraction)) if config.test_fraction > 0 else 0
    if order.size <= test_size:
        raise DataError(f"{rows} rows leave none for training after {val.size} for validation and {test_size} for test")
    return Split(np.sort(order[test_size:]), np.sort(val), np.sort(order[:test_size]))
