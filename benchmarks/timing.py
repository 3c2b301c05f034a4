"""Timing on a CUDA device or the CPU, and the rows of a results file."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def environment() -> dict[str, Any]:
    """What a result rests on: device, versions, date, commit."""
    cuda = torch.cuda.is_available()
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    return {
        "device": torch.cuda.get_device_name() if cuda else f"{platform.processor() or platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": triton_version,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "commit": os.environ.get("COMMIT", "unknown"),
    }


def percentiles(seconds: list[float]) -> dict[str, float]:
    """p20, p50 and p80 in microseconds."""
    if len(seconds) < 3:
        middle = statistics.median(seconds)
        return {"p20_us": middle * 1e6, "p50_us": middle * 1e6, "p80_us": middle * 1e6, "runs": len(seconds)}
    cuts = statistics.quantiles(seconds, n=10, method="inclusive")
    return {"p20_us": cuts[1] * 1e6, "p50_us": cuts[4] * 1e6, "p80_us": cuts[7] * 1e6, "runs": len(seconds)}


def time_calls(
    run: Callable[[], object], device: torch.device, repeats: int = 20, budget: float = 5.0
) -> dict[str, float]:
    """Each call by itself, after two that are not counted: CUDA events, or the clock of the CPU."""
    for _ in range(2):
        run()
    seconds: list[float] = []
    started = time.perf_counter()
    while len(seconds) < repeats and (len(seconds) < 3 or time.perf_counter() - started < budget):
        if device.type == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            run()
            last.record()
            last.synchronize()
            seconds.append(first.elapsed_time(last) / 1e3)
        else:
            before = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - before)
    return percentiles(seconds)


def time_graph(run: Callable[[], object], calls: int = 20, repeats: int = 200) -> dict[str, float]:
    """A call inside a CUDA graph that holds `calls` of them, so that gaps between launches do not count."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    timed = time_calls(graph.replay, torch.device("cuda"), repeats)
    return {key: value / calls if key.endswith("_us") else value for key, value in timed.items()}


def peak_memory(run: Callable[[], object]) -> int:
    """Bytes that a call allocates at most on the CUDA device, beyond what there was."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def write(path: str | Path, rows: list[dict[str, Any]]) -> None:
    """Results with their environment; written at once, so that a cut-off run keeps the last whole state."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    partial.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")
    partial.replace(target)
