"""Tokens against conditions, and tokens against tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from spinlock_fast.analysis.codes import code_columns
from spinlock_fast.analysis.conditions import Condition
from spinlock_fast.analysis.contingency import PermutationTest, contingency, settle
from spinlock_fast.analysis.observations import Observations
from spinlock_fast.analysis.significance import Counts, false_discovery_rate, hypergeometric_p, wilson_interval
from spinlock_fast.analysis.tables import Table

_MOST_PAIRED_CODES = 2000


def associations_table(
    observed: Observations, conditions: Sequence[Condition], alpha: float, generator: np.random.Generator
) -> Table:
    """A row per codebook and condition: adjusted mutual information beside its permutation null.

    Columns: information (nats), ami, null_q95 (95 % quantile of the AMI of shuffled labels), tables (drawn), p, and q
    over all rows.
    """
    books = observed.books
    tests = [
        PermutationTest(
            contingency(observed.tokens[:, g], condition.codes, (books.num_codes[g], len(condition.levels))), generator
        )
        for g in range(len(books.names))
        for condition in conditions
    ]
    settle(tests, alpha)
    p = np.array([test.p for test in tests])
    g = np.repeat(np.arange(len(books.names)), len(conditions))
    return {
        "codebook": np.array(books.names)[g],
        "category": np.array(books.categories)[g],
        "level": np.array(books.levels)[g],
        "condition": np.tile(np.array([c.name for c in conditions], dtype=str), len(books.names)),
        "kind": np.tile(np.array([c.kind for c in conditions], dtype=str), len(books.names)),
        "information_nats": np.array([test.information for test in tests]),
        "ami": np.array([test.ami for test in tests]),
        "null_q95": np.array([test.null_quantile(0.95) for test in tests]),
        "tables": np.array([test.tables for test in tests], np.int64),
        "p": p,
        "q": false_discovery_rate(p),
    }


def lifts_table(observed: Observations, conditions: Sequence[Condition], counts: Counts) -> Table:
    """A row per used code and level of a condition.

    share = P(level | code); lift = share / P(level), its interval that of the share (Wilson, 95 %) over P(level);
    p of Fisher's exact test, q over all rows.
    """
    N = len(observed.tokens)
    used = np.flatnonzero(counts)
    codes = observed.tokens + observed.books.offsets[:-1]
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
    """A row per pair of codes of two categories that meet more, or less, often than chance has it (q <= alpha).

    lift = P(a and b) / (P(a) P(b)); p of Fisher's exact test; q over all pairs of used codes.
    """
    N = len(observed.tokens)
    used = np.flatnonzero(counts)
    if used.size > _MOST_PAIRED_CODES:
        used = np.sort(used[np.argsort(-counts[used], kind="stable")[:_MOST_PAIRED_CODES]])
        notes.append(f"pairs of codes were sought among the {_MOST_PAIRED_CODES:,} codes with most operators")
    book = np.searchsorted(observed.books.offsets, used, side="right") - 1
    number = {name: i for i, name in enumerate(observed.books.of_category())}
    category = np.array([number[name] for name in observed.books.categories])[book]
    own = members[used]
    together = np.asarray((own @ own.T).todense(), np.int64)
    first, second = np.nonzero(category[:, None] < category[None])
    n = together[first, second]
    a, b = counts[used[first]], counts[used[second]]
    p = hypergeometric_p(n, a, b, N)
    q = false_discovery_rate(p)
    kept = np.flatnonzero(q <= alpha)
    kept = kept[np.argsort(p[kept], kind="stable")]
    expected = a * b / N
    table: Table = {f"{name}_a": values for name, values in code_columns(observed, used[first[kept]]).items()}
    table |= {f"{name}_b": values for name, values in code_columns(observed, used[second[kept]]).items()}
    return table | {
        "count": n[kept],
        "expected": expected[kept],
        "lift": n[kept] / expected[kept],
        "p": p[kept],
        "q": q[kept],
    }


def code_counts(observed: Observations) -> Counts:
    """[sum K] operators of each code."""
    codes: NDArray[np.int64] = observed.tokens + observed.books.offsets[:-1]
    return np.bincount(codes.ravel(), minlength=int(observed.books.offsets[-1]))
