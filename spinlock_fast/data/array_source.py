"""Families of raw features in memory, with the interface of `FeatureSource`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spinlock_fast.data.feature_source import DatasetInfo, FeatureSource, as_float32
from spinlock_fast.data.input_arrays import to_real_tensor
from spinlock_fast.errors import DataError


class ArraySource(FeatureSource):
    """Arrays [N, D] or [N, T, D] by family name.

    Args:
        arrays: numpy arrays or torch tensors, all with N rows.
        datasets: path of each family in HDF5 files of the same layout, for `Tokenizer.encode` of files.
        names: [D] names of the columns of some families.

    Raises:
        DataError: an array has another number of dimensions or of rows, or holds no real numbers.
    """

    def __init__(self, arrays: Mapping[str, Any], datasets: Mapping[str, str], names: Mapping[str, list[str]]) -> None:
        if not arrays:
            raise DataError("no families: expected {name: array [N, D] or [N, T, D]}")
        self.files: list[Path] = []
        self.allow_external = True
        self._iterators = []
        self._names = names
        self._arrays = {name: to_real_tensor(array, f"family {name!r}").cpu() for name, array in arrays.items()}
        for name, array in self._arrays.items():
            if array.ndim not in (2, 3) or 0 in array.shape:
                raise DataError(f"family {name!r}: expected [N, D] or [N, T, D] values, got {list(array.shape)}")
        lengths = {name: len(array) for name, array in self._arrays.items()}
        if len(set(lengths.values())) > 1:
            raise DataError(
                "families differ in rows: " + ", ".join(f"{name} has {rows}" for name, rows in lengths.items())
            )
        self._rows = next(iter(lengths.values()))
        self.datasets = {
            name: DatasetInfo(datasets[name], self._rows, tuple(array.shape[1:]), 1, array.element_size())
            for name, array in self._arrays.items()
        }

    @property
    def rows(self) -> int:
        return self._rows

    def read_rows(self, family: str, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Rows of a family in the given order as float32."""
        chosen = self._arrays[family][torch.from_numpy(rows)]
        return as_float32(chosen, lambda i: self.row_location(family, int(rows[i]))).numpy()

    def batches(
        self,
        families: Sequence[str],
        rows: int,
        memory_budget: int,
        device: torch.device,
        part: slice | None = None,
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Iterates over the rows in order; see `FeatureSource.batches`."""
        for start in range(0, self._rows, rows)[part or slice(None)]:
            block = {family: self._arrays[family][start : start + rows].to(device) for family in families}
            yield start, {family: as_float32(x, self.row_locator(family, start)) for family, x in block.items()}

    def row_location(self, family: str, row: int) -> str:
        """Family and row number, for messages."""
        return f"family {family!r}: row {row}"

    def feature_names(self, family: str) -> list[str] | None:
        """Column names of a family of vectors."""
        return self._checked_names(family, vectors=True)

    def series_names(self, family: str) -> list[str] | None:
        """Column names of a family of time series."""
        return self._checked_names(family, vectors=False)

    def _checked_names(self, family: str, vectors: bool) -> list[str] | None:
        row_shape, names = self.datasets[family].row_shape, self._names.get(family)
        if names is None or (len(row_shape) == 1) is not vectors:
            return None
        if len(names) != row_shape[-1]:
            raise DataError(f"family {family!r}: {len(names)} names for {row_shape[-1]} columns")
        return names
