"""Drop-in quantizers beside vector-quantize-pytorch: `pytest benchmarks/bench_dropin.py --benchmark-only`.

One row a layer: a training step (forward, backward, update) of 8,192 rows (65,536 on a GPU), D = 64, K = 1,024. The
ratio comes from steps that alternate, so that both meet the same neighbours: `python benchmarks/bench_dropin.py` prints
it with the peak memory of a step. Codes, outputs and gradients are compared before anything is timed.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch

import spinlock_fast

DIM, CODES, STAGES = 64, 1024, 8
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "vq": ("VectorQuantize", {}),
    "cosine": ("VectorQuantize", {"use_cosine_sim": True}),
    "rvq": ("ResidualVQ", {"num_quantizers": STAGES}),
}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROWS = 65536 if DEVICE.type == "cuda" else 8192


def pair(layer: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Theirs and ours with the same codes, spread as widely as the rows are."""
    import vector_quantize_pytorch as peer

    name, options = LAYERS[layer]
    torch.manual_seed(0)
    theirs = getattr(peer, name)(dim=DIM, codebook_size=CODES, **options).to(DEVICE)
    ours = getattr(spinlock_fast, name)(dim=DIM, codebook_size=CODES, **options).to(DEVICE)
    for stage, module in enumerate(theirs.layers if layer == "rvq" else [theirs]):
        codes = torch.randn(1, CODES, DIM, device=DEVICE) * 0.7**stage
        codes = torch.nn.functional.normalize(codes, dim=-1) if options.get("use_cosine_sim") else codes
        module._codebook.embed.copy_(codes)
        module._codebook.embed_avg.copy_(codes)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def step(layer: torch.nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Forward, backward and update: output, codes and gradient of the input."""
    leaf = x.detach().requires_grad_()
    quantized, codes, loss = layer(leaf)
    (quantized.sum() + loss.sum()).backward()
    assert leaf.grad is not None
    if x.is_cuda:
        torch.cuda.synchronize()
    return quantized.detach(), codes, leaf.grad


def latents() -> torch.Tensor:
    return torch.randn(8, ROWS // 8, DIM, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(1))


def compared(layer: str) -> tuple[torch.nn.Module, torch.nn.Module, torch.Tensor]:
    """The pair and its input, after one step that agreed."""
    theirs, ours = pair(layer)
    x = latents()
    (expected, codes, grads), (found, found_codes, found_grads) = step(theirs, x), step(ours, x)
    same = (codes == found_codes).view(ROWS, -1).all(1)
    assert same.double().mean() > 0.999, "the codes differ"  # but where two codes are equally near
    for one, other in ((expected, found), (grads, found_grads)):
        one, other = one.view(ROWS, DIM)[same], other.view(ROWS, DIM)[same]
        assert (one - other).norm() < 1e-3 * one.norm(), "the numbers differ"
    return theirs, ours, x


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("whose", ["theirs", "ours"])
@pytest.mark.parametrize("layer", LAYERS)
def bench_dropin(benchmark: Any, layer: str, whose: str) -> None:
    pytest.importorskip("vector_quantize_pytorch", reason="pip install vector-quantize-pytorch")
    theirs, ours, x = compared(layer)
    benchmark.pedantic(step, (ours if whose == "ours" else theirs, x), rounds=7, warmup_rounds=1)


def alternating(layer: str, rounds: int) -> Iterator[tuple[float, float]]:
    """Milliseconds of a step, theirs and ours in turn."""
    theirs, ours, x = compared(layer)
    for _ in range(rounds):
        times = []
        for module in (theirs, ours):
            start = time.perf_counter()
            step(module, x)
            times.append(1e3 * (time.perf_counter() - start))
        yield times[0], times[1]


def peak_bytes(run: Callable[[], Any]) -> int:
    """Most memory that one call holds beyond what was there."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    held = most = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def main() -> None:
    warnings.filterwarnings("ignore")
    print(f"{ROWS} rows, {DIM} dimensions, {CODES} codes, {DEVICE}, {torch.get_num_threads()} threads")  # noqa: T201
    for layer in LAYERS:
        times = list(alternating(layer, 9))[1:]
        theirs, ours = (statistics.median(column) for column in zip(*times, strict=True))
        ratio = statistics.median(one / other for one, other in times)
        first, second, x = compared(layer)
        memory = [peak_bytes(partial(step, module, x)) / 2**20 for module in (first, second)]
        print(  # noqa: T201
            f"{layer:7} theirs {theirs:8.1f} ms, ours {ours:7.1f} ms, {ratio:5.1f} times; "
            f"peak memory {memory[0]:7.1f} and {memory[1]:6.1f} MiB"
        )


if __name__ == "__main__":
    main()
