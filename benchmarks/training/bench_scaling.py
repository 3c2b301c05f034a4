"""Time and memory of training steps and quantizers against data set size, batch size, and codebook number and size.

    python -m benchmarks.training.bench_scaling                    # small on a CPU, all sizes on a CUDA device
    python -m benchmarks.training.bench_scaling --device cpu --full
    pytest benchmarks/training/bench_scaling.py --benchmark-only   # small

Axes:
    data                 a training step of 512 rows from a data set of N rows; its time must not depend on N
    batch                a training step of B rows
    codebooks            a training step with G codebooks of 16 codes, three per category, total width 990
    quantizer codebooks  the quantizer of these codebooks
    quantizer rows       the quantizer of the 33 codebooks of the 100K run on N rows
    quantizer codes      one codebook of K codes of 64 dimensions: time, and memory compared with a matrix [N, K]

Quantizers run forward, backward and update with random codes, after their codes were compared with float64. A training
step must change every parameter and have a finite loss.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.common.commands import ROOT
from benchmarks.common.quantizer_layers import (
    check_nearest,
    grouped_quantizer,
    quantizer_step,
    random_inputs,
    seed_layout,
)
from benchmarks.common.timing import exponent, peak_memory, percentiles, time_calls, write
from spinlock_fast.benchmark import SEED_FEATURES, step_seconds, training_run
from spinlock_fast.device import resolve_device
from spinlock_fast.kernels._common.layout import CodebookLayout

WIDTH, CODES = 990, 16  # of the codebooks axis: sum of code dimensions, and codes per codebook
LEVELS = 3  # codebooks per category
_FEATURES = 330  # of the codebooks axis, split evenly over categories

# Sizes by axis: on every device, and additional ones on a CUDA device or with --full.
SIZES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "data": ((1000, 10_000, 100_000), (1_000_000,)),
    "batch": ((64, 512, 2048), (8192, 65_536)),
    "codebooks": ((3, 33, 99), (9, 330)),
    "quantizer codebooks": ((3, 9, 33, 99, 330), ()),
    "quantizer rows": ((64, 512, 4096, 16_384), (65_536, 1_000_000)),
    "quantizer codes": ((256, 1024, 4096), (16_384,)),
}
# Expected exponents of time: 0 constant, 1 linear in the size.
EXPECTED = {
    "data": 0.0,
    "batch": 1.0,
    "quantizer codebooks": 0.0,
    "quantizer rows": 1.0,
    "quantizer codes": 1.0,
}


def sizes_of(axis: str, full: bool) -> list[int]:
    """Sizes of an axis, ascending."""
    small, large = SIZES[axis]
    return sorted((*small, *large) if full else small)


def timed_steps(steps: int, device: str, rows: int, batch: int, features: Sequence[int], **options: Any) -> Any:
    """Times training steps on `rows` random rows, after checking that a step changes all parameters."""
    x = torch.randn(rows, sum(features), generator=torch.Generator().manual_seed(0))
    run = training_run(batch, features, device=device, x=x, **options)
    assert run.training_step.x.shape[0] == rows
    before = [p.detach().clone() for p in run.model.parameters()]
    step_seconds(run, 1)
    unchanged = [i for i, (a, p) in enumerate(zip(before, run.model.parameters(), strict=True)) if torch.equal(a, p)]
    assert not unchanged, f"parameters {unchanged} did not change"
    assert math.isfinite(run.training_step.summary().loss)
    return percentiles(step_seconds(run, steps))


def data(size: int, device: torch.device, steps: int) -> dict[str, Any]:
    return dict(timed_steps(steps, str(device), size, min(512, size), SEED_FEATURES))


def batch(size: int, device: torch.device, steps: int) -> dict[str, Any]:
    return dict(timed_steps(steps, str(device), 2 * size, size, SEED_FEATURES))


def codebooks(size: int, device: torch.device, steps: int) -> dict[str, Any]:
    """A training step with three codebooks per category."""
    categories = size // LEVELS
    features = [_FEATURES // categories + (i < _FEATURES % categories) for i in range(categories)]
    levels = [{"num_tokens": CODES, "latent_dim": WIDTH // size}] * LEVELS
    return dict(timed_steps(steps, str(device), 1024, 512, features, model__levels=levels))


def quantizer(
    rows: int, num_codes: Sequence[int], dims: Sequence[int], device: torch.device, repeats: int
) -> dict[str, Any]:
    """Forward, backward and update of a layer, after comparing its codes with float64."""
    z, codes = random_inputs(rows, num_codes, dims, device)
    layer = grouped_quantizer(codes)
    check_nearest(z, layer.embedding, CodebookLayout.of(num_codes, dims), layer.backend)
    step = partial(quantizer_step, layer, z)
    times = time_calls(step, device, repeats)
    return {**times, "peak_bytes": peak_memory(step, device.type), "input_bytes": z.nbytes}


def quantizer_codebooks(size: int, device: torch.device, steps: int) -> dict[str, Any]:
    rows = 65_536 if device.type == "cuda" else 2048
    return {**quantizer(rows, [CODES] * size, [WIDTH // size] * size, device, steps), "latent_rows": rows}


def quantizer_rows(size: int, device: torch.device, steps: int) -> dict[str, Any]:
    layout = seed_layout()
    return quantizer(size, layout.num_codes, layout.dims, device, steps)


def quantizer_codes(size: int, device: torch.device, steps: int) -> dict[str, Any]:
    """One codebook; its peak memory must be far below that of a matrix [rows, codes]."""
    rows = 65_536 if device.type == "cuda" else 16_384
    result = quantizer(rows, [size], [64], device, steps)
    matrix = 4 * rows * size
    linear = 8 * 4 * 64 * (rows + size)  # a few copies of latents and codes
    assert result["peak_bytes"] < linear + matrix / 8, f"{result['peak_bytes']} bytes: a matrix [N, K] has {matrix}"
    return {**result, "latent_rows": rows, "n_by_k_bytes": matrix}


MEASURE: dict[str, Callable[[int, torch.device, int], dict[str, Any]]] = {
    "data": data,
    "batch": batch,
    "codebooks": codebooks,
    "quantizer codebooks": quantizer_codebooks,
    "quantizer rows": quantizer_rows,
    "quantizer codes": quantizer_codes,
}


def growth(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Fitted exponents per axis: time over all sizes and between the two largest, and memory."""
    exponents: dict[str, dict[str, float]] = {}
    for axis in dict.fromkeys(row["axis"] for row in rows if "p50_us" in row):
        points = sorted((row for row in rows if row["axis"] == axis and "p50_us" in row), key=lambda row: row["size"])
        if len(points) < 2:
            continue
        sizes, times = [row["size"] for row in points], [row["p50_us"] for row in points]
        exponents[axis] = {"time": exponent(sizes, times), "time, largest": exponent(sizes[-2:], times[-2:])}
        if all("peak_bytes" in row for row in points):
            exponents[axis]["memory"] = exponent(sizes, [row["peak_bytes"] for row in points])
    return exponents


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the command; returns rows and exponents."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, help="of torch; default: torch's")
    parser.add_argument("--full", action="store_true", help="all sizes on a CPU: minutes, and 12 GB")
    parser.add_argument("--axes", nargs="*", choices=list(MEASURE), default=list(MEASURE))
    parser.add_argument("--most", type=int, help="largest size")
    parser.add_argument("--steps", type=int, default=15, help="maximum number of timed steps per size")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/scaling.json")
    chosen = parser.parse_args(arguments)
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    device = resolve_device(chosen.device)
    rows: list[dict[str, Any]] = []
    for axis in chosen.axes:
        for size in sizes_of(axis, chosen.full or device.type == "cuda"):
            if chosen.most and size > chosen.most:
                continue
            try:
                result = MEASURE[axis](size, device, chosen.steps)
            except torch.OutOfMemoryError:
                result = {"error": "out of memory"}
            rows.append({"axis": axis, "size": size, **result, "load": os.getloadavg()[0]})
            print(format_row(rows[-1]), flush=True)
            write(chosen.output, rows, device.type, exponents=growth(rows))
    exponents = growth(rows)
    for axis, powers in exponents.items():
        expected = f"; expected {EXPECTED[axis]:g}" if axis in EXPECTED else ""
        print(f"{axis}: " + ", ".join(f"{name} ^{power:.2f}" for name, power in powers.items()) + expected)
    return {"rows": rows, "exponents": exponents}


def format_row(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{row['axis']:20} {row['size']:9,}  {row['error']}"
    memory = f" {row['peak_bytes'] / 2**20:9.1f} MiB" if "peak_bytes" in row else ""
    return f"{row['axis']:20} {row['size']:9,} {row['p50_us'] / 1e3:12.3f} ms{memory}"


@pytest.fixture(scope="module")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("size", [3, 33, 330])
def bench_quantizer_at_equal_width(benchmark: Any, device: torch.device, size: int) -> None:
    num_codes, dims = [CODES] * size, [WIDTH // size] * size
    z, codes = random_inputs(2048, num_codes, dims, device)
    layer = grouped_quantizer(codes)
    check_nearest(z, layer.embedding, CodebookLayout.of(num_codes, dims), layer.backend)

    def run() -> None:
        quantizer_step(layer, z)
        if z.is_cuda:
            torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=5, warmup_rounds=2)


@pytest.mark.parametrize("rows", [1000, 10_000])
def bench_step_by_data(benchmark: Any, device: torch.device, rows: int) -> None:
    x = torch.randn(rows, sum(SEED_FEATURES), generator=torch.Generator().manual_seed(0))
    run = training_run(512, device=str(device), x=x)
    step_seconds(run, 1)
    assert math.isfinite(run.training_step.summary().loss)
    benchmark.pedantic(lambda: step_seconds(run, 1), rounds=3)


if __name__ == "__main__":
    main()
