"""Order of the training rows of an epoch, also for a matrix on disk that is larger than memory."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from spinlock_fast.config.random_streams import Stream, generator
from spinlock_fast.data.row_order import RowOrder

_UNIT_BYTES = 1 << 20  # rows that are neighbours in the file and read in sequence
_AUTO_BYTES = 1 << 33
_WINDOW_BYTES = 1 << 28  # rows among which the order is random


def windowed_order(rows: int, columns: int, seed: int, epoch: int) -> Tensor:
    """Permutation [rows] of the rows of a float32 matrix [rows, columns] that needs 256 MiB of its file at a time.

    Blocks of 1 MiB are permuted, then the rows within each window of 256 consecutive blocks, so that the batches of a
    window take their rows from 256 random places of the file. Determined by the arguments alone.
    """
    unit = max(1, _UNIT_BYTES // (4 * columns))
    window = max(unit, _WINDOW_BYTES // (4 * columns))
    key = int(generator(seed, Stream.ROW_ORDER, epoch).integers(2**63))
    order = RowOrder((rows,), unit, window, batch_size=1, shuffle=True, seed=key)
    return torch.from_numpy(np.concatenate([numbers for _, numbers in order.windows(epoch)]))


def training_order(
    rows: int, columns: int, seed: int, epoch: int, method: Literal["auto", "shuffled", "windows"] = "auto"
) -> Tensor:
    """Permutation [rows] of the training rows, by the arguments alone: not by memory, device or number of ranks.

    Args:
        rows, columns: shape of the float32 matrix.
        seed, epoch: determine the permutation.
        method: "shuffled" permutes all rows; "windows" see `windowed_order`; "auto" is "windows" from 8 GiB on.
    """
    if method == "windows" or (method == "auto" and 4 * rows * columns >= _AUTO_BYTES):
        return windowed_order(rows, columns, seed, epoch)
    return torch.from_numpy(generator(seed, Stream.ROW_ORDER, epoch).permutation(rows))
