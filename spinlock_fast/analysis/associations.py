"""Associations of tokens with conditions, and of tokens with each other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from spinlock_fast.analysis.codes import code_columns
from spinlock_fast.analysis.conditions import Condition
from spinlock_fast.analysis.contingency import PermutationTest, run_permutation_tests
from spinlock_fast.analysis.observations import Observations
from spinlock_fast.analysis.significance import Counts, false_discovery_rate, hypergeometric_p, wilson_interval
from spinlock_fast.analysis.tables import Table
from spinlock_fast.features.mutual_information import contingency

_MAX_PAIRED_CODES = 2000


def associations_table(
    observed: Observations, conditions: Sequence[Condition], alpha: float, generator: np.random.Generator
) -> Table:
    """One row per codebook and condition: adjusted mutual information and its permutation test.

    Columns: information (nats), ami, null_q95 (95 % quantile of the AMI under permutation), tables (number drawn), p,
    and q over all rows.
    """
    codebooks = observed.codebooks
    tests = [
        PermutationTest(
            contingency(observed.tokens[:, g], condition.codes, (codebooks.num_codes[g], len(condition.levels))),
            generator,
        )
        for g in range(len(codebooks.names))
        for condition in conditions
    ]
    run_permutation_tests(tests, alpha)
    p = np.array([test.p for test in tests])
    g = np.repeat(np.arange(len(codebooks.names)), len(conditions))
    return {
        "codebook": np.array(codebooks.names)[g],
        "category": np.array(codebooks.categories)[g],
        "level": np.array(codebooks.levels)[g],
        "condition": np.tile(np.array([c.name for c in conditions], dtype=str), len(codebooks.names)),
        "kind": np.tile(np.array([c.kind for c in conditions], dtype=str), len(codebooks.names)),
        "information_nats": np.array([test.information for test in tests]),
        "ami": np.array([test.ami for test in tests]),
        "null_q95": np.array([test.null_quantile(0.95) for test in tests]),
        "tables": np.array([test.tables for test in tests], np.int64),
        "p": p,
        "q": false_discovery_rate(p),
    }


def lifts_table(observed: Observations, conditions: Sequence[Condition], counts: Counts) -> Table:
    """One row per code in use and level of a condition.

    share = P(level | code); lift = share / P(level) with the 95 % Wilson interval of the share divided by P(level);
    p of Fisher's exact test, q over all rows.
    """
    N = len(observed.tokens)
    used = np.flatnonzero(counts)
    codes = observed.tokens + observed.codebooks.offsets[:-1]
    parts = []
    for condition in conditions:
        L = len(condition.levels)
        together = np.bincount((codes * L + condition.codes[:, None]).ravel(), minlength=counts.size * L)
        both = together.reshape(-1, L)[used]  # [codes in use, L]
        n, of_level = counts[used][:, None], condition.counts
        base = of_level / N
        low, high = wilson_interval(both, n)
        parts.append(
            {
                **code_columns(observed, np.repeat(used, L)),
                "condition": np.full(both.size, condition.name),
                "value": np.tile(np.array(condition.levels), used.size),
                "count": both.ravel(),
                "expected": (n * base).ravel(),
                "share": (both / n).ravel(),
                "lift": (both / n / base).ravel(),
                "lift_low": (low / base).ravel(),
                "lift_high": (high / base).ravel(),
                "p": hypergeometric_p(both, n, of_level, N).ravel(),
            }
        )
    table = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}
    return table | ({"q": false_discovery_rate(table["p"])} if parts else {})


def cooccurrence_table(
    observed: Observations, members: csr_matrix, counts: Counts, alpha: float, notes: list[str]
) -> Table:
    """One row per pair of codes of two categories that co-occur more or less often than by chance (q <= alpha).

    lift = P(a and b) / (P(a) P(b)); p of Fisher's exact test; q over all pairs of codes in use.
    """
    N = len(observed.tokens)
    used = np.flatnonzero(counts)
    if used.size > _MAX_PAIRED_CODES:
        used = np.sort(used[np.argsort(-counts[used], kind="stable")[:_MAX_PAIRED_CODES]])
        notes.append(f"pairs of codes were tested among the {_MAX_PAIRED_CODES:,} most frequent codes")
    codebook = np.searchsorted(observed.codebooks.offsets, used, side="right") - 1
    number = {name: i for i, name in enumerate(observed.codebooks.by_category())}
    category = np.array([number[name] for name in observed.codebooks.categories])[codebook]
    own = members[used]
    together = np.asarray((own @ own.T).todense(), np.int64)
    first, second = np.nonzero(category[:, None] < category[None])
    n = together[first, second]
    a, b = counts[used[first]], counts[used[second]]
    p = hypergeometric_p(n, a, b, N)
    q = false_discovery_rate(p)
    significant = np.flatnonzero(q <= alpha)
    significant = significant[np.argsort(p[significant], kind="stable")]
    expected = a * b / N
    table: Table = {f"{name}_a": values for name, values in code_columns(observed, used[first[significant]]).items()}
    table |= {f"{name}_b": values for name, values in code_columns(observed, used[second[significant]]).items()}
    return table | {
        "count": n[significant],
        "expected": expected[significant],
        "lift": n[significant] / expected[significant],
        "p": p[significant],
        "q": q[significant],
    }


def code_counts(observed: Observations) -> Counts:
    """[sum K] number of operators of each code."""
    codes: NDArray[np.int64] = observed.tokens + observed.codebooks.offsets[:-1]
    return np.bincount(codes.ravel(), minlength=int(observed.codebooks.offsets[-1]))
