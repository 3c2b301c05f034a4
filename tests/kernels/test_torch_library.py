"""Operators of `torch.library`: schemas, fakes, autograd, compilation, autocast; choice of the backend."""

import logging

import helpers
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from spinlock_fast.kernels._common import backend, precision
from spinlock_fast.kernels._common.backend import resolve_backend
from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels.ema_update import ema_update
from spinlock_fast.kernels.residual_vq import residual_vq
from spinlock_fast.kernels.vq_assign import vq_assign
from spinlock_fast.quantize import GroupedVectorQuantizer

LAYOUT = CodebookLayout.of([5, 3, 8], [3, 2, 4])
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
KERNELS = [("cpu", "reference"), pytest.param("cuda", "triton", marks=pytest.mark.gpu)]


@pytest.mark.parametrize(("device", "name"), KERNELS)
@pytest.mark.parametrize("rows", [0, 1, 9])
def test_vq_assign_passes_opcheck(device, name, rows):
    z, codebook = (t.to(device) for t in helpers.random_group(LAYOUT, rows, seed=0))
    mask = torch.ones(rows, dtype=torch.bool, device=device)
    sizes = list(LAYOUT.num_codes), list(LAYOUT.dims)
    for rotation, masked, with_sums in ((False, None, True), (True, mask, False)):
        arguments = (z.clone().requires_grad_(), codebook, *sizes, masked, True, with_sums, rotation, name)
        torch.library.opcheck(torch.ops.spinlock_fast.vq_assign.default, arguments)


@pytest.mark.parametrize(("device", "name"), KERNELS)
def test_vq_assign_backward_passes_opcheck(device, name):
    z, codebook = (t.to(device) for t in helpers.random_group(LAYOUT, 9, seed=0))
    actual = vq_assign(z, codebook, LAYOUT, backend=name)
    upstream = torch.randn_like(z), torch.rand_like(actual.error_parts)
    for rotation in (False, True):
        arguments = (*upstream, z, actual.quantized, actual.codes, list(LAYOUT.num_codes), list(LAYOUT.dims), rotation)
        torch.library.opcheck(torch.ops.spinlock_fast.vq_assign_backward.default, (*arguments, name))


@pytest.mark.parametrize(("device", "name"), KERNELS)
def test_ema_update_passes_opcheck(device, name):
    z, codebook = (t.to(device) for t in helpers.random_group(LAYOUT, 9, seed=0))
    actual = vq_assign(z, codebook, LAYOUT, backend=name)
    state = codebook, torch.ones_like(actual.counts), codebook.clone(), torch.zeros_like(actual.counts)
    sizes = list(LAYOUT.num_codes), list(LAYOUT.dims)
    arguments = (*state, actual.count_parts, actual.sum_parts, *sizes, 0.9, False, 1e-5, name)
    torch.library.opcheck(torch.ops.spinlock_fast.ema_update.default, arguments)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_of_compiled_code_pass_opcheck(device, dtype):
    z, codebook = (t.to(device, dtype) for t in helpers.random_group(LAYOUT, 9, seed=0))
    codes = vq_assign(z, codebook, LAYOUT).codes
    x, sizes = torch.randn(9, 6, dtype=dtype, device=device), (list(LAYOUT.num_codes), list(LAYOUT.dims))
    decoders = [torch.randn(shape, dtype=dtype, device=device) for shape in ((9, 5), (3, 5), (3, 5, 6), (3, 6))]
    grad, operators = torch.ones((), dtype=dtype, device=device), torch.ops.spinlock_fast
    tensors = x, z, codes, codebook
    torch.library.opcheck(operators.topographic_gradient.default, (grad, grad, *tensors, *sizes))
    torch.library.opcheck(operators.partial_loss_backward.default, (grad, *tensors, *decoders, *sizes, "auto"))
    tensors = x, z.clone().requires_grad_(), codes, codebook
    torch.library.opcheck(operators.topographic_correlations.default, (*tensors, *sizes))
    decoders = [decoder.requires_grad_() for decoder in decoders]
    torch.library.opcheck(operators.partial_loss.default, (*tensors, *decoders, *sizes, "auto"))


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
def test_gradient_in_float64(gradient):
    # The code is constant within a cell, so the numerical gradient is that of the error.
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
def test_compiles_without_a_graph_break(device, init, training):
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
        actual = vq_assign(z, codebook, LAYOUT)
        ema = codebook.clone()
        ema_update(ema, torch.ones_like(actual.counts), ema.clone(), actual.counts, actual.sums, LAYOUT, 0.9)
    assert torch.equal(actual.codes, expected.codes)
    assert actual.sums.dtype == ema.dtype == torch.float32
    assert torch.equal(actual.sums, expected.sums)


def test_auto_is_reference_on_a_cpu():
    assert resolve_backend("auto", torch.zeros(1)) == "reference"


def test_environment_variable_replaces_auto(monkeypatch):
    monkeypatch.setattr(backend, "_interpreted", lambda: True)
    monkeypatch.setenv(backend.VARIABLE, "triton")
    pytest.importorskip("triton", reason="the package triton is not installed here")
    quantizer = GroupedVectorQuantizer([3], [2])
    assert quantizer.backend == "triton"
    assert GroupedVectorQuantizer([3], [2], backend="reference").backend == "reference"
    monkeypatch.setenv(backend.VARIABLE, "tritn")
    with helpers.raises_one_line(ValueError, backend.VARIABLE, "tritn"):
        resolve_backend("auto", torch.zeros(1))


def test_triton_raises_where_it_cannot_run(monkeypatch):
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
    backend._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger=backend.__name__):
        for _ in range(3):
            resolve_backend("auto", torch.zeros(1))
    assert [record.getMessage() for record in caplog.records] == [f"backend {expected} on cpu"]


def test_cpu_operators_do_not_set_the_cuda_precision(monkeypatch):
    """Setting it takes longer than a small operator and affects other threads."""
    monkeypatch.setattr(precision, "allow_tf32", lambda tf32: pytest.fail("set for a CPU"))
    residual_vq(torch.randn(5, 4), [torch.randn(6, 4)])
    vq_assign(torch.randn(5, 4), torch.randn(24), CodebookLayout.of([6], [4]))


class Recorder(TorchDispatchMode):
    """Names of the operators that a dispatch mode receives."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def assign_and_differentiate():
    z, codebook = helpers.random_group(LAYOUT, 9, seed=0)
    assignment = vq_assign(z.requires_grad_(), codebook, LAYOUT, gradient="rotation")
    assignment.squared_error.sum().backward()
    return assignment.quantized, z.grad


def test_eager_mode_takes_a_plain_autograd_function():
    expected, _ = assign_and_differentiate()
    assert type(expected.grad_fn).__name__ == "vq_assignBackward"


def test_dispatch_modes_receive_the_operators():
    expected = assign_and_differentiate()
    with Recorder() as recorder:
        actual = assign_and_differentiate()
    assert {"spinlock_fast::vq_assign", "spinlock_fast::vq_assign_backward"} <= set(recorder.names)
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_profiles_contain_the_operators():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        assign_and_differentiate()
    names = {event.key for event in profile.key_averages()}
    assert {"spinlock_fast::vq_assign", "spinlock_fast::vq_assign_backward"} <= names


@pytest.mark.filterwarnings("ignore")  # torch.jit.trace is deprecated
def test_traced_graphs_contain_the_operator():
    z, codebook = helpers.random_group(LAYOUT, 9, seed=0)
    traced = torch.jit.trace(lambda rows: vq_assign(rows, codebook, LAYOUT).quantized, z)
    assert "spinlock_fast::vq_assign" in str(traced.graph)


def test_backward_passes_support_lazily_negated_gradients():
    grads = []
    for negated in (False, True):
        z, codebook = helpers.random_group(LAYOUT, 9, seed=0)
        actual = vq_assign(z.requires_grad_(), codebook, LAYOUT, gradient="straight_through")
        upstream = torch.linspace(-1.0, 1.0, actual.quantized.numel()).view_as(actual.quantized)
        actual.quantized.backward(torch._neg_view(-upstream) if negated else upstream)
        grads.append(z.grad)
    assert torch.equal(*grads)
