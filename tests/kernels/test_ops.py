"""The operators as torch sees them: schemas, fakes, autograd, compilation, autocast, choice of backend."""

import logging

import helpers
import pytest
import torch

from spinlock_fast.kernels import backend, precision
from spinlock_fast.kernels.backend import resolve_backend
from spinlock_fast.kernels.ema_update import ema_update
from spinlock_fast.kernels.layout import CodebookLayout
from spinlock_fast.kernels.residual_vq import residual_vq
from spinlock_fast.kernels.vq_assign import vq_assign
from spinlock_fast.quantize import GroupedVectorQuantizer

LAYOUT = CodebookLayout.of([5, 3, 8], [3, 2, 4])
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
KERNELS = [("cpu", "reference"), pytest.param("cuda", "triton", marks=pytest.mark.gpu)]


@pytest.mark.parametrize(("device", "name"), KERNELS)
@pytest.mark.parametrize("rows", [0, 1, 9])
def test_assignment_is_an_operator(device, name, rows):
    z, codebook = (t.to(device) for t in helpers.random_group(LAYOUT, rows, seed=0))
    mask = torch.ones(rows, dtype=torch.bool, device=device)
    sizes = list(LAYOUT.num_codes), list(LAYOUT.dims)
    for rotation, masked, with_sums in ((False, None, True), (True, mask, False)):
        arguments = (z.clone().requires_grad_(), codebook, *sizes, masked, True, with_sums, rotation, name)
        torch.library.opcheck(torch.ops.spinlock_fast.vq_assign.default, arguments)


@pytest.mark.parametrize(("device", "name"), KERNELS)
def test_gradient_is_an_operator(device, name):
    z, codebook = (t.to(device) for t in helpers.random_group(LAYOUT, 9, seed=0))
    found = vq_assign(z, codebook, LAYOUT, backend=name)
    upstream = torch.randn_like(z), torch.rand_like(found.error_parts)
    for rotation in (False, True):
        arguments = (*upstream, z, found.quantized, found.codes, list(LAYOUT.num_codes), list(LAYOUT.dims), rotation)
        torch.library.opcheck(torch.ops.spinlock_fast.vq_assign_backward.default, (*arguments, name))


@pytest.mark.parametrize(("device", "name"), KERNELS)
def test_update_is_an_operator(device, name):
    z, codebook = (t.to(device) for t in helpers.random_group(LAYOUT, 9, seed=0))
    found = vq_assign(z, codebook, LAYOUT, backend=name)
    state = codebook, torch.ones_like(found.counts), codebook.clone(), torch.zeros_like(found.counts)
    sizes = list(LAYOUT.num_codes), list(LAYOUT.dims)
    arguments = (*state, found.count_parts, found.sum_parts, *sizes, 0.9, False, 1e-5, name)
    torch.library.opcheck(torch.ops.spinlock_fast.ema_update.default, arguments)


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
def test_gradient_in_float64(gradient):
    # The code is a constant within a cell, so a numerical gradient sees the error alone.
    z, codebook = helpers.random_group(LAYOUT, 6, seed=1, dtype=torch.float64)

    def error(latents):
        return vq_assign(latents, codebook, LAYOUT, gradient=gradient).squared_error

    torch.autograd.gradcheck(error, z.requires_grad_())


def step(quantizer, z):
    quantized, codes, loss = quantizer(z)
    return quantized.square().sum() + loss, codes


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("init", ["uniform", "kmeans"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_compiles_without_a_break(device, init, training):
    torch._dynamo.reset()
    plain = GroupedVectorQuantizer(LAYOUT.num_codes, LAYOUT.dims, codebook_init=init).to(device).train(training)
    compiled = GroupedVectorQuantizer(LAYOUT.num_codes, LAYOUT.dims, codebook_init=init).to(device).train(training)
    compiled.load_state_dict(plain.state_dict())
    run = torch.compile(step, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        z = torch.randn(12, 9, generator=torch.Generator().manual_seed(seed)).to(device)
        grads = []
        for quantizer, function in ((plain, step), (compiled, run)):
            torch.manual_seed(seed)
            leaf = z.clone().requires_grad_()
            value, codes = function(quantizer, leaf)
            value.backward()
            grads.append((leaf.grad, codes))
        torch.testing.assert_close(*grads)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], value)


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_keeps_distances_in_float32(device):
    z, codebook = (t.to(device) for t in helpers.random_group(LAYOUT, 200, seed=2))
    z, codebook = 5.0 + 0.01 * z, 5.0 + 0.01 * codebook
    expected = vq_assign(z, codebook, LAYOUT)
    with torch.autocast(device, torch.bfloat16):
        found = vq_assign(z, codebook, LAYOUT)
        ema = codebook.clone()
        ema_update(ema, torch.ones_like(found.counts), ema.clone(), found.counts, found.sums, LAYOUT, 0.9)
    assert torch.equal(found.codes, expected.codes)
    assert found.sums.dtype == ema.dtype == torch.float32
    assert torch.equal(found.sums, expected.sums)


def test_the_reference_serves_the_cpu():
    assert resolve_backend("auto", torch.zeros(1)) == "reference"


def test_the_environment_chooses_where_nobody_else_does(monkeypatch):
    monkeypatch.setattr(backend, "_interpreted", lambda: True)
    monkeypatch.setenv(backend.VARIABLE, "triton")
    pytest.importorskip("triton", reason="the package triton is not installed here")
    quantizer = GroupedVectorQuantizer([3], [2])
    assert quantizer.backend == "triton"
    assert GroupedVectorQuantizer([3], [2], backend="reference").backend == "reference"
    monkeypatch.setenv(backend.VARIABLE, "tritn")
    with helpers.raises_one_line(ValueError, backend.VARIABLE, "tritn"):
        resolve_backend("auto", torch.zeros(1))


def test_triton_where_it_cannot_run_says_why(monkeypatch):
    monkeypatch.setattr(backend, "_interpreted", lambda: False)
    with helpers.raises_one_line(RuntimeError, "triton", "CUDA", "cpu"):
        GroupedVectorQuantizer([3], [2], codebook_init="uniform", backend="triton")(torch.zeros(2, 2))
    with helpers.raises_one_line(RuntimeError, "float64"):
        resolve_backend("triton", torch.zeros(1, dtype=torch.float64))
    monkeypatch.setattr(backend, "_HAS_TRITON", False)
    with helpers.raises_one_line(RuntimeError, "not installed"):
        resolve_backend("triton", torch.zeros(1))


@pytest.mark.parametrize(("variable", "expected"), [(None, "native"), ("reference", "reference")])
def test_the_choice_is_logged_once(caplog, monkeypatch, variable, expected):
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    if variable is not None:
        monkeypatch.setenv(backend.VARIABLE, variable)
    backend._say_once.cache_clear()
    with caplog.at_level(logging.INFO, logger=backend.__name__):
        for _ in range(3):
            resolve_backend("auto", torch.zeros(1))
    assert [record.getMessage() for record in caplog.records] == [f"backend {expected} on cpu"]


def test_operators_on_a_cpu_leave_the_precision_of_cuda_alone(monkeypatch):
    """Setting it takes longer than a small operator, and other threads see it."""
    monkeypatch.setattr(precision, "allow_tf32", lambda tf32: pytest.fail("set for a CPU"))
    residual_vq(torch.randn(5, 4), [torch.randn(6, 4)])
    vq_assign(torch.randn(5, 4), torch.randn(24), CodebookLayout.of([6], [4]))
