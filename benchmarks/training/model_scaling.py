"""Arithmetic of larger runs: from measured steps to 64 ranks and a billion rows, and which resource ends first.

    python -m benchmarks.training.model_scaling benchmarks/results/rank_scaling_cpu.json
    python -m benchmarks.training.model_scaling RESULTS.json --bandwidth 200 --latency 20 --memory 80

A step of W ranks on B rows takes

    fixed + per_row * B / W + messages * latency + 2 (W - 1) / W * bytes / bandwidth        (ring all-reduce)

`fixed` (launches, optimizer, topographic term, decoders of codes: the same on every rank) and `per_row` are fitted to
the steps of one process in RESULTS, a file of `rank_scaling`. Latency and bandwidth are fitted to its largest number of
ranks that does not exceed the cores, or are given. The fit is then compared with every other row of RESULTS; numbers
beyond the measured ones are predictions.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Costs:
    """Fitted costs of a step."""

    fixed: float  # seconds a step
    per_row: float  # seconds a row
    latency: float  # seconds a message
    bandwidth: float  # bytes a second
    messages: float  # a step
    exchanged: float  # bytes a step

    def step(self, rows: float, ranks: int) -> float:
        """Seconds of a step."""
        return self.fixed + self.per_row * rows / ranks + self.communication(ranks)

    def communication(self, ranks: int) -> float:
        """Seconds of a step's collective operations."""
        if ranks == 1:
            return 0.0
        return self.messages * self.latency + 2.0 * (ranks - 1) / ranks * self.exchanged / self.bandwidth


def fit(result: Mapping[str, Any], latency: float | None, bandwidth: float | None) -> Costs:
    """Costs from the rows of a `rank_scaling` file; raises SystemExit if they do not determine them."""
    rows = result["rows"]
    alone = sorted({(r["batch_per_step"], r["step_ms"] / 1e3) for r in rows if r["ranks"] == 1})
    if len({batch for batch, _ in alone}) < 2:
        raise SystemExit("the file needs steps of one process with two batch sizes: rank_scaling --batches 512 2048")
    (small, fast), (large, slow) = alone[0], alone[-1]
    per_row = (slow - fast) / (large - small)
    shared = [r for r in rows if 1 < r["ranks"] <= result["environment"]["cores"]]
    if not shared:
        raise SystemExit("the file needs steps of several ranks, at most as many as cores")
    widest = max(shared, key=lambda r: r["ranks"])
    messages, exchanged = widest["messages_per_step"], widest["bytes_per_step"]
    latency = 50e-6 if latency is None else latency
    if bandwidth is None:
        spent = max(widest["collective_ms"] / 1e3 - messages * latency, 1e-6)
        bandwidth = 2.0 * (widest["ranks"] - 1) / widest["ranks"] * exchanged / spent
    return Costs(fast - per_row * small, per_row, latency, bandwidth, messages, exchanged)


def resources(rows: float, features: int, ranks: int, local: int) -> dict[str, float]:
    """Bytes that a run needs: per rank in memory, per host on disk."""
    return {
        "order of rows, per rank": 8.0 * rows,
        "epoch's row numbers, per rank": 8.0 * rows / ranks,
        "encoded matrix, per host on disk": 4.0 * rows * features,
        "encoded matrix in memory, per host": 4.0 * rows * features * local,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("results", type=Path)
    options.add_argument("--latency", type=float, help="microseconds a message; assumed 50 if not given")
    options.add_argument("--bandwidth", type=float, help="GB/s of the all-reduce; fitted if not given")
    options.add_argument("--memory", type=float, default=64.0, help="GB of a host")
    options.add_argument("--disk", type=float, default=4000.0, help="GB of a host's file system")
    options.add_argument("--local", type=int, default=8, help="ranks of a host")
    options.add_argument("--batch", type=int, default=512, help="rows a step of one rank")
    options.add_argument("--features", type=int, default=172)
    chosen = options.parse_args(arguments)
    result = json.loads(chosen.results.read_text())
    latency = None if chosen.latency is None else chosen.latency * 1e-6
    bandwidth = None if chosen.bandwidth is None else chosen.bandwidth * 1e9
    costs = fit(result, latency, bandwidth)
    write = sys.stdout.write
    write(
        f"fixed {costs.fixed * 1e3:.2f} ms a step, {costs.per_row * 1e6:.1f} us a row, "
        f"{costs.messages:.0f} messages and {costs.exchanged / 1e6:.2f} MB a step at {costs.bandwidth / 1e9:.2f} GB/s\n"
        "\nmeasured beside the model (ms a step; more ranks than cores share them and are left out)\n"
    )
    for row in result["rows"]:
        if row["ranks"] <= result["environment"]["cores"]:
            predicted = costs.step(row["batch_per_step"], row["ranks"]) * 1e3
            error = predicted / row["step_ms"] - 1.0
            write(
                f"{row['scaling']:6} {row['batch_per_step']:6} rows {row['ranks']} ranks: "
                f"{row['step_ms']:8.2f} {predicted:8.2f} ({error:+.0%})\n"
            )
    write("\npredicted, relative to one rank\nranks  strong (512 rows)  strong (8,192 rows)  weak (512 a rank)\n")
    for ranks in (1, 2, 4, 8, 16, 32, 64):
        strong = [costs.step(rows, 1) / costs.step(rows, ranks) for rows in (512, 8192)]
        weak = ranks * costs.step(512, 1) / costs.step(512 * ranks, ranks)
        write(f"{ranks:5}  {strong[0]:17.2f}  {strong[1]:19.2f}  {weak:17.2f}\n")
    write(f"\nrows, {chosen.features} features, batch {chosen.batch} a rank: an epoch, and what is exceeded first\n")
    for exponent in range(5, 10):
        rows = 10.0**exponent
        for ranks in (1, 8, 64):
            local = min(ranks, chosen.local)
            steps = math.ceil(rows / (chosen.batch * ranks))
            seconds = steps * costs.step(chosen.batch * ranks, ranks)
            write(f"{rows:14,.0f} {ranks:3} ranks: {seconds:12,.1f} s  {limits(rows, ranks, local, chosen)}\n")


def limits(rows: float, ranks: int, local: int, chosen: argparse.Namespace) -> str:
    """The resources of a host that a run exceeds, in the order in which they end as rows grow."""
    needs = resources(rows, chosen.features, ranks, local)
    order = local * (needs["order of rows, per rank"] + needs["epoch's row numbers, per rank"]) / 1e9
    disk = needs["encoded matrix, per host on disk"] / 1e9
    memory = needs["encoded matrix in memory, per host"] / 1e9
    exceeded = []
    if memory > chosen.memory:
        exceeded.append(f"the matrix ({memory:,.0f} GB) does not fit memory: {disk:,.0f} GB go to disk")
    if order > chosen.memory:
        exceeded.append(f"the order of rows takes {order:,.0f} GB of memory")
    if disk > chosen.disk:
        exceeded.append(f"the matrix exceeds the disk of {chosen.disk:,.0f} GB")
    return "; ".join(exceeded) or "fits memory"


if __name__ == "__main__":
    main()
