"""Networks, projection and losses under torch.compile: networks are traced, losses are operators."""

import pytest
import torch

from spinlock_fast.kernels._common.dropout import BatchSlice
from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels._common.ragged import Ragged
from spinlock_fast.kernels.code_decoders import Decoders, partial_loss
from spinlock_fast.kernels.grouped_mlp import grouped_mlp
from spinlock_fast.kernels.latent_projection import project
from spinlock_fast.kernels.topo_loss import topographic_loss
from spinlock_fast.kernels.vq_assign import vq_assign

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # torch, of its tracing

LAYOUT = CodebookLayout.of([5, 7], [3, 4])
B, F, H, E = 12, 9, 6, 8
SHAPES = [(B, F), (F, H), (2, H), (2, H, E), (2, E), (2, E), (2, E), (7, E), (7,), (7,), (7,)]
DECODER_SHAPES = [(7, H), (2, H), (2, H, F), (2, F)]


def latents_of(x, w1, b1, w2, b2, *projection, dropout=0.0, batch=None):
    """Tables of sizes are new in every trace."""
    options = {"dropout": dropout, "batch": batch, "backend": "reference"} if dropout else {}
    embedding = grouped_mlp(x, w1, b1, w2, b2, Ragged.of([4, 5]), **options)
    return project(embedding, *projection, Ragged.of(LAYOUT.dims), Ragged.of(LAYOUT.dims), **options)


def loss(codebook, *tensors):
    latents = latents_of(*tensors[: len(SHAPES)])
    found = vq_assign(latents, codebook, LAYOUT, gradient="straight_through")
    decoders = Decoders(*tensors[len(SHAPES) :])
    partial = partial_loss(tensors[0], found.quantized, found.codes, codebook, decoders, LAYOUT)
    return partial + topographic_loss(tensors[0], latents, found.codes, codebook, LAYOUT, 0.3)


class Recorder:
    """A backend that runs graphs as they are and keeps the names of their operations."""

    def __init__(self):
        self.names = []

    def __call__(self, graph, inputs):
        self.names += [str(node.target) for node in graph.graph.nodes]
        return graph


def value_and_gradients(function, start):
    torch.manual_seed(3)
    leaves = [tensor.clone().requires_grad_() for tensor in start]
    value = function(*leaves)
    return value.detach(), torch.autograd.grad(value.sin().sum(), leaves)


@pytest.mark.parametrize("options", [{}, {"dropout": 0.4}, {"dropout": 0.4, "batch": BatchSlice(3, 20)}])
def test_compiled_networks_equal_eager(options):
    torch._dynamo.reset()
    torch.manual_seed(0)
    start = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES]
    recorder = Recorder()

    def networks(*tensors):
        return latents_of(*tensors, **options)

    compiled = value_and_gradients(torch.compile(networks, backend=recorder, fullgraph=True), start)
    torch.testing.assert_close(compiled, value_and_gradients(networks, start), rtol=1e-9, atol=1e-9)
    assert not any("nonzero" in name or "autograd_function" in name for name in recorder.names)


def test_compiled_losses_are_operators():
    torch._dynamo.reset()
    torch.manual_seed(0)
    recorder = Recorder()
    start = [torch.randn(shape) for shape in SHAPES + DECODER_SHAPES]
    codebook = torch.randn(LAYOUT.total_entries)

    def differentiable(*tensors):
        return loss(codebook, *tensors)

    compiled = value_and_gradients(torch.compile(differentiable, backend=recorder, fullgraph=True), start)
    torch.testing.assert_close(compiled, value_and_gradients(differentiable, start), rtol=1e-3, atol=1e-4)
    assert {"spinlock_fast.partial_loss.default", "spinlock_fast.topographic_correlations.default"} <= set(
        recorder.names
    )


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_loss_and_gradients_equal_eager(backend, dynamic):
    torch._dynamo.reset()
    torch.manual_seed(0)
    codebook = torch.randn(LAYOUT.total_entries, dtype=torch.float64)

    def differentiable(*tensors):
        return loss(codebook, *tensors)

    compiled = torch.compile(differentiable, backend=backend, dynamic=dynamic, fullgraph=True)
    for rows in (12, 17, 9) if dynamic else (12,):
        shapes = [(rows, F), *SHAPES[1:], *DECODER_SHAPES]
        start = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
        expected = value_and_gradients(differentiable, start)
        torch.testing.assert_close(value_and_gradients(compiled, start), expected, rtol=1e-9, atol=1e-9)
