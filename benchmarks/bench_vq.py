"""Quantizer layers, forward + backward + update: `pytest benchmarks/bench_vq.py --benchmark-only`.

The seed shape is that of the 100K run. Large shapes need a GPU. `layer_times.py` writes the same as a results file.
"""

import pytest
import torch
from kernel_times import seed_layout
from layer_times import agree, ours, peers, step

SEED = seed_layout()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = {
    "seed": (512, list(SEED.num_codes), list(SEED.dims)),
    "medium": (8192, [1024], [64]),
    "wide": (65536, [1024], [256]),
    "tall": (1 << 20, [8192], [64]),
}
LARGE = ("wide", "tall")


def inputs(shape):
    if shape in LARGE and DEVICE.type != "cuda":
        pytest.skip("takes minutes without a GPU")
    N, num_codes, dims = SHAPES[shape]
    generator = torch.Generator(DEVICE).manual_seed(0)
    z = torch.randn(N, sum(dims), device=DEVICE, generator=generator)
    codes = [torch.randn(K, D, device=DEVICE, generator=generator) for K, D in zip(num_codes, dims, strict=True)]
    return z, num_codes, dims, codes


def timed(benchmark, layer, z):
    def run():
        step(layer, z)
        if z.is_cuda:
            torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=10, warmup_rounds=2)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("shape", SHAPES)
def bench_ours(benchmark, shape, backend):
    if shape == "tall" and backend == "reference":
        pytest.skip("takes minutes")
    arguments = inputs(shape)
    layer = ours(*arguments, backend)
    agree(ours(*arguments, "auto").eval()(arguments[0])[1], layer(arguments[0])[1])
    timed(benchmark, layer, arguments[0])


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "tall"])
def bench_vector_quantize_pytorch(benchmark, shape):
    pytest.importorskip("vector_quantize_pytorch", reason="pip install vector-quantize-pytorch")
    arguments = inputs(shape)
    ((_, layer),) = peers(*arguments)
    agree(ours(*arguments, "auto").eval()(arguments[0])[1], layer(arguments[0])[1])
    timed(benchmark, layer, arguments[0])
