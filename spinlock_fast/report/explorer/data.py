"""The contents of the explorer: a header of plain values and columns of numbers.

All statistics come from `spinlock_fast.analysis`; the page only counts rows by their tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spinlock_fast.analysis.associations import associations_table, code_counts, cooccurrence_table, lifts_table
from spinlock_fast.analysis.codes import codes_table, one_hot, samples_table
from spinlock_fast.analysis.conditions import Condition, make_conditions
from spinlock_fast.analysis.effects import CodeEffects, code_effects
from spinlock_fast.analysis.neighbours import code_coordinates
from spinlock_fast.analysis.observations import Codebooks, Observations
from spinlock_fast.analysis.tables import Table
from spinlock_fast.config.random_streams import Stream, generator
from spinlock_fast.errors import DataError
from spinlock_fast.messages import printable

MIN_ROWS = 20
ALPHA = 0.05  # false discovery rate
SAMPLE_KINDS = ("nearest", "random", "boundary")

_BINS = 5  # of a parameter
_SAMPLES = 5  # of each kind and code
_MAX_PROFILE_CELLS = 1_000_000
_MAX_LIFT_CELLS = 500_000
_MAX_PAIRS = 50_000
_MAP_STEPS = 65_535

Columns = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class ExplorerData:
    """Contents of the page: `header` is JSON, `columns` are one-dimensional arrays of unsigned integers or float32."""

    header: dict[str, Any]
    columns: Columns


def explorer_data(observed: Observations, about: Mapping[str, Any]) -> ExplorerData:
    """Computes the contents of the page.

    Args:
        observed: encoded rows.
        about: facts on the checkpoint and the data, as JSON values.

    Raises:
        DataError: fewer than 20 rows.
    """
    N = len(observed.tokens)
    if N < MIN_ROWS:
        raise DataError(f"{N} rows are too few: the explorer needs at least {MIN_ROWS}")
    notes = list(observed.notes)
    random = generator(0, Stream.ANALYSIS)
    conditions, constant = make_conditions(observed, _BINS)
    notes += constant
    counts = code_counts(observed)
    members = one_hot(observed.tokens, observed.codebooks.offsets)
    # In the order of `analyze_observations`: the same random numbers give the same examples and permutations.
    samples = samples_table(observed, _SAMPLES, random)
    associations = associations_table(observed, conditions, ALPHA, random) if conditions else {}
    effects = code_effects(observed, members)
    profile_header, profile_columns = _profiles(effects, notes)
    kept = _limit_conditions(conditions, associations, effects.codes.size, notes)
    columns: Columns = {
        **_row_columns(observed),
        **_code_columns(codes_table(observed, counts)),
        **profile_columns,
        **_lift_columns(lifts_table(observed, kept, counts)),
        **_sample_columns(observed, samples),
    }
    if len(observed.codebooks.by_category()) > 1:
        columns |= _pair_columns(observed.codebooks, cooccurrence_table(observed, members, counts, ALPHA, notes), notes)
    header = {
        **about,
        "rows": N,
        "alpha": ALPHA,
        **_codebook_header(observed.codebooks),
        **profile_header,
        "conditions": [{"name": printable(c.name), "levels": [printable(text) for text in c.levels]} for c in kept],
        "associations": _association_header(associations),
        "samples": list(SAMPLE_KINDS),
        "notes": [printable(note) for note in notes],
    }
    return ExplorerData(header, columns)


def _codebook_header(codebooks: Codebooks) -> dict[str, Any]:
    names = list(codebooks.by_category())
    numbers = [re.fullmatch(r"cluster_(\d+)", name) for name in names]
    short = [f"c{match[1]}" for match in numbers if match]
    if len(short) < len(names):
        short = [f"c{i}" for i in range(1, len(names) + 1)]
    return {
        "categories": [{"name": printable(name), "short": text} for name, text in zip(names, short, strict=True)],
        "codebooks": [
            {"category": names.index(category), "level": level, "codes": codes}
            for category, level, codes in zip(codebooks.categories, codebooks.levels, codebooks.num_codes, strict=True)
        ],
    }


def _row_columns(observed: Observations) -> Columns:
    columns = {"rows": observed.rows.astype(np.uint32)}
    for g, codes in enumerate(observed.codebooks.num_codes):
        columns[f"tokens/{g}"] = observed.tokens[:, g].astype(np.uint8 if codes <= 256 else np.uint16)
    position = token_map(observed.codebooks, observed.tokens)
    low, high = position.min(0), position.max(0)
    extent = float((high - low).max())  # one scale for both axes
    steps = np.rint((position - low) / (extent if extent > 0 else 1.0) * _MAP_STEPS).astype(np.uint16)
    return columns | {"map/x": steps[:, 0], "map/y": steps[:, 1]}


def token_map(codebooks: Codebooks, tokens: NDArray[np.int64]) -> NDArray[np.float64]:
    """[N, 2] first two principal components of the code vectors of each row.

    Code vectors are scaled as for the distance of tokens (`code_coordinates`). The sign of a component is chosen such
    that its largest loading is positive.
    """
    coordinates = code_coordinates(codebooks, tokens)
    ends = np.cumsum([codes.shape[1] for codes in coordinates])
    width = max(int(ends[-1]), 2)
    covariance = np.zeros((width, width))
    parts = [slice(end - codes.shape[1], end) for end, codes in zip(ends.tolist(), coordinates, strict=True)]
    for g, first in enumerate(parts):  # from counts of pairs of codes; coordinates have mean 0
        for h, second in enumerate(parts[: g + 1]):
            K = len(coordinates[h])
            flat = np.bincount(tokens[:, g] * K + tokens[:, h], minlength=len(coordinates[g]) * K)
            block = coordinates[g].T.astype(np.float64) @ flat.reshape(-1, K) @ coordinates[h]
            covariance[first, second], covariance[second, first] = block, block.T
    axes = np.linalg.eigh(covariance)[1][:, [-1, -2]]
    axes *= np.sign(axes[np.abs(axes).argmax(0), [0, 1]])
    position = np.zeros((len(tokens), 2))
    for g, part in enumerate(parts):
        position += (coordinates[g] @ axes[part])[tokens[:, g]]
    return position


def _code_columns(table: Table) -> Columns:
    return {
        "code/count": table["count"].astype(np.uint32),
        "code/distance": table["distance_median"].astype(np.float32),
        "code/margin": table["margin_median"].astype(np.float32),
    }


def _profiles(effects: CodeEffects, notes: list[str]) -> tuple[dict[str, Any], Columns]:
    F = len(effects.names)
    features = np.arange(F)
    most = max(1, _MAX_PROFILE_CELLS // max(effects.codes.size, 1))
    if most < F:
        strength = np.nan_to_num(np.abs(effects.effect) - np.nan_to_num(effects.half_width)).max(0)
        features = np.sort(np.argsort(-strength, kind="stable")[:most])
        notes.append(f"profiles show the {most:,} of {F:,} features with the largest effects")
    auc = effects.auc[:, features]
    return (
        {"features": [{"name": printable(effects.names[i]), "kind": effects.kinds[i]} for i in features]},
        {
            "profile/codes": effects.codes.astype(np.uint32),
            # Rounded values compress better.
            "profile/effect": np.round(effects.effect[:, features], 4).astype(np.float32).ravel(),
            "profile/half_width": np.round(effects.half_width[:, features], 4).astype(np.float32).ravel(),
            "profile/auc": np.round(auc, 4).astype(np.float32).ravel(),
            "profile/found": (effects.q[:, features] <= ALPHA).astype(np.uint8).ravel(),
        },
    )


def _limit_conditions(
    conditions: Sequence[Condition], associations: Table, codes: int, notes: list[str]
) -> list[Condition]:
    """The conditions with the strongest associations, as far as their lifts fit the page."""
    if codes * sum(len(c.levels) for c in conditions) <= _MAX_LIFT_CELLS:
        return list(conditions)
    strength = {c.name: associations["ami"][associations["condition"] == c.name].max() for c in conditions}
    kept, cells = [], 0
    for condition in sorted(conditions, key=lambda c: -strength[c.name]):
        cells += codes * len(condition.levels)
        if cells <= _MAX_LIFT_CELLS:
            kept.append(condition.name)
    notes.append(f"lifts are shown for {len(kept)} of {len(conditions)} conditions, those with the largest AMI")
    return [c for c in conditions if c.name in kept]


def _lift_columns(table: Table) -> Columns:
    if not table:
        return {}
    return {
        "lift/count": table["count"].astype(np.uint32),
        "lift/value": np.round(table["lift"], 4).astype(np.float32),
        "lift/low": np.round(table["lift_low"], 4).astype(np.float32),
        "lift/high": np.round(table["lift_high"], 4).astype(np.float32),
        "lift/found": (table["q"] <= ALPHA).astype(np.uint8),
    }


def _association_header(table: Table) -> dict[str, Any]:
    """Rows [G] of columns [conditions]; None for NaN."""
    if not table:
        return {"conditions": []}
    names = list(dict.fromkeys(table["condition"].tolist()))
    header: dict[str, Any] = {"conditions": [printable(name) for name in names]}
    for name in ("ami", "null_q95", "q"):
        values = [float(f"{value:.4g}") for value in table[name].tolist()]
        header[name] = [None if value != value else value for value in values]
    return header


def _sample_columns(observed: Observations, table: Table) -> Columns:
    number = {name: g for g, name in enumerate(observed.codebooks.names)}
    codebook = np.array([number[name] for name in table["codebook"].tolist()], np.int64)
    return {
        "sample/code": (observed.codebooks.offsets[codebook] + table["code"]).astype(np.uint32),
        "sample/kind": np.array([SAMPLE_KINDS.index(kind) for kind in table["kind"].tolist()], np.uint8),
        "sample/row": np.searchsorted(observed.rows, table["row"]).astype(np.uint32),
        "sample/distance": table["distance"].astype(np.float32),
        "sample/margin": table["margin"].astype(np.float32),
    }


def _pair_columns(codebooks: Codebooks, table: Table, notes: list[str]) -> Columns:
    number = {name: g for g, name in enumerate(codebooks.names)}
    total = len(table["count"])
    if total > _MAX_PAIRS:
        notes.append(f"{_MAX_PAIRS:,} of {total:,} pairs of codes are shown, those with the smallest p")
    columns: Columns = {}
    for side in ("a", "b"):
        codebook = np.array([number[name] for name in table[f"codebook_{side}"][:_MAX_PAIRS].tolist()], np.int64)
        codes = codebooks.offsets[codebook] + table[f"code_{side}"][:_MAX_PAIRS]
        columns[f"pair/{side}"] = codes.astype(np.uint32)
    columns["pair/count"] = table["count"][:_MAX_PAIRS].astype(np.uint32)
    columns["pair/expected"] = table["expected"][:_MAX_PAIRS].astype(np.float32)
    return columns
