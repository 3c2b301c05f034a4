"""Quantizer layers, forward + backward + update: `pytest benchmarks/kernels/bench_layers.py --benchmark-only`.

The seed shape is that of the 100K run. Large shapes need a GPU. `layer_times.py` writes the same to a results file.
"""

import pytest
import torch

from benchmarks.common.quantizer_layers import (
    LARGE,
    SHAPES,
    check_same_codes,
    grouped_quantizer,
    peer_quantizers,
    quantizer_step,
    random_inputs,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def time_layer(benchmark, shape, make_layer):
    if shape in LARGE and DEVICE.type != "cuda":
        pytest.skip("takes minutes without a GPU")
    z, codes = random_inputs(*SHAPES[shape], DEVICE)
    layer = make_layer(codes)
    check_same_codes(grouped_quantizer(codes).eval()(z)[1], layer(z)[1])

    def run():
        quantizer_step(layer, z)
        if z.is_cuda:
            torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=10, warmup_rounds=2)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("shape", SHAPES)
def bench_grouped_quantizer(benchmark, shape, backend):
    if shape == "tall" and backend == "reference":
        pytest.skip("takes minutes")
    time_layer(benchmark, shape, lambda codes: grouped_quantizer(codes, backend))


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "tall"])
def bench_vector_quantize_pytorch(benchmark, shape):
    pytest.importorskip("vector_quantize_pytorch", reason="pip install vector-quantize-pytorch")
    time_layer(benchmark, shape, lambda codes: next(peer_quantizers(codes))[1])
