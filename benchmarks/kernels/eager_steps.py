"""Eager training steps of the drop-in quantizers beside vector-quantize-pytorch, with launches and device time.

    python -m benchmarks.kernels.eager_steps --output eager.json

Each row is a layer at one shape: milliseconds of alternating steps (forward, backward, update; synchronised), their
ratio, and on a GPU the kernels of a step, the time that the device works, and the step in a CUDA graph of
`torch.cuda.make_graphed_callables`. Codes, outputs and gradients are compared before anything is timed. On a CPU the
sizes are small.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest import mock

import torch

from benchmarks.common.timing import peak_memory, write
from benchmarks.kernels import bench_dropin
from benchmarks.kernels.bench_dropin import DEVICE, checked_pair, step
from spinlock_fast.kernels._common import operator
from spinlock_fast.kernels.ema_update import averages
from spinlock_fast.kernels.residual_vq import eager

ON_GPU = DEVICE.type == "cuda"
# Layer, rows, dimensions.
CASES = [
    *[(layer, rows, 256) for rows in (65536, 4096) for layer in ("vq", "cosine")],
    *[(layer, 65536, 64) for layer in ("vq", "cosine", "rvq")],
    ("rvq", 4096, 64),
]
SMALL = [("vq", 64, 256), ("cosine", 64, 64), ("rvq", 64, 64)]
ROUNDS = 30 if ON_GPU else 3


def milliseconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def kernels_of(run: Callable[[], object]) -> dict[str, float]:
    """Number of kernels and copies of a step on the device, and the sum of their times.

    Under the profiler, quantizers call the operators of `torch.library`; the patches keep the path of eager mode.
    """
    from torch.autograd import DeviceType

    with ExitStack() as stack:
        for module in (operator, averages, eager):
            stack.enter_context(mock.patch.object(module, "is_plain_call", return_value=True))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run()
            torch.cuda.synchronize()
    events = [event for event in profile.events() if event.device_type == DeviceType.CUDA]
    return {"kernels": len(events), "device_ms": sum(event.device_time for event in events) / 1e3}


def graphed(module: torch.nn.Module, x: torch.Tensor) -> Callable[[], object]:
    """A step of a copy of the module, captured in CUDA graphs."""
    layer = torch.cuda.make_graphed_callables(copy.deepcopy(module), (x.clone().requires_grad_(),))
    return partial(step, layer, x)


def row_of(layer: str, rows: int, dim: int) -> dict[str, Any]:
    theirs, ours, x = checked_pair(layer, rows, dim)
    runs = {"theirs": partial(step, theirs, x), "ours": partial(step, ours, x)}
    if ON_GPU:
        runs["ours, graph"] = graphed(ours, x)
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            times[name].append(milliseconds(run))
    row: dict[str, Any] = {"layer": layer, "rows": rows, "dim": dim, "codes": bench_dropin.CODES}
    for name, values in times.items():
        row[name] = {"p50_ms": statistics.median(values), "least_ms": min(values)}
    row["ratio"] = statistics.median(one / two for one, two in zip(times["theirs"], times["ours"], strict=True))
    for name in ("theirs", "ours"):
        row[name] |= {"peak_bytes": peak_memory(runs[name], DEVICE.type)}
        row[name] |= kernels_of(runs[name]) if ON_GPU else {}
    return row


def main() -> None:
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for case in CASES if ON_GPU else SMALL:
        rows.append(row_of(*case))
        row = rows[-1]
        text = ", ".join(f"{name} {row[name]['p50_ms']:.3f} ms" for name in row if isinstance(row[name], dict))
        kernels = f", {row['ours']['kernels']:.0f} kernels" if ON_GPU else ""
        print(
            f"{row['layer']:7} {row['rows']:6} x {row['dim']:3}: {text}, {row['ratio']:.1f} times{kernels}", flush=True
        )
        write(arguments.output, rows)


if __name__ == "__main__":
    main()
