"""Networks, projection and losses under torch.compile: Dynamo traces the PyTorch implementations."""

import pytest
import torch

from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels._common.ragged import Ragged
from spinlock_fast.kernels.code_decoders import Decoders, partial_loss
from spinlock_fast.kernels.grouped_mlp import grouped_mlp
from spinlock_fast.kernels.latent_projection import project
from spinlock_fast.kernels.topo_loss import topographic_loss
from spinlock_fast.kernels.vq_assign import vq_assign

LAYOUT = CodebookLayout.of([5, 7], [3, 4])
B, F, H, E = 12, 9, 6, 8
SHAPES = [(B, F), (F, H), (2, H), (2, H, E), (2, E), (2, E), (2, E), (7, E), (7,), (7,), (7,)]
DECODER_SHAPES = [(7, H), (2, H), (2, H, F), (2, F)]


def loss(codebook, *tensors):
    x, w1, b1, w2, b2, *projection = tensors[: len(SHAPES)]
    decoders = Decoders(*tensors[len(SHAPES) :])
    embedding = grouped_mlp(x, w1, b1, w2, b2, Ragged.of([4, 5]))
    latents = project(embedding, *projection, Ragged.of(LAYOUT.dims), Ragged.of(LAYOUT.dims))
    found = vq_assign(latents, codebook, LAYOUT, gradient="straight_through")
    partial = partial_loss(x, found.quantized, found.codes, codebook, decoders, LAYOUT)
    return partial + topographic_loss(x, latents, found.codes, codebook, LAYOUT, 0.5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # torch, about its tracing
def test_compiled_loss_and_gradients_equal_eager():
    torch._dynamo.reset()
    codebook = torch.randn(LAYOUT.total_entries, dtype=torch.float64)
    start = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES + DECODER_SHAPES]
    results = []
    for function in (loss, torch.compile(loss, backend="aot_eager")):
        leaves = [tensor.clone().requires_grad_() for tensor in start]
        value = function(codebook, *leaves)
        results.append((value.detach(), torch.autograd.grad(value, leaves)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-9)
