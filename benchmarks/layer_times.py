"""Training steps of whole quantizer layers beside other people's: `python benchmarks/layer_times.py --output FILE`.

Peers are timed where they are installed: vector-quantize-pytorch (a layer per codebook), flash-kmeans (assignment and
update of one codebook, on CUDA), faiss (assignment on the CPU). Answers are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import bench_dropin
import torch
from kernel_times import seed_layout
from timing import peak_memory, time_calls, write

from spinlock_fast.quantize import GroupedVectorQuantizer

warnings.filterwarnings("ignore")  # of other people's packages
DECAY = 0.99


def step(layer: Callable[[torch.Tensor], Any], z: torch.Tensor) -> None:
    """Forward, backward and update."""
    leaf = z.detach().requires_grad_()
    quantized, _, loss = layer(leaf)
    (quantized.sum() + loss.sum()).backward()


def peers(
    z: torch.Tensor, num_codes: list[int], dims: list[int], codes: list[torch.Tensor]
) -> Iterator[tuple[str, Any]]:
    """Names and layers that start from the same codes."""
    try:
        from vector_quantize_pytorch import VectorQuantize
    except ImportError:
        return
    layers = []
    for K, D, code in zip(num_codes, dims, codes, strict=True):
        layer = VectorQuantize(dim=D, codebook_size=K, decay=DECAY, commitment_weight=0.25, learnable_codebook=False)
        layer = layer.to(z.device).train()
        layer._codebook.embed.data.copy_(code)
        layer._codebook.embed_avg.data.copy_(code)
        layers.append(layer)

    def loop(latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        found = [layer(part) for layer, part in zip(layers, latents.split(dims, 1), strict=True)]
        quantized, indices, losses = zip(*found, strict=True)
        return torch.cat(quantized, 1), torch.stack(indices, 1), torch.stack([loss.sum() for loss in losses]).sum()

    yield "vector-quantize-pytorch", loop


def ours(z: torch.Tensor, num_codes: list[int], dims: list[int], codes: list[torch.Tensor], backend: Any) -> Any:
    layer = GroupedVectorQuantizer(num_codes, dims, DECAY, codebook_init="uniform", backend=backend).to(z.device)
    packed = torch.cat([code.flatten() for code in codes])
    layer.embedding.copy_(packed)
    layer.embedding_sum.copy_(packed)
    return layer.train()


def agree(reference: torch.Tensor, found: torch.Tensor) -> None:
    """Codes of different packages may differ where two codes are equally near; that is rare."""
    assert float((reference != found).double().mean()) < 1e-3, "the codes differ"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", required=True)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seed = seed_layout()
    shapes = {"seed": (512, list(seed.num_codes), list(seed.dims))}
    if device.type == "cuda":
        shapes |= {"wide": (65536, [1024], [256]), "tall": (1 << 20, [8192], [64])}
    else:
        shapes |= {"medium": (8192, [1024], [64])}
    rows: list[dict[str, Any]] = []
    for shape, (N, num_codes, dims) in shapes.items():
        generator = torch.Generator(device).manual_seed(0)
        z = torch.randn(N, sum(dims), device=device, generator=generator)
        codes = [torch.randn(K, D, device=device, generator=generator) for K, D in zip(num_codes, dims, strict=True)]
        truth = ours(z, num_codes, dims, codes, "auto").eval()(z)[1]
        layers: list[tuple[str, Any]] = [("spinlock-fast", ours(z, num_codes, dims, codes, "auto"))]
        if shape != "tall" and device.type == "cuda":
            layers.append(("spinlock-fast, reference", ours(z, num_codes, dims, codes, "reference")))
        layers += list(peers(z, num_codes, dims, codes))
        for name, layer in layers:
            try:
                agree(truth, layer(z)[1])
                timed = time_calls(lambda layer=layer, z=z: step(layer, z), device)
                memory = {"peak_bytes": peak_memory(lambda layer=layer, z=z: step(layer, z))} if z.is_cuda else {}
                rows.append({"shape": shape, "layer": name, **timed, **memory})
                line = f"{shape:6} {name:28} {timed['p50_us']:12.1f} us {memory.get('peak_bytes', 0) / 2**20:10.1f} MiB"
            except torch.OutOfMemoryError:
                rows.append({"shape": shape, "layer": name, "error": "out of memory"})
                line = f"{shape:6} {name:28} out of memory"
            print(line, flush=True)  # noqa: T201
            write(options.output, rows)
    if importlib.util.find_spec("vector_quantize_pytorch") is not None:
        rows += dropin_rows(device)
        write(options.output, rows)


def dropin_rows(device: torch.device) -> list[dict[str, Any]]:
    """The drop-in quantizers and those whose place they take; answers are compared before."""
    rows, repeats = [], 50 if device.type == "cuda" else 7
    for layer in bench_dropin.LAYERS:
        theirs, ours_too, z = bench_dropin.compared(layer)
        for name, module in (("spinlock-fast", ours_too), ("vector-quantize-pytorch", theirs)):
            run = partial(bench_dropin.step, module, z)
            rows.append({"shape": f"drop-in {layer}", "layer": name, **time_calls(run, device, repeats)})
            rows[-1] |= {"peak_bytes": peak_memory(run)} if z.is_cuda else {}
            print(f"drop-in {layer:8} {name:28} {rows[-1]['p50_us']:12.1f} us", flush=True)  # noqa: T201
    return rows


if __name__ == "__main__":
    main()
