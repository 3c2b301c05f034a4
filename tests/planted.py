"""Synthetic operators whose tokens depend on one parameter, or on none."""

from __future__ import annotations

from typing import Any

import numpy as np

from spinlock_fast.analysis.observations import Codebooks, Observations

SIZES = {"slow": 4, "fast": 3}  # features of the categories
NUM_CODES = [6, 4, 3, 6, 4, 3]


def planted_codebooks(seed: int = 0) -> Codebooks:
    rng = np.random.default_rng(seed)
    names = [(category, level) for category in SIZES for level in range(3)]
    return Codebooks(
        [f"{category}/L{level}" for category, level in names],
        [category for category, _ in names],
        [level for _, level in names],
        NUM_CODES,
        [rng.standard_normal((codes, 4)).astype(np.float32) for codes in NUM_CODES],
    )


def operators(rows: int, *, seed: int, dependent: bool = True) -> Observations:
    """Tokens of category "slow" depend on theta "step" with noise, where `dependent`; others are independent.

    Features of "slow" follow its level-0 token; other features, parameters and labels are noise.
    """
    rng = np.random.default_rng(seed)
    theta = rng.random((rows, 3))
    tokens = np.stack([rng.integers(0, codes, rows) for codes in NUM_CODES], 1)
    if dependent:
        for g in range(3):
            noisy = np.clip(theta[:, 0] + 0.1 * rng.standard_normal(rows), 0, 0.999)
            tokens[:, g] = (noisy * NUM_CODES[g]).astype(np.int64)
    features = rng.standard_normal((rows, 7)).astype(np.float32)
    if dependent:
        features[:, :2] += tokens[:, :1]
    return Observations(
        planted_codebooks(),
        np.arange(rows) * 10,
        tokens,
        rng.random((rows, 6), dtype=np.float32),
        rng.random((rows, 6), dtype=np.float32),
        features,
        [f"family::feature_{i}" for i in range(7)],
        {"slow": [0, 1, 2, 3], "fast": [4, 5, 6]},
        rng.standard_normal((rows, 2)).astype(np.float32),
        ["family: raw_0", "family: raw_1"],
        {"step": theta[:, 0], "width": theta[:, 1], "depth": np.floor(theta[:, 2] * 3)},
        {
            "initial condition": rng.choice(["waves", "blobs", "grf"], rows),
            "noise regime": rng.choice(["low", "high"], rows),
        },
    )


def rows_where(table: dict[str, Any], **values: object) -> np.ndarray[Any, Any]:
    """Indices of the rows of a table with the given column values."""
    chosen = np.ones(len(next(iter(table.values()))), bool)
    for name, value in values.items():
        chosen &= table[name] == value
    return np.flatnonzero(chosen)
