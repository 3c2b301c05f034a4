"""Timing on a CUDA device or the CPU, and the rows of a results file."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch


def environment(device: str = "cuda") -> dict[str, Any]:
    """What a result rests on: device (the CPU where CUDA is not there), versions, date, commit, load of the machine."""
    cuda = torch.device(device).type == "cuda" and torch.cuda.is_available()
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
        "commit": os.environ.get("COMMIT") or _commit(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
    }


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return found.stdout.strip() or "unknown"


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


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """b of the fit value = a * size ** b, by least squares of logarithms: 1 where it is linear, 0 where it is flat."""
    x = [math.log(size) for size in sizes]
    y = [math.log(value) for value in values]
    return statistics.linear_regression(x, y).slope


def peak_memory(run: Callable[[], object], device: str = "cuda") -> int:
    """Bytes that a call holds at most on the device, beyond what there was; on a CPU those of torch's allocator."""
    if torch.device(device).type != "cuda":
        return _peak_on_cpu(run)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _peak_on_cpu(run: Callable[[], object]) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    held = most = 0
    assert profile.profiler is not None
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def write(path: str | Path, rows: list[dict[str, Any]], device: str = "cuda", **facts: Any) -> None:
    """Results with their environment; written at once, so that a cut-off run keeps the last whole state."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    partial.write_text(json.dumps({"environment": environment(device), **facts, "rows": rows}, indent=1) + "\n")
    partial.replace(target)
