"""Compares rows with the training rows of a tokenizer: the same, similar, or out of distribution."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spinlock_fast.data.payload_checks import checked_array
from spinlock_fast.data.row_view import RowView
from spinlock_fast.distributed import Ranks
from spinlock_fast.models.vqvae import CategoricalHierarchicalVQVAE

log = logging.getLogger(__name__)

Floats = NDArray[np.floating]

TRAIN, VALIDATION, TEST, UNKNOWN = range(4)

# A mean is out of distribution if it exceeds that of the run by this factor and by this many standard errors. Rows are
# heavy-tailed: the mean of few rows is often several standard errors away.
_MEAN_FACTOR = 2.0
_STANDARD_ERRORS = 8.0
_SAMPLED_ROWS = 2048  # rows whose reconstruction error is measured


@dataclass(frozen=True)
class KnownRows:
    """The rows of a run's data set and the split of each.

    Args:
        keys: [N] keys of the rows, in order; see `row_keys`.
        splits: [N] TRAIN, VALIDATION or TEST.
    """

    keys: NDArray[np.int64]
    splits: NDArray[np.uint8]

    @classmethod
    def of(cls, keys: NDArray[np.int64], validation: NDArray[np.int64], test: NDArray[np.int64]) -> KnownRows:
        """From the row numbers of validation and test; all other rows are training rows."""
        splits = np.full(len(keys), TRAIN, np.uint8)
        splits[validation], splits[test] = VALIDATION, TEST
        return cls(keys, splits)

    def splits_of(self, keys: NDArray[np.int64]) -> NDArray[np.uint8]:
        """[n] the split of each row, or UNKNOWN; a row equal to a training row counts as TRAIN.

        The unchanged data set gets its own splits, also for equal rows.
        """
        if np.array_equal(keys, self.keys):
            return self.splits
        order = np.lexsort((self.splits, self.keys))  # training rows first among equal keys
        position = np.searchsorted(self.keys[order], keys)
        nearest = order[np.minimum(position, len(order) - 1)]
        splits: NDArray[np.uint8] = np.where(self.keys[nearest] == keys, self.splits[nearest], UNKNOWN).astype(np.uint8)
        return splits

    def joined(self, other: KnownRows) -> KnownRows:
        """These rows, then those of another run whose training was continued."""
        return KnownRows(np.concatenate([self.keys, other.keys]), np.concatenate([self.splits, other.splits]))

    def state(self) -> dict[str, Any]:
        """Tensors for `from_state`."""
        return {"keys": torch.from_numpy(self.keys), "parts": torch.from_numpy(self.splits)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> KnownRows:
        """The inverse of `state`; raises DataError."""
        keys = checked_array(state["keys"], "keys", "i", [None])
        return cls(keys, checked_array(state["parts"], "parts", "u", keys.shape))


class RowStatistic(NamedTuple):
    """Mean and standard deviation of a value per row."""

    rows: int
    mean: float
    std: float

    @classmethod
    def from_state(cls, state: Any) -> RowStatistic:
        """From a list of the three fields."""
        rows, mean, std = state
        return cls(int(rows), float(mean), float(std))

    @classmethod
    def of(cls, values: Floats) -> RowStatistic:
        return cls(len(values), float(values.mean()), float(values.std()))

    def is_exceeded_by(self, values: Floats) -> bool:
        """Whether the mean of values [n] is far above this mean, beyond what heavy-tailed rows explain."""
        mean = float(values.mean())
        deviation = max(self.std, self.mean)  # a few rows may underestimate it
        reach = _STANDARD_ERRORS * deviation * math.sqrt(1.0 / len(values) + 1.0 / max(self.rows, 1))
        return not math.isfinite(mean) or mean > max(_MEAN_FACTOR * self.mean, self.mean + reach)


@dataclass(frozen=True)
class TrainingRange:
    """Value ranges and errors of the rows of a run.

    Args:
        low, high: [F] clip bounds; for a feature that is not clipped, its least and largest training value.
        outside: share of a row's features outside these bounds, before clipping.
        error: mean squared reconstruction error of a held-out row, in normalised units.
    """

    low: NDArray[np.float64]
    high: NDArray[np.float64]
    outside: RowStatistic
    error: RowStatistic

    def state(self) -> dict[str, Any]:
        """Tensors and plain values for `from_state`."""
        return {
            "low": torch.from_numpy(self.low),
            "high": torch.from_numpy(self.high),
            "outside": list(self.outside),
            "error": list(self.error),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], features: int | None = None) -> TrainingRange:
        """The inverse of `state`; raises DataError, also if there are not `features` features (None: any number)."""
        outside, error = (RowStatistic.from_state(state[name]) for name in ("outside", "error"))
        low, high = (checked_array(state[name], name, "f", [features]) for name in ("low", "high"))
        return cls(low, high, outside, error)


def outside_share(features: Floats, low: Floats, high: Floats) -> NDArray[np.float64]:
    """[n] share of a row's features [n, F] below low [F] or above high [F]."""
    low, high = low.astype(features.dtype), high.astype(features.dtype)
    share: NDArray[np.float64] = ((features < low) | (features > high)).mean(1)
    return share


@torch.no_grad()
def row_errors(model: CategoricalHierarchicalVQVAE, x: NDArray[np.float32], rows: NDArray[np.int64]) -> Floats:
    """[n] mean squared reconstruction errors of at most 2,048 of the given rows of normalised features x [N, F]."""
    sample = torch.from_numpy(RowView(x)[rows[:: max(1, len(rows) // _SAMPLED_ROWS)]]).to(model.feature_order.device)
    errors: NDArray[np.float32] = (model(sample)["reconstruction"] - sample).square().mean(1).cpu().numpy()
    return errors


class InputCheck:
    """Compares the rows that pass through a tokenizer with those of its training run.

    Args:
        reference: None if the checkpoint has none (it was converted, or made by an earlier version).
        rows: expected number of rows; errors of more than 2,048 are measured on evenly spaced rows.
    """

    def __init__(self, reference: TrainingRange | None, rows: int) -> None:
        self.reference = reference
        self.stride = max(1, rows // _SAMPLED_ROWS)
        self.rows = rows
        self._outside: list[NDArray[np.float64]] = []
        self._errors: list[Floats] = []
        self._without_values: Counter[str] = Counter()

    def add_raw(self, raw: Mapping[str, Tensor]) -> None:
        """Counts the rows of raw families {name: [n, ...]} that have no value in a family."""
        for name, values in raw.items():
            flat = values.flatten(1)
            flat = flat[flat[:, 0].isnan()]  # few rows, unless the first column is missing everywhere
            self._without_values[name] += int(flat.isnan().all(1).sum())

    def add_features(self, features: NDArray[np.float32]) -> None:
        """Adds cleaned features [n, F] before clipping."""
        if self.reference is not None:
            self._outside.append(outside_share(features, self.reference.low, self.reference.high))

    def add_errors(self, errors: Floats) -> None:
        """Adds mean squared reconstruction errors [n] of rows."""
        self._errors.append(errors)

    def merge(self, ranks: Ranks) -> None:
        """Adds the rows of the other ranks, in order of the ranks; then the summary is the same on each of them."""
        for values in (self._outside, self._errors):
            mine = np.concatenate(values) if values else np.zeros(0)
            values[:] = [part for part in ranks.gather_objects(mine) if len(part)]
        self._without_values = sum(ranks.gather_objects(self._without_values), Counter())

    def restrict_to(self, rows: NDArray[np.int64]) -> None:
        """Keeps only the features of the given row numbers; call before `add_errors`."""
        if self._outside:
            self._outside = [np.concatenate(self._outside)[rows]]

    def summary(self) -> dict[str, Any] | None:
        """Means of these rows and of the run's, and whether these are out of distribution; None without a reference."""
        if self.reference is None or not sum(map(len, self._outside)):
            return None
        outside = np.concatenate(self._outside)
        summary: dict[str, Any] = {
            "outside_range": float(outside.mean()),
            "outside_range_in_training": self.reference.outside.mean,
            "far_outside": self.reference.outside.is_exceeded_by(outside),
        }
        if self._errors:
            errors = np.concatenate(self._errors)
            summary |= {"error": float(errors.mean()), "error_in_training": self.reference.error.mean}
            summary["far_outside"] |= self.reference.error.is_exceeded_by(errors)
        return summary

    def warnings(self) -> list[str]:
        """One line per family without values in some rows, and one if the rows are out of distribution."""
        lines = [
            f"{count:,} of {self.rows:,} rows have no value in family {name}: the replacements of missing "
            "values are encoded instead, so their tokens carry no information about it"
            for name, count in self._without_values.items()
            if count
        ]
        far_outside = self._far_outside()
        return lines if far_outside is None else [*lines, far_outside]

    def log_warnings(self) -> list[str]:
        """Logs the warnings, and returns them."""
        warnings = self.warnings()
        for text in warnings:
            log.warning("%s", text)
        return warnings

    def _far_outside(self) -> str | None:
        summary = self.summary()
        if summary is None or not summary["far_outside"]:
            return None
        text = "these rows lie far outside of what the tokenizer was trained on: "
        if "error" in summary:
            text += f"reconstruction error {summary['error']:.3g} ({summary['error_in_training']:.3g} in validation), "
        return (
            f"{text}{summary['outside_range']:.1%} of features outside the range of training "
            f"({summary['outside_range_in_training']:.1%} in training); their tokens carry little information"
        )
