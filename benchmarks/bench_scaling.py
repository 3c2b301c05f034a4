"""Training steps and quantizers against sizes: rows of the data set, batch, number and size of codebooks; and memory.

    python benchmarks/bench_scaling.py                    # small on a CPU, all sizes on a CUDA device
    python benchmarks/bench_scaling.py --device cpu --full
    pytest benchmarks/bench_scaling.py --benchmark-only   # small

Axes:
    data                 a training step of 512 rows out of a data set of N: what it costs must not depend on N
    batch                a training step of B rows
    codebooks            a training step of G codebooks, three a category, whose widths add up to 990, 16 codes each
    quantizer codebooks  the quantizer of such codebooks alone
    quantizer rows       the quantizer of the 33 codebooks of the 100K run, N rows at once
    quantizer codes      one codebook of K codes, 64 wide: time, and memory beside a matrix [N, K]

Quantizers make forward, backward and update, at random codes; a result is compared with float64 before it is timed, and
a training step must move every parameter and have a finite loss.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch
from full_run import ROOT
from kernel_times import check, seed_layout
from layer_times import ours, step
from timing import exponent, peak_memory, percentiles, time_calls, write

from spinlock_fast.benchmark import SEED_FEATURES, step_seconds, training_run
from spinlock_fast.device import resolve_device
from spinlock_fast.kernels.layout import CodebookLayout

WIDTH, CODES = 990, 16  # of the codebooks axis: summed over codebooks, and of each
LEVELS = 3  # codebooks of a category
_FEATURES = 330  # of the codebooks axis, shared out evenly

# Sizes by axis: on a CPU, and with --full or on a CUDA device as well.
SIZES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "data": ((1000, 10_000, 100_000), (1_000_000,)),
    "batch": ((64, 512, 2048), (8192, 65_536)),
    "codebooks": ((3, 33, 99), (9, 330)),
    "quantizer codebooks": ((3, 9, 33, 99, 330), ()),
    "quantizer rows": ((64, 512, 4096, 16_384), (65_536, 1_000_000)),
    "quantizer codes": ((256, 1024, 4096), (16_384,)),
}
# What an exponent of time should be: flat, or linear in the size.
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
    """Times of training steps on `rows` random rows, once the steps are known to train."""
    x = torch.randn(rows, sum(features), generator=torch.Generator().manual_seed(0))
    run = training_run(batch, features, device=device, x=x, **options)
    assert run.training_step.x.shape[0] == rows
    before = [p.detach().clone() for p in run.model.parameters()]
    step_seconds(run, 1)
    still = [i for i, (a, p) in enumerate(zip(before, run.model.parameters(), strict=True)) if torch.equal(a, p)]
    assert not still, f"parameters {still} did not move"
    assert math.isfinite(run.training_step.summary().loss)
    return percentiles(step_seconds(run, steps))


def data(size: int, device: torch.device, steps: int) -> dict[str, Any]:
    return dict(timed_steps(steps, str(device), size, min(512, size), SEED_FEATURES))


def batch(size: int, device: torch.device, steps: int) -> dict[str, Any]:
    return dict(timed_steps(steps, str(device), 2 * size, size, SEED_FEATURES))


def codebooks(size: int, device: torch.device, steps: int) -> dict[str, Any]:
    """A training step of categories of three codebooks each."""
    categories = size // LEVELS
    features = [_FEATURES // categories + (i < _FEATURES % categories) for i in range(categories)]
    levels = [{"num_tokens": CODES, "latent_dim": WIDTH // size}] * LEVELS
    return dict(timed_steps(steps, str(device), 1024, 512, features, model__levels=levels))


def quantizer(
    rows: int, num_codes: Sequence[int], dims: Sequence[int], device: torch.device, repeats: int
) -> dict[str, Any]:
    """Forward, backward and update of a layer whose codes have been compared with float64."""
    generator = torch.Generator(device).manual_seed(0)
    z = torch.randn(rows, sum(dims), device=device, generator=generator)
    codes = [torch.randn(K, D, device=device, generator=generator) for K, D in zip(num_codes, dims, strict=True)]
    layer = ours(z, list(num_codes), list(dims), codes, "auto")
    check(z, layer.embedding, CodebookLayout.of(num_codes, dims), layer.backend)
    times = time_calls(lambda: step(layer, z), device, repeats)
    return {**times, "peak_bytes": peak_memory(lambda: step(layer, z), device.type), "input_bytes": z.nbytes}


def quantizer_codebooks(size: int, device: torch.device, steps: int) -> dict[str, Any]:
    rows = 65_536 if device.type == "cuda" else 2048
    return {**quantizer(rows, [CODES] * size, [WIDTH // size] * size, device, steps), "latent_rows": rows}


def quantizer_rows(size: int, device: torch.device, steps: int) -> dict[str, Any]:
    layout = seed_layout()
    return quantizer(size, layout.num_codes, layout.dims, device, steps)


def quantizer_codes(size: int, device: torch.device, steps: int) -> dict[str, Any]:
    """One codebook; what it holds at most must stay far under a matrix of rows by codes."""
    rows = 65_536 if device.type == "cuda" else 16_384
    found = quantizer(rows, [size], [64], device, steps)
    matrix = 4 * rows * size
    own = 8 * 4 * 64 * (rows + size)  # a few copies of latents and codes
    assert found["peak_bytes"] < own + matrix / 8, f"{found['peak_bytes']} bytes: a matrix [N, K] has {matrix}"
    return {**found, "latent_rows": rows, "n_by_k_bytes": matrix}


MEASURE: dict[str, Callable[[int, torch.device, int], dict[str, Any]]] = {
    "data": data,
    "batch": batch,
    "codebooks": codebooks,
    "quantizer codebooks": quantizer_codebooks,
    "quantizer rows": quantizer_rows,
    "quantizer codes": quantizer_codes,
}


def growth(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Per axis the fitted exponents of time (over all sizes, and between the two largest) and of memory."""
    found: dict[str, dict[str, float]] = {}
    for axis in dict.fromkeys(row["axis"] for row in rows if "p50_us" in row):
        here = sorted((row for row in rows if row["axis"] == axis and "p50_us" in row), key=lambda row: row["size"])
        if len(here) < 2:
            continue
        sizes, times = [row["size"] for row in here], [row["p50_us"] for row in here]
        found[axis] = {"time": exponent(sizes, times), "time, largest": exponent(sizes[-2:], times[-2:])}
        if all("peak_bytes" in row for row in here):
            found[axis]["memory"] = exponent(sizes, [row["peak_bytes"] for row in here])
    return found


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """The command; returns rows and exponents."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, help="of torch; its default when not given")
    parser.add_argument("--full", action="store_true", help="all sizes on a CPU as well: minutes, and 12 GB")
    parser.add_argument("--axes", nargs="*", choices=list(MEASURE), default=list(MEASURE))
    parser.add_argument("--most", type=int, help="leave larger sizes out")
    parser.add_argument("--steps", type=int, default=15, help="timed at each size, at most")
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
                found = MEASURE[axis](size, device, chosen.steps)
            except torch.OutOfMemoryError:
                found = {"error": "out of memory"}
            rows.append({"axis": axis, "size": size, **found, "load": os.getloadavg()[0]})
            print(line(rows[-1]), flush=True)  # noqa: T201
            write(chosen.output, rows, device.type, exponents=growth(rows))
    exponents = growth(rows)
    for axis, powers in exponents.items():
        wanted = f"; {EXPECTED[axis]:g} wanted" if axis in EXPECTED else ""
        print(f"{axis}: " + ", ".join(f"{name} ^{power:.2f}" for name, power in powers.items()) + wanted)  # noqa: T201
    return {"rows": rows, "exponents": exponents}


def line(row: dict[str, Any]) -> str:
    """A row in words."""
    if "error" in row:
        return f"{row['axis']:20} {row['size']:9,}  {row['error']}"
    memory = f" {row['peak_bytes'] / 2**20:9.1f} MiB" if "peak_bytes" in row else ""
    return f"{row['axis']:20} {row['size']:9,} {row['p50_us'] / 1e3:12.3f} ms{memory}"


@pytest.fixture(scope="module")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("size", [3, 33, 330])
def bench_quantizer_at_equal_width(benchmark: Any, device: torch.device, size: int) -> None:
    generator = torch.Generator(device).manual_seed(0)
    num_codes, dims = [CODES] * size, [WIDTH // size] * size
    z = torch.randn(2048, WIDTH, device=device, generator=generator)
    codes = [torch.randn(K, D, device=device, generator=generator) for K, D in zip(num_codes, dims, strict=True)]
    layer = ours(z, num_codes, dims, codes, "auto")
    check(z, layer.embedding, CodebookLayout.of(num_codes, dims), layer.backend)

    def run() -> None:
        step(layer, z)
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
