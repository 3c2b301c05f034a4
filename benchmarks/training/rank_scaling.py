"""Training steps of several ranks beside those of one process: step time, time of collective operations, bytes.

    python -m benchmarks.training.rank_scaling --output rank_scaling.json             # 1, 2 and 4 Gloo processes
    python -m benchmarks.training.rank_scaling --ranks 1 2 --batches 512 --steps 5

Strong scaling divides a batch among the ranks; weak scaling gives each rank a batch. Every process uses one thread.
Rounds of the numbers of ranks alternate, so that a change of the machine's load affects all of them. With more ranks
than cores, processes share cores: the result says how many there are. Before a time is reported, the losses of the
ranks are compared with those of one process.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

from benchmarks.common.timing import write
from spinlock_fast.benchmark import SEED_FEATURES, step_seconds, training_run
from spinlock_fast.distributed import Ranks

_LOSS_STEPS = 3  # compared with one process


@dataclass
class Traffic:
    """Collective operations of a rank."""

    seconds: float = 0.0
    messages: int = 0
    received_bytes: int = 0


@dataclass(frozen=True)
class TimedRanks(Ranks):
    """Ranks that record their collective operations on tensors."""

    traffic: Traffic = field(default_factory=Traffic, compare=False)

    def sum_(self, tensor: Tensor) -> Tensor:
        return self._timed(lambda: Ranks.sum_(self, tensor), tensor.nbytes)

    def gather_into(self, output: Tensor, tensor: Tensor) -> Tensor:
        return self._timed(lambda: Ranks.gather_into(self, output, tensor), output.nbytes)

    def _timed(self, operation: Any, size: int) -> Tensor:
        if self.size == 1:
            return operation()  # type: ignore[no-any-return]
        started = time.perf_counter()
        result: Tensor = operation()
        self.traffic.seconds += time.perf_counter() - started
        self.traffic.messages += 1
        self.traffic.received_bytes += size
        return result


def measure(rank: int, world: int, directory: str, batch: int, topo_samples: int, steps: int) -> None:
    """Times steps in one process and writes its result to `directory`."""
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=world)
    ranks = TimedRanks(rank, world, rank, world)
    run = training_run(batch, SEED_FEATURES, topo_samples, ranks=ranks)
    torch.manual_seed(0)  # the ranks draw the same numbers
    step_seconds(run, _LOSS_STEPS)
    losses = run.training_step.loss_values[:_LOSS_STEPS].clone()
    before = Traffic(**vars(ranks.traffic))
    seconds = step_seconds(run, steps)
    traffic = ranks.traffic
    count = steps + 5  # step_seconds warms up first
    torch.save(
        {
            "seconds": seconds,
            "collective_seconds": (traffic.seconds - before.seconds) / count,
            "messages": (traffic.messages - before.messages) / count,
            "bytes": (traffic.received_bytes - before.received_bytes) / count,
            "losses": losses,
        },
        f"{directory}/{rank}.pt",
    )
    if world > 1:
        dist.destroy_process_group()


def measured(world: int, batch: int, topo_samples: int, steps: int) -> dict[str, Any]:
    """The result of rank 0, with the largest median step time of the ranks."""
    with tempfile.TemporaryDirectory() as directory:
        arguments = (world, directory, batch, topo_samples, steps)
        torch.multiprocessing.start_processes(measure, arguments, nprocs=world, start_method="spawn")
        results = [torch.load(f"{directory}/{rank}.pt", weights_only=True) for rank in range(world)]
    return {**results[0], "seconds": max(statistics.median(result["seconds"]) for result in results)}


def scaling(worlds: Sequence[int], batches: Sequence[int], steps: int, rounds: int) -> list[dict[str, Any]]:
    """One row per scaling, batch and number of ranks; times are medians over the rounds."""
    rows = []
    for kind in ("strong", "weak"):
        for batch in batches:
            results: dict[int, list[dict[str, Any]]] = {world: [] for world in worlds}
            for _ in range(rounds):
                for world in worlds:
                    total = batch * world if kind == "weak" else batch
                    results[world].append(measured(world, total, min(512, batch), steps))
            for world in worlds:
                if kind == "strong":
                    difference = (results[world][0]["losses"] - results[worlds[0]][0]["losses"]).abs().max()
                    assert float(difference) < 1e-3, f"{world} ranks: the losses differ by {float(difference):.2g}"
                seconds = statistics.median(result["seconds"] for result in results[world])
                alone = statistics.median(result["seconds"] for result in results[worlds[0]])
                rows.append(
                    {
                        "scaling": kind,
                        "batch_per_step": batch * world if kind == "weak" else batch,
                        "ranks": world,
                        "step_ms": seconds * 1e3,
                        "collective_ms": 1e3 * statistics.median(r["collective_seconds"] for r in results[world]),
                        "messages_per_step": results[world][0]["messages"],
                        "bytes_per_step": results[world][0]["bytes"],
                        "rows_per_second": (batch * world if kind == "weak" else batch) / seconds,
                        "speedup": alone / seconds * (world / worlds[0] if kind == "weak" else 1.0),
                    }
                )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    options.add_argument("--batches", type=int, nargs="+", default=[512, 2048])
    options.add_argument("--steps", type=int, default=15)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--output", type=Path)
    chosen = options.parse_args(arguments)
    rows = scaling(chosen.ranks, chosen.batches, chosen.steps, chosen.rounds)
    if chosen.output:
        write(chosen.output, rows, "cpu", threads_per_rank=1)
    for row in rows:
        sys.stdout.write(
            f"{row['scaling']:6} {row['batch_per_step']:6} rows {row['ranks']} ranks: {row['step_ms']:8.2f} ms a step, "
            f"{row['collective_ms']:6.2f} in {row['messages_per_step']:.0f} messages of together "
            f"{row['bytes_per_step'] / 1e6:.2f} MB, {row['speedup']:.2f} times one process\n"
        )


if __name__ == "__main__":
    main()
