"""A training step against the same mathematics in plain PyTorch, measured in turns; and what the step goes to.

    python benchmarks/bench_train_step.py                          # one thread, then two
    python benchmarks/bench_train_step.py --device cuda --threads 8

Model and baseline run in processes of their own, on the same data, with the same number of threads and
torch's default settings; the baseline's gradients are compared with the model's before anything is timed.
Rounds of a few steps alternate between the two, so that what else the machine does meets both.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from baseline_model import BaselineModel, baseline_of, translate
from timing import environment, percentiles

from spinlock_fast.benchmark import step_seconds, training_run
from spinlock_fast.models.losses import LossWeights, loss_terms
from spinlock_fast.models.vqvae import CategoricalHierarchicalVQVAE

# Names that the profiler gives the parts of a step.
PARTS = {
    "category networks and shared decoder": ("GroupedMLP",),
    "projection heads": ("ScaledOutputLinear", "Normalize", "RaggedLayerNorm"),
    "quantizers": ("spinlock_fast::vq_assign", "spinlock_fast::ema_update"),
    "partial decoders": ("PartialLoss",),
    "topographic loss": ("Correlations",),
    "optimizer": ("aten::_fused_adam",),
}


class BaselineRun:
    """Steps of the baseline as one writes them."""

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
    """Largest difference between gradients of a model and its baseline, relative to each parameter's largest entry.

    The model as it is, in float32; the baseline in float64. Both without dropout.
    """
    model.eval()
    baseline = baseline_of(model).double().eval()
    weights = LossWeights(1.0, 1.0, 0.1, 0.1, 0.3)
    loss_terms(model, x, model(x), topo_samples).total(weights).backward()
    baseline.loss(x.double(), topo_samples).backward()
    found = translate(model, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    model.zero_grad()
    model.train()
    return max(
        float((found[name].double() - p.grad).abs().max() / p.grad.abs().max())
        for name, p in baseline.named_parameters()
        if p.grad is not None
    )


def breakdown(run: Any, steps: int = 10) -> dict[str, float]:
    """Milliseconds a step by part, on a CPU, under the profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        seconds = step_seconds(run, steps)
    all_steps = steps + 5  # those of the warm-up are profiled as well
    rows = {event.key: event.cpu_time_total / 1e3 / all_steps for event in profile.key_averages()}
    parts = {
        part: sum(ms for name, ms in rows.items() if name.startswith(prefixes)) for part, prefixes in PARTS.items()
    }
    parts["rest"] = statistics.mean(seconds) * 1e3 - sum(parts.values())
    return parts


def work(chosen: argparse.Namespace) -> None:
    """A process that times steps on request: a number of steps in, a line of seconds out."""
    torch.set_num_threads(chosen.threads)
    run = training_run(chosen.batch, device=chosen.device, topo_samples=chosen.topo_samples)
    if chosen.work == "baseline":
        # The start of the model's weights: at random codes some gradients are sums that all but vanish.
        error = largest_gradient_error(run.model, run.x_train[: chosen.batch], chosen.topo_samples)
        assert error < 1e-5, f"gradients differ by {error}"
        baseline = BaselineRun(run.model, run.x_train, chosen.batch, chosen.topo_samples)
        answer: dict[str, Any] = {"gradient_error": error}
    else:
        answer = {"breakdown_ms": breakdown(run)} if chosen.device == "cpu" else {}
    print(json.dumps(answer), flush=True)  # noqa: T201
    for line in sys.stdin:
        steps = int(line)
        seconds = baseline.step_seconds(steps) if chosen.work == "baseline" else step_seconds(run, steps)
        print(json.dumps(seconds), flush=True)  # noqa: T201


class Worker:
    """One of the two processes."""

    def __init__(self, kind: str, chosen: argparse.Namespace, threads: int) -> None:
        command = [sys.executable, __file__, "--work", kind, "--threads", str(threads), "--device", chosen.device]
        command += ["--batch", str(chosen.batch), "--topo-samples", str(chosen.topo_samples)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if kind == "model" else None,  # the profiler talks
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
        self.said: dict[str, Any] = self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a process of the benchmark ended: {self.process.wait()}")
        return json.loads(line)

    def seconds(self, steps: int) -> list[float]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        found: list[float] = self._answer()
        return found

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def compare(chosen: argparse.Namespace, threads: int) -> dict[str, Any]:
    """Rounds of both in turn; the ratio of a round is that of its medians."""
    baseline, model = Worker("baseline", chosen, threads), Worker("model", chosen, threads)
    slow: list[float] = []
    fast: list[float] = []
    ratios = []
    for i in range(chosen.rounds + 1):
        times = [worker.seconds(chosen.steps) for worker in (baseline, model)]
        if i == 0:
            continue  # the first warms both up
        slow += times[0]
        fast += times[1]
        ratios.append(statistics.median(times[0]) / statistics.median(times[1]))
    said = {**baseline.said, **model.said}
    for worker in (baseline, model):
        worker.close()
    cuts = statistics.quantiles(ratios, n=10, method="inclusive")
    return {
        "threads": threads,
        "batch": chosen.batch,
        "topo_samples": chosen.topo_samples,
        "baseline": percentiles(slow),
        "model": percentiles(fast),
        "ratio": {"p20": cuts[1], "p50": cuts[4], "p80": cuts[7], "rounds": len(ratios)},
        "ratio_of_medians": statistics.median(slow) / statistics.median(fast),
        **said,
    }


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--topo-samples", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=5, help="of each process in a round")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--work", choices=["baseline", "model"], help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.work:
        chosen.threads = chosen.threads[0]
        work(chosen)
        return
    rows = [compare(chosen, threads) for threads in chosen.threads]
    found = {**environment(), "results": rows}
    if chosen.output:
        chosen.output.write_text(json.dumps(found, indent=1) + "\n")
    for row in rows:
        print(  # noqa: T201
            f"{row['threads']} threads: baseline {row['baseline']['p50_us'] / 1e3:.1f} ms, "
            f"model {row['model']['p50_us'] / 1e3:.1f} ms, ratio {row['ratio']['p50']:.2f} "
            f"(p20 {row['ratio']['p20']:.2f}, p80 {row['ratio']['p80']:.2f}); "
            f"gradients differ by {row['gradient_error']:.1e}"
        )
        for part, ms in row.get("breakdown_ms", {}).items():
            print(f"    {ms:7.2f} ms  {part}")  # noqa: T201


if __name__ == "__main__":
    main()
