"""Whether rows are those that a tokenizer was trained on, like them, or far outside of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from spinlock_fast.data.payload_checks import checked_array
from spinlock_fast.models.vqvae import CategoricalHierarchicalVQVAE

Floats = NDArray[np.floating]

TRAIN, VALIDATION, TEST, UNKNOWN = range(4)

# A mean is far off where it exceeds that of the run by this factor, and by as many of its standard errors: rows are
# heavy-tailed, so that the mean of a few is often several standard errors away.
_FACTOR = 2.0
_ERRORS = 8.0
_SAMPLED_ROWS = 2048  # whose reconstruction error is measured


@dataclass(frozen=True)
class KnownRows:
    """The rows of a run: which were trained on, and which held out.

    Args:
        keys: [N] of its data set, in order; see `row_keys`.
        parts: [N] TRAIN, VALIDATION or TEST.
    """

    keys: NDArray[np.int64]
    parts: NDArray[np.uint8]

    @classmethod
    def of(cls, keys: NDArray[np.int64], validation: NDArray[np.int64], test: NDArray[np.int64]) -> KnownRows:
        """All rows but those of validation and test, by number, are training rows."""
        parts = np.full(len(keys), TRAIN, np.uint8)
        parts[validation], parts[test] = VALIDATION, TEST
        return cls(keys, parts)

    def parts_of(self, keys: NDArray[np.int64]) -> NDArray[np.uint8]:
        """[n] the part that each row was in, or UNKNOWN; a row that equals a training row was trained on.

        The data set as it was gives its split as it was, even where rows are equal.
        """
        if np.array_equal(keys, self.keys):
            return self.parts
        order = np.lexsort((self.parts, self.keys))  # of equal keys the training row first
        place = np.searchsorted(self.keys[order], keys)
        found = order[np.minimum(place, len(order) - 1)]
        parts: NDArray[np.uint8] = np.where(self.keys[found] == keys, self.parts[found], UNKNOWN).astype(np.uint8)
        return parts

    def state(self) -> dict[str, Any]:
        """Tensors that `from_state` takes."""
        return {"keys": torch.from_numpy(self.keys), "parts": torch.from_numpy(self.parts)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> KnownRows:
        """What `state` gave; raises DataError."""
        keys = checked_array(state["keys"], "keys", "i", [None])
        return cls(keys, checked_array(state["parts"], "parts", "u", keys.shape))


class Spread(NamedTuple):
    """Of a figure of each of `rows` rows."""

    rows: int
    mean: float
    std: float

    @classmethod
    def from_state(cls, state: Any) -> Spread:
        """Of a list of its three figures."""
        rows, mean, std = state
        return cls(int(rows), float(mean), float(std))

    @classmethod
    def of(cls, values: Floats) -> Spread:
        return cls(len(values), float(values.mean()), float(values.std()))

    def far_below(self, values: Floats) -> bool:
        """Whether the mean of values [n] is far above this one, beyond what heavy-tailed rows explain."""
        found = float(values.mean())
        deviation = max(self.std, self.mean)  # of a few rows it may be found too small
        reach = _ERRORS * deviation * math.sqrt(1.0 / len(values) + 1.0 / max(self.rows, 1))
        return not math.isfinite(found) or found > max(_FACTOR * self.mean, self.mean + reach)


@dataclass(frozen=True)
class TrainingRange:
    """What the rows of a run looked like.

    Args:
        low, high: [F] clip bounds, or the least and largest training value of a feature that is not clipped.
        outside: share of a row's features outside of these, before clipping.
        error: mean squared error of the reconstruction of a held-out row, normalised.
    """

    low: NDArray[np.float64]
    high: NDArray[np.float64]
    outside: Spread
    error: Spread

    def state(self) -> dict[str, Any]:
        """Tensors and plain values that `from_state` takes."""
        return {
            "low": torch.from_numpy(self.low),
            "high": torch.from_numpy(self.high),
            "outside": list(self.outside),
            "error": list(self.error),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], features: int | None = None) -> TrainingRange:
        """What `state` gave, of so many features (None: any number); raises DataError."""
        spreads = [Spread.from_state(state[name]) for name in ("outside", "error")]
        low, high = (checked_array(state[name], name, "f", [features]) for name in ("low", "high"))
        return cls(low, high, *spreads)


def outside_share(features: Floats, low: Floats, high: Floats) -> NDArray[np.float64]:
    """[n] share of a row's features [n, F] below low [F] or above high [F]."""
    low, high = low.astype(features.dtype), high.astype(features.dtype)
    share: NDArray[np.float64] = ((features < low) | (features > high)).mean(1)
    return share


@torch.no_grad()
def row_errors(model: CategoricalHierarchicalVQVAE, x: NDArray[np.float32], rows: NDArray[np.int64]) -> Floats:
    """Mean squared error of the reconstruction of rows of normalised features x [N, F], of 2,048 at most."""
    some = torch.from_numpy(x[rows[:: max(1, len(rows) // _SAMPLED_ROWS)]]).to(model.feature_order.device)
    errors: NDArray[np.float32] = (model(some)["reconstruction"] - some).square().mean(1).cpu().numpy()
    return errors


class InputCheck:
    """Gathers what passes through a tokenizer, and compares it with the rows of the run that made it.

    Args:
        known: None where the checkpoint does not say (it was made by an earlier version, or converted).
        rows: expected in all; of more than 2,048 the error is measured on rows spread evenly.
    """

    def __init__(self, known: TrainingRange | None, rows: int) -> None:
        self.known = known
        self.stride = max(1, rows // _SAMPLED_ROWS)
        self._outside: list[NDArray[np.float64]] = []
        self._errors: list[Floats] = []

    def add_features(self, features: NDArray[np.float32]) -> None:
        """Kept features [n, F] before clipping."""
        if self.known is not None:
            self._outside.append(outside_share(features, self.known.low, self.known.high))

    def add_errors(self, errors: Floats) -> None:
        """Mean squared reconstruction error of rows [n]."""
        self._errors.append(errors)

    def only(self, rows: NDArray[np.int64]) -> None:
        """Leaves out the features of all rows but some, by number; before errors are added."""
        if self._outside:
            self._outside = [np.concatenate(self._outside)[rows]]

    def summary(self) -> dict[str, Any] | None:
        """Means of these rows and of those of the run, and whether these are far outside; None: not known."""
        if self.known is None or not sum(map(len, self._outside)):
            return None
        outside = np.concatenate(self._outside)
        found: dict[str, Any] = {
            "outside_range": float(outside.mean()),
            "outside_range_in_training": self.known.outside.mean,
            "far_outside": self.known.outside.far_below(outside),
        }
        if self._errors:
            errors = np.concatenate(self._errors)
            found |= {"error": float(errors.mean()), "error_in_training": self.known.error.mean}
            found["far_outside"] |= self.known.error.far_below(errors)
        return found

    def warning(self) -> str | None:
        """One line where the rows lie far outside of what the tokenizer was trained on, else None."""
        found = self.summary()
        if found is None or not found["far_outside"]:
            return None
        text = "these rows lie far outside of what the tokenizer was trained on: "
        if "error" in found:
            text += f"reconstruction error {found['error']:.3g} ({found['error_in_training']:.3g} in validation), "
        return (
            f"{text}{found['outside_range']:.1%} of features outside the range of training "
            f"({found['outside_range_in_training']:.1%} in training); their tokens tell little"
        )
