"""The inputs of training, decoded once."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from spinlock_fast.errors import OutputError
from spinlock_fast.prediction.inputs import Batch, Inputs


class CachedInputs:
    """Rows of inputs in any order: theta in memory, initial fields as float32 in a memory-mapped temporary file.

    The file has no name, so it disappears with the process. Other passes than the first one read it from the page
    cache, without decoding.

    Args:
        inputs: read once.
        directory: where the temporary file is, on the disk of the output.

    Raises:
        DataError: see `Inputs`.
        OutputError: the disk is full.
    """

    def __init__(self, inputs: Inputs, directory: Path) -> None:
        self.rows, self.shape, self.names = inputs.rows, inputs.shape, inputs.names
        self._batch_size = inputs.config.batch_size
        theta, row_shape = [], None
        try:
            with tempfile.TemporaryFile(dir=directory) as file:
                for batch in inputs.batches():
                    theta.append(batch.theta)
                    if batch.field is not None:
                        row_shape = tuple(batch.field.shape[1:])
                        file.write(batch.field.contiguous().numpy().data)
                file.flush()
                self._fields = None
                if row_shape is not None:
                    self._fields = np.memmap(file, np.float32, "r", shape=(self.rows, *row_shape))
        except OSError as error:
            raise OutputError(f"{directory}: cannot keep the initial fields there: {error.strerror}") from None
        self._theta = torch.cat(theta)

    def batches(self, chosen: NDArray[np.bool_]) -> Iterator[Batch]:
        """The chosen [N] rows in order."""
        return self._of(np.flatnonzero(chosen))

    def shuffled(self, chosen: NDArray[np.bool_], seed: int, epoch: int) -> Iterator[Batch]:
        """The chosen [N] rows in the order of an epoch."""
        order = np.random.default_rng(np.random.SeedSequence([seed, epoch]))
        return self._of(order.permutation(np.flatnonzero(chosen)))

    def _of(self, rows: NDArray[np.int64]) -> Iterator[Batch]:
        for start in range(0, len(rows), self._batch_size):
            index = rows[start : start + self._batch_size]
            field = None if self._fields is None else torch.from_numpy(self._fields[index])
            places = torch.from_numpy(index)
            yield Batch(places, self._theta[places], field)
