"""Times the token statistics of `analyze` at full size.

    python -m benchmarks.data.analysis [--measured 423]

100,000 operators with 33 tokens, 484 codes and 172 features. The tokens of the first category depend on one of twelve
parameters, and the statistics must find exactly this association. `--measured` adds measured columns, as in real files.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np

from benchmarks.common.timing import environment
from spinlock_fast.analysis import AnalysisConfig, analyze_observations
from spinlock_fast.analysis.observations import Codebooks, Observations
from spinlock_fast.benchmark import SEED_FEATURES
from spinlock_fast.quantize.sizing import size_codebooks

RATIOS = (0.5, 1.0, 1.5)


def observations(rows: int, measured: int) -> Observations:
    """Random observations; only features and tokens of the first category depend on theta_0."""
    rng = np.random.default_rng(0)
    theta = rng.random((rows, 12))
    factor = rng.standard_normal((rows, len(SEED_FEATURES))).astype(np.float32)
    factor[:, 0] += 2.0 * theta[:, 0]
    features = np.repeat(factor, SEED_FEATURES, axis=1)
    features += 0.3 * rng.standard_normal(features.shape, dtype=np.float32)
    names = [f"cluster_{c + 1}" for c in range(len(SEED_FEATURES))]
    sizes = [size_codebooks(n, RATIOS) for n in SEED_FEATURES]
    levels = [(name, i, level) for name, own in zip(names, sizes, strict=True) for i, level in enumerate(own)]
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
    ends = np.cumsum(SEED_FEATURES)
    return Observations(
        codebooks,
        np.arange(rows),
        tokens,
        rng.random((rows, len(levels)), dtype=np.float32),
        rng.random((rows, len(levels)), dtype=np.float32),
        features,
        [f"features::{i}" for i in range(features.shape[1])],
        {name: list(range(end - n, end)) for name, n, end in zip(names, SEED_FEATURES, ends, strict=True)},
        rng.standard_normal((rows, measured), dtype=np.float32),
        [f"measured {i}" for i in range(measured)],
        {f"theta_{i}": theta[:, i] for i in range(12)},
        {
            "initial condition": rng.choice([f"kind {i}" for i in range(10)], rows),
            "evolution policy": rng.choice(["residual", "convex"], rows),
            "noise regime": rng.choice(["low", "medium", "high"], rows),
        },
    )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rows", type=int, default=100_000)
    options.add_argument("--measured", type=int, default=0)
    chosen = options.parse_args()
    observed = observations(chosen.rows, chosen.measured)
    wall, cpu = time.perf_counter(), time.process_time()
    result = analyze_observations(observed, AnalysisConfig())
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    table = result.tables["associations"]
    expected = {(codebook, "theta_0") for codebook in ("cluster_1/L0", "cluster_1/L1", "cluster_1/L2")}
    significant = table["q"] <= 0.05
    pairs = zip(table["codebook"][significant].tolist(), table["condition"][significant].tolist(), strict=True)
    assert set(pairs) == expected
    seconds = {"seconds": round(wall, 1), "processor_seconds": round(cpu, 1), **result.summary["seconds"]}
    print(json.dumps({"rows": chosen.rows, "measured": chosen.measured, **seconds, **environment()}))


if __name__ == "__main__":
    main()
