"""Timing and peak memory on a CPU or CUDA device, and results files."""

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
    """Device, versions, date, commit and load of the machine, for a results file."""
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
        "commit": os.environ.get("COMMIT") or commit(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
    }


def commit() -> str:
    """Short hash of the git commit, "unknown" outside a repository."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return result.stdout.strip() or "unknown"


def percentiles(seconds: list[float]) -> dict[str, float]:
    """p20, p50 and p80 in microseconds; the median three times for fewer than three measurements."""
    if len(seconds) < 3:
        deciles = [statistics.median(seconds)] * 9
    else:
        deciles = statistics.quantiles(seconds, n=10, method="inclusive")
    times = {name: deciles[i] * 1e6 for name, i in (("p20_us", 1), ("p50_us", 4), ("p80_us", 7))}
    return {**times, "runs": len(seconds)}


def time_calls(
    run: Callable[[], object], device: torch.device, repeats: int = 20, budget: float = 5.0
) -> dict[str, float]:
    """Times single calls after two warm-up calls, by CUDA events or the CPU clock; `budget` in seconds."""
    for _ in range(2):
        run()
    seconds: list[float] = []
    started = time.perf_counter()
    while len(seconds) < repeats and (len(seconds) < 3 or time.perf_counter() - started < budget):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            seconds.append(start.elapsed_time(end) / 1e3)
        else:
            before = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - before)
    return percentiles(seconds)


def time_graph(run: Callable[[], object], calls: int = 20, repeats: int = 200) -> dict[str, float]:
    """Times a call inside a CUDA graph of `calls` calls, without the gaps between launches."""
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
    times = time_calls(graph.replay, torch.device("cuda"), repeats)
    return {key: value / calls if key.endswith("_us") else value for key, value in times.items()}


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Exponent b of the least-squares fit log(value) = log(a) + b log(size): 1 is linear, 0 is constant."""
    x = [math.log(size) for size in sizes]
    y = [math.log(value) for value in values]
    return statistics.linear_regression(x, y).slope


def peak_memory(run: Callable[[], object], device: str = "cuda") -> int:
    """Peak bytes that a call allocates on the device; on a CPU, through torch's allocator."""
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
    allocated = peak = 0
    assert profile.profiler is not None
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            allocated += event.nbytes()
            peak = max(peak, allocated)
    return peak


def write(path: str | Path, rows: list[dict[str, Any]], device: str = "cuda", **facts: Any) -> None:
    """Writes results, `facts` and the environment to a JSON file, atomically."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    partial.write_text(json.dumps({"environment": environment(device), **facts, "rows": rows}, indent=1) + "\n")
    partial.replace(target)
