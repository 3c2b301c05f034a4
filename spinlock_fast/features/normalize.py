"""Normalisation of features by centre and scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from spinlock_fast.config.schema import TrainingConfig
from spinlock_fast.data.payload_checks import checked_array, checked_finite
from spinlock_fast.distributed import SINGLE, Ranks
from spinlock_fast.errors import DataError
from spinlock_fast.features.blocks import Blocks, Matrix
from spinlock_fast.features.statistics import center_and_scale
from spinlock_fast.messages import shown

_ROWS_AT_ONCE = 8192


@dataclass(frozen=True)
class Normalizer:
    """(x - center) / scale per feature [F]."""

    method: Literal["standard", "mad"]
    center: NDArray[np.float64]
    scale: NDArray[np.float64]

    def __call__(self, x: Matrix) -> NDArray[np.float32]:
        result = np.empty(x.shape, dtype=np.float32)
        with np.errstate(over="ignore"):  # callers report Inf with its row
            for start in range(0, len(x), _ROWS_AT_ONCE):
                rows = slice(start, start + _ROWS_AT_ONCE)
                result[rows] = (x[rows] - self.center) / self.scale
        return result

    def inverse(self, x: Matrix) -> NDArray[np.float32]:
        """Normalised features -> features in their units."""
        result: NDArray[np.float32] = (x * self.scale + self.center).astype(np.float32)
        return result

    def by_category(self, groups: Mapping[str, list[int]]) -> dict[str, NDArray[Any]]:
        """Arrays of normalization_stats.npz.

        <category>_mean and <category>_std, or <category>_median and <category>_mad (the divisor:
        1.4826 MAD, or the standard deviation where MAD = 0), and _normalization_method.
        """
        center, scale = ("mean", "std") if self.method == "standard" else ("median", "mad")
        arrays: dict[str, NDArray[Any]] = {}
        for name, members in groups.items():
            arrays[f"{name}_{center}"] = self.center[members].astype(np.float32)
            arrays[f"{name}_{scale}"] = self.scale[members].astype(np.float32)
        arrays["_normalization_method"] = np.array([self.method])
        return arrays

    def state(self) -> dict[str, Any]:
        """State for `from_state`: tensors and plain values."""
        return {
            "method": self.method,
            "center": torch.from_numpy(self.center),
            "scale": torch.from_numpy(self.scale),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], features: int | None = None) -> Normalizer:
        """The normaliser with a saved state, of the given number of features (None: any); raises DataError."""
        if state["method"] not in ("standard", "mad"):
            raise DataError(f"method must be standard or mad, got {shown(state['method'])}")
        center, scale = (
            checked_finite(checked_array(state[name], name, "f", [features]), name) for name in ("center", "scale")
        )
        if not (scale > 0).all():
            raise DataError("scale must be positive")
        return cls(state["method"], center, scale)


def fit_normalizer(x: Blocks, method: Literal["standard", "mad"], ranks: Ranks = SINGLE) -> Normalizer:
    """Centre and scale of the columns of x [N, F], which is read block by block; a constant column gets scale 1."""
    center, scale = center_and_scale(x, method, ranks)
    return Normalizer(method, center.astype(np.float64), np.where(scale > 0, scale, 1.0))


def units(training: TrainingConfig) -> str:
    """Unit of normalised features and of their reconstruction error, as text."""
    return {
        "standard": "standard deviations of the training rows",
        "mad": "robust deviations (1.4826 MAD) of the training rows",
    }[training.normalization_method]
