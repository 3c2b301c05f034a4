"""The analysis of one checkpoint on one data set."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from spinlock_fast.analysis.associations import associations_table, code_counts, cooccurrence_table, lifts_table
from spinlock_fast.analysis.codes import codes_table, features_table, one_hot, samples_table
from spinlock_fast.analysis.conditions import Condition, make_conditions
from spinlock_fast.analysis.named_conditions import add_named_conditions
from spinlock_fast.analysis.neighbours import agreement_table, nearest_operators, neighbours_table
from spinlock_fast.analysis.observations import Observations, Progress, collect_observations
from spinlock_fast.analysis.refinement import refinement_table
from spinlock_fast.analysis.significance import Counts
from spinlock_fast.analysis.stability import stability_table
from spinlock_fast.analysis.tables import Table
from spinlock_fast.config.random_streams import Stream, generator
from spinlock_fast.distributed import SINGLE, Ranks
from spinlock_fast.errors import DataError
from spinlock_fast.tokenizer import Tokenizer

_MIN_ROWS = 20

OnStage = Callable[[str], None]


class AnalysisConfig(BaseModel):
    """Settings of an analysis; raises `pydantic.ValidationError`, a ValueError, for a value out of range."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bins: int = Field(default=5, ge=2, le=100, description="quantile bins of a parameter")
    alpha: float = Field(default=0.05, ge=0.001, le=0.5, description="false discovery rate")
    rows: int = Field(
        default=200_000,
        ge=_MIN_ROWS,
        description="maximum number of operators; evenly spaced ones are taken from a larger file",
    )
    samples: int = Field(default=3, ge=1, description="operators of each kind listed as examples of a code")
    neighbours: int = Field(default=5, ge=1, description="nearest operators listed for each query")
    queries: int = Field(
        default=1_000, ge=1, description="maximum number of operators, evenly spaced, whose neighbours are searched"
    )
    seed: int = Field(default=0, ge=0, description="seed of permutations and random samples")


@dataclass(frozen=True)
class Analysis:
    """Tables by name (docs/tokens.md describes their columns) and a summary of plain values."""

    tables: dict[str, Table]
    summary: dict[str, Any]


def analyze(
    checkpoint: str | Path,
    data: str | Path | list[str],
    config: AnalysisConfig | None = None,
    compare: Sequence[str | Path] = (),
    device: str = "cpu",
    memory_budget: int = 1_250_000_000,
    stage: OnStage = lambda text: None,
    progress: Progress | None = None,
    *,
    allow_external: bool = True,
    conditions: Sequence[str] = (),
    ranks: Ranks = SINGLE,
) -> Analysis:
    """Encodes the operators of a file and analyses their tokens.

    Args:
        checkpoint: its directory.
        data: HDF5 file, glob or list; see docs/data-format.md for parameters and metadata.
        compare: further checkpoint directories whose tokens of the same data are compared.
        stage: called with a text when a stage begins.
        progress: called with (operators done, all operators).
        allow_external: False refuses data files with links to other directories.
        conditions: further conditions, see `add_named_conditions`.
        ranks: if there are several, each encodes a share of the operators; all but rank 0 return an empty analysis.

    Raises:
        DataError: the checkpoint or the data cannot be used.
    """
    config = config or AnalysisConfig()
    began = time.perf_counter()
    tokenizer = Tokenizer.from_checkpoint(checkpoint, device)
    others = [Tokenizer.from_checkpoint(directory, device) for directory in compare]
    for each in (tokenizer, *others):
        each.allow_external = allow_external
    stage("Encoding")
    observed = collect_observations(tokenizer, data, config.rows, memory_budget, progress, ranks)
    if conditions and observed is not None:
        with tokenizer.source(data) as source:
            add_named_conditions(observed, source, conditions)
    encoded = time.perf_counter()
    parts = []
    for directory, other in zip(compare, others, strict=True):
        stage(f"Comparing with {directory}")
        second = collect_observations(other, data, config.rows, memory_budget, progress, ranks)
        if observed is not None and second is not None:
            parts.append(stability_table(str(checkpoint), observed, str(directory), second))
    if observed is None:
        return Analysis({}, {})
    analysis = analyze_observations(observed, config, stage)
    if parts:
        analysis.tables["stability"] = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    analysis.summary.update(
        checkpoint=str(checkpoint),
        checkpoint_sha256=tokenizer.checkpoint_hash,
        data=[str(path) for path in data] if isinstance(data, list) else str(data),
        compared=[str(directory) for directory in compare],
        settings=config.model_dump(),
    )
    analysis.summary["seconds"] |= {
        "encode": round(encoded - began, 2),
        "total": round(time.perf_counter() - began, 2),
    }
    return analysis


def analyze_observations(
    observed: Observations, config: AnalysisConfig, stage: OnStage = lambda text: None
) -> Analysis:
    """Computes the statistics of encoded operators; raises DataError with fewer than 20."""
    N = len(observed.tokens)
    if N < _MIN_ROWS:
        raise DataError(f"{N} operators are too few: an analysis needs at least {_MIN_ROWS}")
    random = generator(config.seed, Stream.ANALYSIS)
    notes = list(observed.notes)
    conditions, constant = make_conditions(observed, config.bins)
    notes += constant
    seconds: dict[str, float] = {}
    tables: dict[str, Table] = {}

    def run(name: str, text: str, make: Callable[[], Table]) -> None:
        stage(text)
        started = time.perf_counter()
        table = make()
        if table:
            tables[name] = table
        seconds[name] = round(time.perf_counter() - started, 2)

    counts = code_counts(observed)
    members = one_hot(observed.tokens, observed.codebooks.offsets)
    queries = np.unique(np.linspace(0, N - 1, min(N, config.queries)).astype(np.int64))
    run("codes", "Codes", lambda: codes_table(observed, counts))
    run("features", "Features of codes", lambda: features_table(observed, members, notes))
    run("samples", "Samples of codes", lambda: samples_table(observed, config.samples, random))
    nearest = np.empty((0, 0), np.int64)

    def find_neighbours() -> Table:
        nonlocal nearest
        count = min(config.neighbours, N - 1)
        nearest, distance = nearest_operators(observed.codebooks, observed.tokens, queries, count)
        return neighbours_table(observed, queries, nearest, distance)

    run("neighbours", "Nearest operators", find_neighbours)
    if conditions:
        run(
            "associations",
            "Associations of tokens with conditions",
            lambda: associations_table(observed, conditions, config.alpha, random),
        )
        run("lifts", "Lifts of codes", lambda: lifts_table(observed, conditions, counts))
        run("agreement", "Agreement of neighbours", lambda: agreement_table(conditions, queries, nearest))
    run("refinement", "Levels", lambda: refinement_table(observed))
    if len(observed.codebooks.by_category()) > 1:
        run(
            "cooccurrence",
            "Co-occurring codes",
            lambda: cooccurrence_table(observed, members, counts, config.alpha, notes),
        )
    return Analysis(tables, _summary(observed, conditions, counts, tables, config.alpha, notes, seconds))


def _summary(
    observed: Observations,
    conditions: Sequence[Condition],
    counts: Counts,
    tables: Mapping[str, Table],
    alpha: float,
    notes: list[str],
    seconds: dict[str, float],
) -> dict[str, Any]:
    """The entries of summary.json; `found` counts the rows with q <= alpha of each table of tests."""
    return {
        "operators": len(observed.tokens),
        "codebooks": len(observed.codebooks.names),
        "codes": int(counts.size),
        "codes_in_use": int((counts > 0).sum()),
        "conditions": [condition.name for condition in conditions],
        "found": {
            name: {"tests": int(np.isfinite(table["q"]).sum()), "found": int((table["q"] <= alpha).sum())}
            for name, table in tables.items()
            if "q" in table and name != "cooccurrence"
        },
        "pairs_of_codes_found": len(tables["cooccurrence"]["q"]) if "cooccurrence" in tables else 0,
        "notes": notes,
        "seconds": seconds,
    }
