"""Seconds of the token statistics at the size of the baseline: `python benchmarks/bench_analysis.py [--measured 423]`.

100,000 operators with 33 tokens of 484 codes and 172 features; tokens of the first category follow one parameter of
twelve, which the answer must tell before a time is printed. `--measured` adds columns of the file, as real data have.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
from timing import environment

from spinlock_fast.analysis import AnalysisConfig, analyze_observations
from spinlock_fast.analysis.observations import Codebooks, Observations
from spinlock_fast.config.schema import LevelConfig
from spinlock_fast.quantize.sizing import size_codebooks

SIZES = [4, 16, 15, 13, 32, 28, 20, 10, 11, 14, 9]
RATIOS = (0.5, 1.0, 1.5)


def observations(rows: int, measured: int) -> Observations:
    """Operators of noise, but for the features and tokens of category 0, which follow theta_0."""
    rng = np.random.default_rng(0)
    theta = rng.random((rows, 12))
    factor = rng.standard_normal((rows, len(SIZES))).astype(np.float32)
    factor[:, 0] += 2.0 * theta[:, 0]
    features = np.repeat(factor, SIZES, axis=1)
    features += 0.3 * rng.standard_normal(features.shape, dtype=np.float32)
    levels = [(f"cluster_{c + 1}", i, level) for c, n in enumerate(SIZES) for i, level in enumerate(books(n))]
    tokens = np.empty((rows, len(levels)), np.int64)
    for g, (_, _, level) in enumerate(levels):
        z = factor[:, g // 3] + 0.4 * rng.standard_normal(rows)
        tokens[:, g] = np.clip((z + 2) / 4 * level.num_tokens, 0, level.num_tokens - 1)
    codebooks = Codebooks(
        [f"{name}/L{i}" for name, i, _ in levels],
        [name for name, _, _ in levels],
        [i for _, i, _ in levels],
        [level.num_tokens for _, _, level in levels],
        [rng.standard_normal((level.num_tokens, level.latent_dim)).astype(np.float32) for _, _, level in levels],
    )
    ends = np.cumsum(SIZES)
    return Observations(
        codebooks,
        np.arange(rows),
        tokens,
        rng.random((rows, len(levels)), dtype=np.float32),
        rng.random((rows, len(levels)), dtype=np.float32),
        features,
        [f"features::{i}" for i in range(features.shape[1])],
        {f"cluster_{c + 1}": list(range(end - n, end)) for c, (n, end) in enumerate(zip(SIZES, ends, strict=True))},
        rng.standard_normal((rows, measured), dtype=np.float32),
        [f"measured {i}" for i in range(measured)],
        {f"theta_{i}": theta[:, i] for i in range(12)},
        {
            "initial condition": rng.choice([f"kind {i}" for i in range(10)], rows),
            "evolution policy": rng.choice(["residual", "convex"], rows),
            "noise regime": rng.choice(["low", "medium", "high"], rows),
        },
    )


def books(features: int) -> list[LevelConfig]:
    return size_codebooks(features, RATIOS)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rows", type=int, default=100_000)
    options.add_argument("--measured", type=int, default=0)
    chosen = options.parse_args()
    observed = observations(chosen.rows, chosen.measured)
    wall, processor = time.perf_counter(), time.process_time()
    found = analyze_observations(observed, AnalysisConfig())
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    table = found.tables["associations"]
    right = {(b, "theta_0") for b in ("cluster_1/L0", "cluster_1/L1", "cluster_1/L2")}
    told = table["q"] <= 0.05
    assert set(zip(table["codebook"][told].tolist(), table["condition"][told].tolist(), strict=True)) == right
    seconds = {"seconds": round(wall, 1), "processor_seconds": round(processor, 1), **found.summary["seconds"]}
    print(json.dumps({"rows": chosen.rows, "measured": chosen.measured, **seconds, **environment()}))  # noqa: T201


if __name__ == "__main__":
    main()
