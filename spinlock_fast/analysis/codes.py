"""Description of each code: its operators, and how their features differ from those of all others."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from spinlock_fast.analysis.observations import Observations
from spinlock_fast.analysis.significance import Array, Counts, false_discovery_rate, normal_p
from spinlock_fast.analysis.tables import Table
from spinlock_fast.data.window_sizes import available_cpus
from spinlock_fast.features.statistics import robust_scale

_COLUMNS_AT_ONCE = 32
_MAX_TABLE_ROWS = 1_000_000
_PROFILE_ROWS = 500  # operators per code; the standard error of their median is 6 % of the spread


def one_hot(tokens: NDArray[np.int64], offsets: NDArray[np.int64]) -> csr_matrix:
    """[sum K, N] membership matrix: 1 where an operator has a code."""
    N, G = tokens.shape
    codes = (tokens + offsets[:-1]).ravel(order="F")
    rows = np.tile(np.arange(N), G)
    order = np.argsort(codes, kind="stable")
    counts = np.bincount(codes, minlength=int(offsets[-1]))
    starts = np.concatenate([[0], np.cumsum(counts)])
    return csr_matrix((np.ones(codes.size), rows[order], starts), shape=(int(offsets[-1]), N))


def code_auc(members: csr_matrix, x: NDArray[np.floating]) -> tuple[Array, Array]:
    """[sum K, F] AUC of each feature for separating the operators of a code from all others, and its p value.

    AUC = (R - n (n + 1) / 2) / (n (N - n)), with R the rank sum of the n operators (Mann and Whitney 1947; ties count
    half): the probability that the feature is larger for an operator of the code than for another operator. p is
    two-sided, from the normal approximation with the tie-corrected variance n (N - n) / (N - 1) var(ranks).
    NaN where a code has no operators or all of them.
    """
    N, F = x.shape
    n = np.diff(members.indptr).astype(np.float64)[:, None]
    both = ((n > 0) & (n < N)).ravel()
    n = n[both]
    auc, p = np.full((both.size, F), np.nan), np.full((both.size, F), np.nan)

    def work(columns: slice) -> None:
        ranks = mid_ranks(x[:, columns])
        total = (members @ ranks)[both]
        auc[both, columns] = (total - n * (n + 1) / 2) / (n * (N - n))
        deviation = np.sqrt(n * (N - n) / max(N - 1, 1) * ranks.var(axis=0))
        away = total - n * (N + 1) / 2
        p[both, columns] = normal_p(np.divide(away, deviation, out=np.zeros_like(away), where=deviation > 0))

    _map_column_blocks(work, F)
    return auc, p


def mid_ranks(x: NDArray[np.floating]) -> Array:
    """[N, F] rank of each value in its column, from 1; ties get the mean of their ranks."""
    values = np.ascontiguousarray(x.T)
    ranks = np.empty(x.shape)
    for i, column in enumerate(values):
        order = np.argsort(column)
        ordered = column[order]
        starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
        ends = np.append(starts[1:], len(column))
        ranks[order, i] = np.repeat((starts + ends + 1) / 2, ends - starts)
    return ranks


def code_quartiles(members: csr_matrix, x: NDArray[np.floating]) -> Array:
    """[3, sum K, F] quartiles of each feature over the operators of each code; NaN for an unused code.

    At most 500 evenly spaced operators of a code are used.
    """
    out = np.full((3, members.shape[0], x.shape[1]), np.nan)

    def work(columns: slice) -> None:
        values = np.ascontiguousarray(x[:, columns].T)
        for code in range(members.shape[0]):
            rows = members.indices[members.indptr[code] : members.indptr[code + 1]]
            if rows.size:
                evenly_spaced = rows[np.linspace(0, rows.size - 1, min(rows.size, _PROFILE_ROWS)).astype(np.int64)]
                out[:, code, columns] = np.quantile(
                    values[:, evenly_spaced], [0.25, 0.5, 0.75], axis=1, overwrite_input=True
                )

    _map_column_blocks(work, x.shape[1])
    return out


def _map_column_blocks(work: Callable[[slice], None], columns: int) -> None:
    """Calls `work` for blocks of columns on all processors; numpy releases the GIL while it sorts."""
    blocks = [slice(start, start + _COLUMNS_AT_ONCE) for start in range(0, columns, _COLUMNS_AT_ONCE)]
    with ThreadPoolExecutor(available_cpus()) as pool:
        for _ in pool.map(work, blocks):
            pass


def codes_table(observed: Observations, counts: Counts) -> Table:
    """One row per code: number and share of operators, median distance and margin."""
    codebooks, N = observed.codebooks, len(observed.tokens)
    total = int(codebooks.offsets[-1])
    distance, margin = np.full(total, np.nan), np.full(total, np.nan)
    for g, first in enumerate(codebooks.offsets[:-1]):
        for code, rows in enumerate(_rows_by_code(observed.tokens[:, g], codebooks.num_codes[g])):
            if rows.size:
                distance[first + code] = np.median(observed.distance[rows, g])
                margin[first + code] = np.median(observed.margin[rows, g])
    return {
        **code_columns(observed, np.arange(total)),
        "count": counts,
        "share": counts / N,
        "distance_median": distance,
        "margin_median": margin,
    }


def code_columns(observed: Observations, codes: NDArray[np.int64]) -> Table:
    """Columns codebook, category, level and code of indices into all codes."""
    codebooks = observed.codebooks
    g = np.searchsorted(codebooks.offsets, codes, side="right") - 1
    return {
        "codebook": np.array(codebooks.names)[g],
        "category": np.array(codebooks.categories)[g],
        "level": np.array(codebooks.levels)[g],
        "code": codes - codebooks.offsets[g],
    }


def features_table(observed: Observations, members: csr_matrix, notes: list[str]) -> Table:
    """One row per code in use and feature: quartiles, robust z, AUC, p, and q over all rows.

    Beyond a million rows, only the features with the largest |AUC - 0.5| of each code are kept, with a note.
    """
    used = np.flatnonzero(np.diff(members.indptr))
    measured, measured_names = fill_missing(observed.measured, observed.measured_names)
    parts = []
    for kind, x, names in (
        ("model", observed.features, observed.feature_names),
        ("measured", measured, measured_names),
    ):
        if names:
            parts.append(_profiles(members, x, used) | {"kind": np.full((used.size, len(names)), kind)})
            parts[-1]["feature"] = np.broadcast_to(np.array(names), (used.size, len(names)))
    columns = {name: np.concatenate([part[name] for part in parts], axis=1) for name in parts[0]}
    columns["q"] = false_discovery_rate(columns["p"])
    F = columns["q"].shape[1]
    codes = np.repeat(used, F).reshape(-1, F)
    if (num_features := max(1, _MAX_TABLE_ROWS // max(used.size, 1))) < F:
        notes.append(f"features: only the {num_features} with the largest |AUC - 0.5| of each code")
        best = np.sort(np.argsort(-np.abs(columns["auc"] - 0.5), axis=1, kind="stable")[:, :num_features], axis=1)
        columns = {name: np.take_along_axis(values, best, 1) for name, values in columns.items()}
        codes = codes[:, :num_features]
    order = ("kind", "feature", "q25", "median", "q75", "median_all", "robust_z", "auc", "p", "q")
    return {**code_columns(observed, codes.ravel()), **{name: columns[name].ravel() for name in order}}


def _profiles(members: csr_matrix, x: NDArray[np.floating], used: NDArray[np.int64]) -> Table:
    """Columns of `features_table`, each [used codes, F]."""
    median, scale = robust_scale(x)
    q25, own, q75 = code_quartiles(members, x)[:, used]
    auc, p = code_auc(members, x)
    return {
        "q25": q25,
        "median": own,
        "q75": q75,
        "median_all": np.broadcast_to(median, own.shape),
        "robust_z": np.divide(own - median, scale, out=np.zeros_like(own), where=scale > 0),
        "auc": auc[used],
        "p": p[used],
    }


def fill_missing(x: NDArray[np.float32], names: list[str]) -> tuple[NDArray[np.float32], list[str]]:
    """Non-constant columns and their names, with NaN replaced by the column median."""
    medians = {}
    for i in range(x.shape[1]):
        known = x[np.isfinite(x[:, i]), i]
        if known.size and known.min() < known.max():
            medians[i] = np.median(known)
    filled = np.ascontiguousarray(x[:, list(medians)])
    for column, median in zip(filled.T, medians.values(), strict=True):
        column[~np.isfinite(column)] = median
    return filled, [names[i] for i in medians]


def samples_table(observed: Observations, per_kind: int, generator: np.random.Generator) -> Table:
    """Example operators of each code: the nearest, random ones, and those nearest to another code."""
    columns: dict[str, list[int | str | float]] = {
        name: [] for name in ("all_code", "kind", "rank", "row", "distance", "margin")
    }
    codebooks = observed.codebooks
    for g, first in enumerate(codebooks.offsets[:-1].tolist()):
        distance, margin = observed.distance[:, g], observed.margin[:, g]
        for code, rows in enumerate(_rows_by_code(observed.tokens[:, g], codebooks.num_codes[g])):
            chosen = {
                "nearest": rows[np.argsort(distance[rows], kind="stable")[:per_kind]],
                "random": generator.permutation(rows)[:per_kind],
                "boundary": rows[np.argsort(margin[rows], kind="stable")[:per_kind]],
            }
            for kind, examples in chosen.items():
                for rank, row in enumerate(examples.tolist()):
                    values = (first + code, kind, rank, int(observed.rows[row]), distance[row], margin[row])
                    for column, value in zip(columns.values(), values, strict=True):
                        column.append(value)
    codes = np.array(columns.pop("all_code"), np.int64)
    return {**code_columns(observed, codes), **{name: np.array(values) for name, values in columns.items()}}


def _rows_by_code(tokens: NDArray[np.int64], codes: int) -> list[NDArray[np.int64]]:
    order = np.argsort(tokens.astype(np.int32), kind="stable")
    ends = np.cumsum(np.bincount(tokens, minlength=codes))
    return np.split(order, ends[:-1].tolist())
