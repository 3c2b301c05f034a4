"""Drop-in quantizers beside vector-quantize-pytorch: a training step (forward, backward, update) and its peak memory.

    python -m benchmarks.kernels.bench_dropin                          # ratio of alternating steps, and peak memory
    pytest benchmarks/kernels/bench_dropin.py --benchmark-only

8,192 rows (65,536 on a GPU), D = 64, K = 1,024. Steps of both libraries alternate, so that other load on the machine
affects both. Codes, outputs and gradients are compared before anything is timed.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch

import spinlock_fast
from benchmarks.common.timing import peak_memory

DIM, CODES, STAGES = 64, 1024, 8
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "vq": ("VectorQuantize", {}),
    "cosine": ("VectorQuantize", {"use_cosine_sim": True}),
    "rvq": ("ResidualVQ", {"num_quantizers": STAGES}),
}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROWS = 65536 if DEVICE.type == "cuda" else 8192


def pair(layer: str, dim: int = DIM) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The layer of vector-quantize-pytorch and ours, with equal codes of the scale of the latents."""
    import vector_quantize_pytorch as peer

    name, options = LAYERS[layer]
    torch.manual_seed(0)
    theirs = getattr(peer, name)(dim=dim, codebook_size=CODES, **options).to(DEVICE)
    ours = getattr(spinlock_fast, name)(dim=dim, codebook_size=CODES, **options).to(DEVICE)
    for stage, module in enumerate(theirs.layers if layer == "rvq" else [theirs]):
        codes = torch.randn(1, CODES, dim, device=DEVICE) * 0.7**stage
        codes = torch.nn.functional.normalize(codes, dim=-1) if options.get("use_cosine_sim") else codes
        module._codebook.embed.copy_(codes)
        module._codebook.embed_avg.copy_(codes)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def step(layer: torch.nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Forward, backward and update; returns output, codes and gradient of the input."""
    leaf = x.detach().requires_grad_()
    quantized, codes, loss = layer(leaf)
    (quantized.sum() + loss.sum()).backward()
    assert leaf.grad is not None
    if x.is_cuda:
        torch.cuda.synchronize()
    return quantized.detach(), codes, leaf.grad


def latents(rows: int = ROWS, dim: int = DIM) -> torch.Tensor:
    return torch.randn(8, rows // 8, dim, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(1))


def checked_pair(layer: str, rows: int = ROWS, dim: int = DIM) -> tuple[torch.nn.Module, torch.nn.Module, torch.Tensor]:
    """The pair and its input, after one step in which codes, outputs and gradients agreed."""
    theirs, ours = pair(layer, dim)
    x = latents(rows, dim)
    (expected, codes, grads), (actual, actual_codes, actual_grads) = step(theirs, x), step(ours, x)
    same = (codes == actual_codes).view(rows, -1).all(1)  # they may differ where two codes are equally near
    assert same.double().mean() > 0.999, "the codes differ"
    for one, other in ((expected, actual), (grads, actual_grads)):
        one, other = one.view(rows, dim)[same], other.view(rows, dim)[same]
        assert (one - other).norm() < 1e-3 * one.norm(), "the numbers differ"
    return theirs, ours, x


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("whose", ["theirs", "ours"])
@pytest.mark.parametrize("layer", LAYERS)
def bench_dropin(benchmark: Any, layer: str, whose: str) -> None:
    pytest.importorskip("vector_quantize_pytorch", reason="pip install vector-quantize-pytorch")
    theirs, ours, x = checked_pair(layer)
    benchmark.pedantic(step, (ours if whose == "ours" else theirs, x), rounds=7, warmup_rounds=1)


def alternating(layer: str, rounds: int) -> Iterator[tuple[float, float]]:
    """Milliseconds of alternating steps: (theirs, ours)."""
    theirs, ours, x = checked_pair(layer)
    for _ in range(rounds):
        times = []
        for module in (theirs, ours):
            start = time.perf_counter()
            step(module, x)
            times.append(1e3 * (time.perf_counter() - start))
        yield times[0], times[1]


def main() -> None:
    warnings.filterwarnings("ignore")
    print(f"{ROWS} rows, {DIM} dimensions, {CODES} codes, {DEVICE}, {torch.get_num_threads()} threads")
    for layer in LAYERS:
        times = list(alternating(layer, 9))[1:]
        theirs, ours = (statistics.median(column) for column in zip(*times, strict=True))
        ratio = statistics.median(one / other for one, other in times)
        first, second, x = checked_pair(layer)
        memory = [peak_memory(partial(step, module, x), DEVICE.type) / 2**20 for module in (first, second)]
        print(
            f"{layer:7} theirs {theirs:8.1f} ms, ours {ours:7.1f} ms, {ratio:5.1f} times; "
            f"peak memory {memory[0]:7.1f} and {memory[1]:6.1f} MiB"
        )


if __name__ == "__main__":
    main()
