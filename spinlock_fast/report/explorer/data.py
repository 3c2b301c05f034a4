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
from spinlock_fast.analysis.observations import Codebooks, Observations
from spinlock_fast.analysis.tables import Table
from spinlock_fast.config.random_streams import Stream, generator
from spinlock_fast.errors import DataError
from spinlock_fast.messages import printable
from spinlock_fast.report.explorer.fields import FieldPictures
from spinlock_fast.report.explorer.rows import RANK_STEPS, Columns, condition_columns, neighbour_columns, row_columns
from spinlock_fast.report.explorer.series import SeriesPlots

MIN_ROWS = 20
ALPHA = 0.05  # false discovery rate
FIELDS_NOTE = "fields are shown of"  # start of the note on rows without pictures
SAMPLE_KINDS = ("nearest", "random", "boundary")

_BINS = 5  # of a parameter
_SAMPLES = 5  # of each kind and code
_MAX_PROFILE_CELLS = 1_000_000
_MAX_LIFT_CELLS = 500_000
_MAX_PAIRS = 50_000


@dataclass(frozen=True)
class ExplorerData:
    """Contents of the page: `header` is JSON, `columns` are one-dimensional arrays of unsigned integers or float32."""

    header: dict[str, Any]
    columns: Columns

    def examples(self) -> list[NDArray[np.uint32]]:
        """Rows of the page that are examples of codes: nearest, random, boundary."""
        rows, kinds = self.columns["sample/row"], self.columns["sample/kind"]
        return [rows[kinds == kind] for kind in range(len(SAMPLE_KINDS))]

    def add_pictures(self, pictures: FieldPictures) -> None:
        """Adds pictures of fields to the page."""
        self.header["fields"] = pictures.header()
        self.columns.update(pictures.columns())
        if len(pictures.rows) < self.header["rows"]:
            text = f"{FIELDS_NOTE} {len(pictures.rows):,} rows, which are examples of the codes"
            self.header["notes"].append(text)

    def add_series(self, plots: SeriesPlots) -> None:
        """Adds time series to the page."""
        self.header["series"] = plots.header()
        self.columns.update(plots.columns())


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
        **row_columns(observed),
        **condition_columns(kept),
        **neighbour_columns(observed),
        **_code_columns(codes_table(observed, counts)),
        **profile_columns,
        **_lift_columns(lifts_table(observed, kept, counts)),
        **_sample_columns(observed, samples),
    }
    if len(observed.codebooks.by_category()) > 1:
        columns |= _pair_columns(observed.codebooks, cooccurrence_table(observed, members, counts, ALPHA, notes), notes)
    header = {
        **about,
        "fields": None,
        "series": None,
        "rows": N,
        "alpha": ALPHA,
        "rank_limit": RANK_STEPS,
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
            {"category": names.index(category), "level": level, "codes": codes, "dim": vectors.shape[1]}
            for category, level, codes, vectors in zip(
                codebooks.categories, codebooks.levels, codebooks.num_codes, codebooks.vectors, strict=True
            )
        ],
    }


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
