"""Host time of eager quantizer layers: a training step of few rows beside that of vector-quantize-pytorch.

    python -m benchmarks.kernels.bench_host         # fastest of alternating steps, operations, launches
    pytest benchmarks/kernels/bench_host.py --benchmark-only

Rows [2, 16, 64], 512 codes, one thread: the kernels take microseconds. The fastest of many steps is reported, which
other load on the machine changes least. Launches are those of the layer on a GPU in a forward and backward pass with
the update, without those of a loss, counted on the CPU with Triton's interpreter (`op_counts.count_launches`).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import spinlock_fast
from benchmarks.common.op_counts import count_launches, count_ops
from benchmarks.common.timing import environment, write
from spinlock_fast.dropin import dead_codes

DIM = 64
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "vq": ("VectorQuantize", {"codebook_size": 512}),
    "vq, cosine": ("VectorQuantize", {"codebook_size": 512, "use_cosine_sim": True}),
    "vq, resets": ("VectorQuantize", {"codebook_size": 512, "threshold_ema_dead_code": 2}),
    "rvq x8": ("ResidualVQ", {"codebook_size": 512, "num_quantizers": 8}),
    "rvq x8, resets": ("ResidualVQ", {"codebook_size": 512, "num_quantizers": 8, "threshold_ema_dead_code": 2}),
    "simvq": ("SimVQ", {"codebook_size": 512}),
    "fsq": ("FSQ", {"levels": [8, 5, 5, 5]}),
    "lfq": ("LFQ", {"codebook_size": 512}),
}
GROUPED = "33 codebooks"
STEPS = 300


def make(layer: str, package: Any) -> nn.Module:
    if layer == GROUPED:
        dims = [4 + 4 * (g % 7) for g in range(33)]
        return spinlock_fast.GroupedVectorQuantizer([8 + g for g in range(33)], dims, codebook_init="uniform")
    name, options = LAYERS[layer]
    torch.manual_seed(0)
    module: nn.Module = getattr(package, name)(dim=DIM, **options)
    return module


def inputs(module: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if isinstance(module, spinlock_fast.GroupedVectorQuantizer):
        return torch.randn(32, sum(module.dims), generator=generator)
    return torch.randn(2, 16, DIM, generator=generator)


def step(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Forward, backward and update; returns output, codes and gradient of the input."""
    leaf = x.detach().requires_grad_()
    returned = module(leaf)
    quantized, codes = returned[:2]
    total = quantized.sum()
    if len(returned) > 2:
        total = total + returned[2].sum()
    total.backward()
    return quantized.detach(), codes, leaf.grad


def checked(layer: str) -> tuple[nn.Module, nn.Module | None]:
    """Our layer and that of vector-quantize-pytorch, None without it, after equal results of a step."""
    ours = make(layer, spinlock_fast)
    try:
        import vector_quantize_pytorch as peer
    except ImportError:
        return ours, None
    if layer == GROUPED:
        return ours, None
    theirs = make(layer, peer)
    theirs.load_state_dict(ours.state_dict())
    x = inputs(ours)
    for one, other in zip(step(ours, x), step(theirs, x), strict=True):
        if one is not None and other is not None:
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    return ours, theirs


def alternating(modules: list[nn.Module], x: Tensor, steps: int) -> list[float]:
    """Microseconds of the fastest step of each module."""
    fastest = [float("inf")] * len(modules)
    for _ in range(steps):
        for i, module in enumerate(modules):
            start = time.perf_counter()
            step(module, x)
            fastest[i] = min(fastest[i], 1e6 * (time.perf_counter() - start))
    return fastest


def pass_of_layer(module: nn.Module, x: Tensor) -> Callable[[], object]:
    """Forward, backward and update with given gradients: the operations of the layer only. Runs once for caches."""
    leaf = x.detach().requires_grad_()
    grads: list[Tensor] = []

    def run() -> object:
        returned = module(leaf)
        outputs = [output for output in (returned[0], *returned[2:]) if output.requires_grad]
        if not grads:
            grads.extend(torch.ones_like(output) for output in outputs)
        return torch.autograd.grad(outputs, leaf, grads)

    run()
    return run


def steady(module: nn.Module, x: Tensor) -> Callable[[], object]:
    """A step, after one that creates caches."""
    step(module, x)
    return partial(step, module, x)


def rows_of(layer: str, steps: int) -> list[dict[str, Any]]:
    ours, theirs = checked(layer)
    x = inputs(ours)
    modules = {"spinlock-fast": ours, **({} if theirs is None else {"vector-quantize-pytorch": theirs})}
    rows = []
    for (name, module), fastest in zip(modules.items(), alternating(list(modules.values()), x, steps), strict=True):
        rows.append({"layer": layer, "package": name, "fastest_us": fastest})
        rows[-1]["aten_ops"] = count_ops(steady(module, x)).total()
    return rows


def launches_of(layer: str) -> dict[str, int]:
    """Launches of our layer, by name, from a process that runs the kernels in Triton's interpreter."""
    variables = {"TRITON_INTERPRET": "1", "SPINLOCK_FAST_BACKEND": "triton"}
    command = [sys.executable, "-m", "benchmarks.kernels.bench_host", "--launches", layer]
    found = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=True)
    launches: dict[str, int] = json.loads(found.stdout.splitlines()[-1])
    return launches


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layer", [*LAYERS, GROUPED])
def bench_host(benchmark: Any, layer: str) -> None:
    if layer in LAYERS:
        pytest.importorskip("vector_quantize_pytorch", reason="pip install vector-quantize-pytorch")
    ours, _ = checked(layer)
    benchmark.pedantic(step, (ours, inputs(ours)), rounds=50, warmup_rounds=5)


def main() -> None:
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--layers", nargs="+", choices=[*LAYERS, GROUPED], default=[*LAYERS, GROUPED])
    parser.add_argument("--output", help="results file")
    parser.add_argument("--skip-launches", action="store_true", help="do not count launches, which takes a minute")
    parser.add_argument("--launches", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.launches:
        module = make(arguments.launches, spinlock_fast)
        with mock.patch.object(dead_codes, "slots_at_once", lambda device, slots: slots):  # as on a GPU
            print(json.dumps(count_launches(pass_of_layer(module, inputs(module)))))
        return
    print(environment("cpu"))
    rows: list[dict[str, Any]] = []
    for layer in arguments.layers:
        found = rows_of(layer, arguments.steps)
        if not arguments.skip_launches and type(make(layer, spinlock_fast)).__module__.startswith("spinlock_fast"):
            found[0]["launches"] = sum(launches_of(layer).values())
        rows += found
        for row in found:
            print(
                f"{layer:15} {row['package']:24} {row['fastest_us']:9.0f} us {row['aten_ops']:6} aten operations"
                f" {row.get('launches', '-'):>5} launches",
                flush=True,
            )
        if arguments.output:
            write(arguments.output, rows)


if __name__ == "__main__":
    main()
