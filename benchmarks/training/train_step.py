"""A training step beside the same mathematics in plain PyTorch, and the time of its parts.

    python -m benchmarks.training.train_step                          # one thread, then two
    python -m benchmarks.training.train_step --shape seed wide --batch 64 128 512 2048     # a table of shapes
    python -m benchmarks.training.train_step --device cuda --threads 8

Model and baseline run in separate processes, on the same data, with the same number of threads and torch's default
settings. Their gradients are compared before anything is timed. Rounds of a few steps alternate, so that other load on
the machine affects both.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.common.baseline_model import BaselineModel, baseline_of, translate
from benchmarks.common.commands import ROOT
from benchmarks.common.timing import environment, percentiles
from spinlock_fast.benchmark import SEED_FEATURES, step_seconds, training_run
from spinlock_fast.kernels._common.native import library
from spinlock_fast.models.losses import LossWeights, loss_terms
from spinlock_fast.models.vqvae import CategoricalHierarchicalVQVAE

# Features of each category: those of the seed's discovery, and few wide ones, as the quickstart's data have.
SHAPES = {"seed": SEED_FEATURES, "wide": (97, 73, 52, 46)}

# Native operations, by part of a step.
PARTS = {
    "category networks": ("mlp_forward", "mlp_backward"),
    "shared decoder": ("code_mlp_forward", "code_mlp_backward"),
    "projection heads": (
        "output_linear",
        "output_linear_backward",
        "normalize",
        "normalize_backward",
        "segments",
        "segments_backward",
    ),
    "quantizers": ("assign", "assign_backward", "average_codes", "code_cosines"),
    "partial decoders": ("decoders_forward", "decoders_backward"),
    "topographic loss": ("topo_forward", "topo_backward"),
    "optimizer": ("_fused_adam_",),
}


class BaselineRun:
    """A plain PyTorch training loop of the baseline."""

    def __init__(self, model: CategoricalHierarchicalVQVAE, x: Tensor, batch: int, topo_samples: int) -> None:
        self.model: BaselineModel = baseline_of(model).train()
        self.x, self.batch, self.topo_samples = x, batch, topo_samples
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)

    def step_seconds(self, steps: int) -> list[float]:
        order = torch.randperm(self.x.shape[0], device=self.x.device)
        seconds = []
        for i in range(steps):
            started = _clock(self.x.device)
            first = i * self.batch % (self.x.shape[0] - self.batch + 1)
            rows = self.x[order[first : first + self.batch]]
            self.optimizer.zero_grad()
            self.model.loss(rows, self.topo_samples).backward()
            self.optimizer.step()
            seconds.append(_clock(self.x.device) - started)
        return seconds


def largest_gradient_error(model: CategoricalHierarchicalVQVAE, x: Tensor, topo_samples: int) -> float:
    """Largest gradient difference between a model and its baseline, relative to each parameter's largest gradient.

    The model in float32, the baseline in float64, both without dropout.
    """
    model.eval()
    baseline = baseline_of(model).double().eval()
    weights = LossWeights(1.0, 1.0, 0.1, 0.1, 0.3)
    loss_terms(model, x, model(x), topo_samples).total(weights).backward()
    baseline.loss(x.double(), topo_samples).backward()
    gradients = translate(model, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    model.zero_grad()
    model.train()
    return max(
        float((gradients[name].double() - p.grad).abs().max() / p.grad.abs().max())
        for name, p in baseline.named_parameters()
        if p.grad is not None
    )


def breakdown(run: Any, steps: int = 10) -> dict[str, float]:
    """Milliseconds per step of each part: the median of each native operation, and the rest of the median step."""
    calls: dict[str, list[float]] = {}

    def timed(name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            result = operation(*arguments, **options)
            calls.setdefault(name, []).append(time.perf_counter() - started)
            return result

        return call

    with ExitStack() as patches:
        for name in (name for names in PARTS.values() for name in names):
            owner = torch if name == "_fused_adam_" else library
            patches.enter_context(mock.patch.object(owner, name, timed(name, getattr(owner, name))))
        step = statistics.median(step_seconds(run, steps))
    medians = {name: statistics.median(seconds) * 1e3 for name, seconds in calls.items()}
    parts = {part: sum(medians.get(name, 0.0) for name in names) for part, names in PARTS.items()}
    return {**parts, "rest": step * 1e3 - sum(parts.values())}


def run_worker(chosen: argparse.Namespace) -> None:
    """Times steps on request: reads a number of steps from stdin, writes their seconds to stdout as JSON."""
    torch.set_num_threads(chosen.threads)
    (batch,), (shape,) = chosen.batch, chosen.shape
    run = training_run(batch, SHAPES[shape], chosen.topo_samples, chosen.device)
    if chosen.work == "baseline":
        # With the initial codes: with random ones, some gradients are sums that nearly cancel.
        error = largest_gradient_error(run.model, run.x_train[:batch], chosen.topo_samples)
        assert error < 1e-5, f"gradients differ by {error}"
        baseline = BaselineRun(run.model, run.x_train, batch, chosen.topo_samples)
        facts: dict[str, Any] = {"gradient_error": error}
    else:
        facts = {"breakdown_ms": breakdown(run)} if chosen.device == "cpu" else {}
    print(json.dumps(facts), flush=True)
    for line in sys.stdin:
        steps = int(line)
        seconds = baseline.step_seconds(steps) if chosen.work == "baseline" else step_seconds(run, steps)
        print(json.dumps(seconds), flush=True)


class Worker:
    """A process that times steps of the model or of the baseline."""

    def __init__(self, kind: str, chosen: argparse.Namespace, threads: int, shape: str, batch: int) -> None:
        command = [
            sys.executable,
            "-m",
            "benchmarks.training.train_step",
            "--work",
            kind,
            "--threads",
            str(threads),
            "--device",
            chosen.device,
        ]
        command += ["--shape", shape, "--batch", str(batch), "--topo-samples", str(min(batch, chosen.topo_samples))]
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
        self.facts: dict[str, Any] = self._read()

    def _read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a process of the benchmark ended: {self.process.wait()}")
        return json.loads(line)

    def seconds(self, steps: int) -> list[float]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        seconds: list[float] = self._read()
        return seconds

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def compare(chosen: argparse.Namespace, threads: int, shape: str, batch: int) -> dict[str, Any]:
    """Times alternating rounds of both; the ratio of a round is the ratio of its medians."""
    baseline, model = (Worker(kind, chosen, threads, shape, batch) for kind in ("baseline", "model"))
    baseline_seconds: list[float] = []
    model_seconds: list[float] = []
    ratios = []
    for i in range(chosen.rounds + 1):
        times = [worker.seconds(chosen.steps) for worker in (baseline, model)]
        if i == 0:
            continue  # warm-up
        baseline_seconds += times[0]
        model_seconds += times[1]
        ratios.append(statistics.median(times[0]) / statistics.median(times[1]))
    facts = {**baseline.facts, **model.facts}
    for worker in (baseline, model):
        worker.close()
    deciles = statistics.quantiles(ratios, n=10, method="inclusive")
    return {
        "threads": threads,
        "shape": shape,
        "features": SHAPES[shape],
        "batch": batch,
        "topo_samples": min(batch, chosen.topo_samples),
        "baseline": percentiles(baseline_seconds),
        "model": percentiles(model_seconds),
        "ratio": {"p20": deciles[1], "p50": deciles[4], "p80": deciles[7], "rounds": len(ratios)},
        "ratio_of_medians": statistics.median(baseline_seconds) / statistics.median(model_seconds),
        "ratio_of_minima": min(baseline_seconds) / min(model_seconds),
        "minima_ms": {"baseline": min(baseline_seconds) * 1e3, "model": min(model_seconds) * 1e3},
        **facts,
    }


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), default=["seed"])
    parser.add_argument("--batch", type=int, nargs="+", default=[512])
    parser.add_argument("--topo-samples", type=int, default=512, help="at most the batch")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=5, help="steps of each process per round")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--work", choices=["baseline", "model"], help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.work:
        chosen.threads = chosen.threads[0]
        run_worker(chosen)
        return
    rows = [
        compare(chosen, threads, shape, batch)
        for threads in chosen.threads
        for shape in chosen.shape
        for batch in chosen.batch
    ]
    if chosen.output:
        chosen.output.write_text(json.dumps({**environment(), "results": rows}, indent=1) + "\n")
    for row in rows:
        print(
            f"{row['shape']}, {row['batch']} rows, {row['threads']} threads: "
            f"baseline {row['baseline']['p50_us'] / 1e3:.1f} ms, model {row['model']['p50_us'] / 1e3:.1f} ms, "
            f"ratio {row['ratio']['p50']:.2f} (p20 {row['ratio']['p20']:.2f}, p80 {row['ratio']['p80']:.2f}; "
            f"minima {row['ratio_of_minima']:.2f}); "
            f"gradients differ by {row['gradient_error']:.1e}"
        )
        for part, ms in row.get("breakdown_ms", {}).items():
            print(f"    {ms:7.2f} ms  {part}")


if __name__ == "__main__":
    main()
