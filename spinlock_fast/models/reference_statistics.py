"""Distributions of the features, codes and distances of a run's rows, with which later rows are compared."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from spinlock_fast.errors import DataError
from spinlock_fast.features.cleaning import FeatureCleaner
from spinlock_fast.features.normalize import Normalizer
from spinlock_fast.models.eval_mode import eval_mode
from spinlock_fast.models.vqvae import CategoricalHierarchicalVQVAE

BINS = 10
REFERENCE_ROWS = 8192  # most rows of which the distributions are kept
_FEWEST_HELD_OUT = 50  # with fewer validation rows, distances are those of all rows
_ROWS_AT_ONCE = 4096
_TAIL = 0.01

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Histogram(_Entry):
    """Counts of values between deciles, and of values beyond the 1st and 99th percentile.

    Limits lie halfway between two distinct values, so that rounding errors do not move a value across one. A value that
    many rows share makes fewer and unequal bins.
    """

    edges: list[float] = Field(max_length=BINS - 1)
    counts: list[int]
    low: float | None  # None: no value is below the 1st percentile
    high: float | None
    beyond: int

    @classmethod
    def of(cls, values: NDArray[np.floating], *, lower_tail: bool = True) -> Histogram:
        """Of values [m]; without `lower_tail`, only values above the 99th percentile are beyond."""
        ordered = np.sort(values.astype(np.float64))
        m, distinct = len(ordered), np.unique(ordered)

        def below(place: int) -> float | None:
            """A limit below the value at a place of the sorted values, and above the next smaller one."""
            i = int(np.searchsorted(distinct, ordered[place]))
            return float(distinct[i - 1] + distinct[i]) / 2 if i else None

        limits = [below(int(m * part / BINS)) for part in range(1, BINS)]
        edges = sorted({limit for limit in limits if limit is not None})
        low = below(int(_TAIL * m)) if lower_tail else None
        last = int(np.searchsorted(distinct, ordered[math.ceil((1 - _TAIL) * m) - 1])) + 1
        high = float(distinct[last - 1] + distinct[last]) / 2 if last < len(distinct) else None
        empty = cls(edges=edges, counts=[0] * (len(edges) + 1), low=low, high=high, beyond=0)
        counts, beyond = empty.count(ordered)
        return empty.model_copy(update={"counts": counts.tolist(), "beyond": beyond})

    def count(self, values: NDArray[np.floating]) -> tuple[Ints, int]:
        """Counts [len(edges) + 1] of values [n], and how many are beyond the percentiles."""
        counts = np.bincount(np.searchsorted(self.edges, values, "right"), minlength=len(self.edges) + 1)
        beyond = 0 if self.low is None else np.count_nonzero(values < self.low)
        beyond += 0 if self.high is None else np.count_nonzero(values > self.high)
        return counts.astype(np.int64), int(beyond)


class FeatureReference(_Entry):
    """One feature, normalised and clipped; `clipped` counts rows at a clip bound."""

    name: str
    values: Histogram
    clipped: int


class CodebookReference(_Entry):
    """One codebook: rows of each code, and Euclidean distances between latents and their codes."""

    name: str
    usage: list[int]
    distance: Histogram


class ReferenceStatistics(_Entry):
    """The contents of reference_statistics.json.

    Args:
        format: of the file.
        rows: number of rows of `features` and `usage`: training and validation rows, evenly spaced.
        distance_rows: number of rows of `distance`: validation rows, if there are at least 50.
        missing: missing raw values and all raw values of each family.
    """

    format: Literal[1] = 1
    rows: int = Field(gt=0)
    distance_rows: int = Field(gt=0)
    missing: dict[str, tuple[int, int]]
    features: list[FeatureReference]
    codebooks: list[CodebookReference]

    @classmethod
    def of(
        cls,
        model: CategoricalHierarchicalVQVAE,
        names: list[str],
        bounds: tuple[Floats, Floats],
        x: Floats,
        held_out: Floats,
        missing: Mapping[str, tuple[int, int]],
    ) -> ReferenceStatistics:
        """The statistics of rows.

        Args:
            names: [F] of the features.
            bounds: see `normalized_bounds`.
            x: [m, F] normalised training and validation rows.
            held_out: [h, F] normalised validation rows.
            missing: see the class.
        """
        codes, distance = codes_and_distances(model, x)
        if len(held_out) >= _FEWEST_HELD_OUT:
            distance = codes_and_distances(model, held_out)[1]
        clipped = at_bounds(x, bounds).sum(0).tolist()
        features = [
            FeatureReference(name=name, values=Histogram.of(x[:, f]), clipped=clipped[f])
            for f, name in enumerate(names)
        ]
        codebooks = [
            CodebookReference(
                name=name,
                usage=code_counts(codes[:, g], K).tolist(),
                distance=Histogram.of(distance[:, g], lower_tail=False),
            )
            for g, (name, K) in enumerate(zip(model.codebook_names, model.quantizer.num_codes, strict=True))
        ]
        return cls(
            rows=len(x), distance_rows=len(distance), missing=dict(missing), features=features, codebooks=codebooks
        )

    @classmethod
    def from_json(cls, text: bytes, model: CategoricalHierarchicalVQVAE, names: list[str]) -> ReferenceStatistics:
        """Reads the file; raises DataError if it is damaged, of a later version, or of another checkpoint."""
        try:
            reference = cls.model_validate_json(text)
        except ValidationError as error:
            problem = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(map(str, problem["loc"]))
            raise DataError(f"{place}: {problem['msg'].lower()}" if place else problem["msg"].lower()) from None
        sizes = [len(codebook.usage) for codebook in reference.codebooks]
        histograms = [feature.values for feature in reference.features]
        histograms += [codebook.distance for codebook in reference.codebooks]
        if [feature.name for feature in reference.features] != names or sizes != list(model.quantizer.num_codes):
            raise DataError("it describes another checkpoint: the features or codebooks differ")
        if any(len(part.counts) != len(part.edges) + 1 or part.edges != sorted(part.edges) for part in histograms):
            raise DataError("it is damaged: bins and edges do not fit")
        return reference


def evenly_spaced(rows: Ints, most: int) -> Ints:
    """At most `most` of some row numbers, evenly spaced."""
    chosen: Ints = rows[np.linspace(0, len(rows) - 1, min(len(rows), most)).astype(np.int64)]
    return chosen


def normalized_bounds(cleaner: FeatureCleaner, normalizer: Normalizer) -> tuple[Floats, Floats]:
    """Lower and upper clip bound [F] of the features in normalised units; infinite where a feature is not clipped."""
    low, high = (normalizer(bound.astype(np.float32)[None])[0] for bound in (cleaner.low, cleaner.high))
    return low, high


def at_bounds(x: Floats, bounds: tuple[Floats, Floats]) -> NDArray[np.bool_]:
    """[n, F] whether a normalised feature lies at a clip bound."""
    low, high = bounds
    clipped: NDArray[np.bool_] = (x <= low) | (x >= high)
    return clipped


def code_counts(codes: Ints, count: int) -> Ints:
    """[count] rows of each code; rows without a code (-1) are left out."""
    return np.bincount(codes[codes >= 0], minlength=count).astype(np.int64)


@torch.no_grad()
def codes_and_distances(model: CategoricalHierarchicalVQVAE, x: Floats) -> tuple[Ints, Floats]:
    """Codes [n, G] of normalised rows x [n, F], and their Euclidean distances to the latents (Inf without a code)."""
    layout, device = model.quantizer.layout, model.feature_order.device
    codes: list[Tensor] = []
    distances: list[Tensor] = []
    with eval_mode(model):
        for block in torch.from_numpy(np.ascontiguousarray(x)).split(_ROWS_AT_ONCE):
            latents = model.encode(block.to(device))
            assignment = model.quantizer.assign(latents)
            squared = (latents - assignment.quantized).square()
            parts = [squared[:, layout.column_slice(g)].sum(1) for g in range(layout.groups)]
            codes.append(assignment.codes.cpu())
            distances.append(torch.stack(parts, 1).sqrt().nan_to_num(nan=math.inf).cpu())
    return torch.cat(codes).numpy(), torch.cat(distances).numpy()
