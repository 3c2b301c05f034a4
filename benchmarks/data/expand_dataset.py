"""Expands a few hundred operators to a data set of any number of rows, for timings; quality is never quoted from it.

    python -m benchmarks.data.expand_dataset data/quickstart.h5 data/100k --rows 100000

Writes data/100k/part_000.h5, part_001.h5, ..., which `dataset_path: data/100k/*.h5` reads in order, in the layout of
docs/data-format.md: chunks of 8 rows, gzip level 4.

Row n is derived from source row i = n mod K, a random row j and a random mixing factor a:

    value = r_i + a (r_j - r_i) + 0.02 s e,   a ~ U(0, 0.5), e ~ N(0, 1),

where s is the standard deviation of the value's column (for series, of its channel) in the source. Columns keep their
scales and most of their correlations. NaN in r_i stays NaN; NaN in r_j is ignored. Columns with at most 8 distinct
values keep those of r_i; all other architecture columns are clipped to [0, 1]. The values depend on source, rows and
seed, not on the number of parts and processes.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

FAMILIES = {
    "summary": "features/summary/aggregated/features",
    "temporal": "features/temporal/features",
    "architecture": "features/architecture/aggregated/features",
}
CHUNK_ROWS = 8
_BLOCK = 64  # rows per random generator; parts begin at multiples of it
_MAX_MIXING, _NOISE, _MAX_DISCRETE = 0.5, 0.02, 8


@dataclass
class Family:
    """Source rows of a family, and the properties of its columns."""

    rows: NDArray[np.float32]  # [K, ..., D]
    std: NDArray[np.float32]  # [D]
    discrete: NDArray[np.bool_]  # [D]
    bounded: bool
    attributes: dict[str, Any]

    @classmethod
    def of(cls, dataset: h5py.Dataset, name: str) -> Family:
        rows = dataset[:].astype(np.float32)
        flat = rows.reshape(-1, rows.shape[-1]).astype(np.float64)
        finite = np.isfinite(flat)
        count = np.maximum(finite.sum(0), 1)
        mean = np.where(finite, flat, 0.0).sum(0) / count
        std = np.sqrt(np.where(finite, np.square(flat - mean), 0.0).sum(0) / count)
        distinct = [len(np.unique(column[np.isfinite(column)])) for column in flat[: 1 << 16].T]
        all_attributes = (dict(node.attrs) for node in (dataset.parent, dataset))
        attributes = {key: value for attrs in all_attributes for key, value in attrs.items() if key == "feature_names"}
        return cls(
            rows, std.astype(np.float32), np.array(distinct) <= _MAX_DISCRETE, name == "architecture", attributes
        )

    def expanded_rows(self, first: int, count: int, random: np.random.Generator) -> NDArray[np.float32]:
        """Rows [first, first + count) of the expanded data set."""
        inner = (1,) * (self.rows.ndim - 1)
        base = self.rows[np.arange(first, first + count) % len(self.rows)]
        other = self.rows[random.integers(0, len(self.rows), count)]
        mixing = random.uniform(0.0, _MAX_MIXING, (count, *inner)).astype(np.float32)
        noise = random.standard_normal(base.shape, dtype=np.float32)
        mixed = base + mixing * np.where(np.isfinite(other), other - base, 0.0) + _NOISE * self.std * noise
        if self.bounded:
            mixed = mixed.clip(0.0, 1.0)
        return np.where(self.discrete, base, mixed).astype(np.float32)


def write_part(source: str, output: str, families: Sequence[str], span: tuple[int, int], seed: int) -> int:
    """Writes a file with rows [span[0], span[1]); returns its size in bytes."""
    with h5py.File(source, "r") as file:
        sources = {name: Family.of(file[FAMILIES[name]], name) for name in families}
    temporary = Path(f"{output}.partial")
    with h5py.File(temporary, "w") as file:
        for name, family in sources.items():
            shape = family.rows.shape[1:]
            rows = span[1] - span[0]
            target = file.create_dataset(
                FAMILIES[name],
                (rows, *shape),
                "f4",
                chunks=(min(CHUNK_ROWS, rows), *shape),
                compression="gzip",
                compression_opts=4,
            )
            target.attrs.update(family.attributes)
            for first in range(*span, _BLOCK):
                count = min(_BLOCK, span[1] - first)
                random = np.random.default_rng([seed, list(FAMILIES).index(name), first // _BLOCK])
                target[first - span[0] : first - span[0] + count] = family.expanded_rows(first, count, random)
    temporary.replace(output)
    return Path(output).stat().st_size


def spans(rows: int, parts: int) -> list[tuple[int, int]]:
    """Row range [first, end) of each part; parts begin at multiples of a block."""
    blocks = -(-rows // _BLOCK)
    edges = [min(blocks * i // parts * _BLOCK, rows) for i in range(parts)] + [rows]
    return [(a, b) for a, b in itertools.pairwise(edges) if a < b]


def expand(
    source: str | Path,
    directory: str | Path,
    rows: int,
    families: Sequence[str] = tuple(FAMILIES),
    seed: int = 0,
    parts: int | None = None,
    workers: int | None = None,
) -> list[Path]:
    """Writes the parts into a directory with `workers` processes; returns their paths."""
    workers = workers or len(os.sched_getaffinity(0))
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    ranges = spans(rows, parts or workers)
    paths = [directory / f"part_{i:03d}.h5" for i in range(len(ranges))]
    for stale in set(directory.glob("part_*.h5")) - set(paths):
        stale.unlink()
    # spawn: a forked copy of a process with threads may hang.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        jobs = [
            pool.submit(write_part, str(source), str(path), list(families), span, seed)
            for path, span in zip(paths, ranges, strict=True)
        ]
        for job in jobs:
            job.result()
    return paths


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command."""
    options = argparse.ArgumentParser(description="Expands operators to a large data set for timings.")
    options.add_argument("source", help="HDF5 file of real or generated operators")
    options.add_argument("directory", help="directory for part_000.h5, ...")
    options.add_argument("--rows", type=int, default=100_000)
    options.add_argument("--families", nargs="+", choices=tuple(FAMILIES), default=list(FAMILIES))
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--parts", type=int, help="number of files; default: the number of processes")
    options.add_argument("--workers", type=int, help="number of processes; default: one per core")
    chosen = options.parse_args(arguments)
    started = time.perf_counter()
    paths = expand(
        chosen.source, chosen.directory, chosen.rows, chosen.families, chosen.seed, chosen.parts, chosen.workers
    )
    size = sum(path.stat().st_size for path in paths)
    seconds = time.perf_counter() - started
    sys.stdout.write(f"{chosen.rows:,} rows in {len(paths)} files, {size / 1e9:.2f} GB, {seconds:.1f} s\n")


if __name__ == "__main__":
    main()
