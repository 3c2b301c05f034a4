"""All public operators against float64 references: memory layouts, types, wrong arguments, higher derivatives.

Each operator of one table is tested with native kernels, plain PyTorch and Triton under its interpreter.
"""

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from spinlock_fast.kernels._common import guard
from spinlock_fast.kernels._common.backend import VARIABLE
from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels._common.ragged import Ragged
from spinlock_fast.kernels.augment import augmented_rows
from spinlock_fast.kernels.code_decoders import Decoders, code_statistics, decode_codes, partial_loss
from spinlock_fast.kernels.dead_codes import reset_dead_codes
from spinlock_fast.kernels.ema_update import code_usage, ema_update
from spinlock_fast.kernels.grouped_mlp import grouped_mlp
from spinlock_fast.kernels.latent_projection import normalize_, project, ragged_layer_norm, scaled_output_linear
from spinlock_fast.kernels.residual_vq import residual_vq
from spinlock_fast.kernels.topo_loss import topographic_correlations, topographic_loss
from spinlock_fast.kernels.vq_assign import lookup, quantize, vq_assign

LAYOUT = CodebookLayout.of([5, 3, 4], [3, 2, 1])
SIZES = Ragged.of([3, 2, 1])
PARTS = Ragged.of([2, 1, 2, 1])
B, F, G, H, E = 6, 4, 3, 5, 4
n, K, entries = LAYOUT.total_dims, LAYOUT.total_codes, LAYOUT.total_entries


def normal(*shape, seed=0):
    return torch.randn(shape, device="cpu", generator=torch.Generator().manual_seed(seed + sum(shape)))


CODES = torch.stack(
    [torch.randint(0, k, (B,), generator=torch.Generator().manual_seed(k)) for k in LAYOUT.num_codes], 1
)


@dataclass(frozen=True)
class Operator:
    """A call of a public operator.

    Args:
        name: name in error messages.
        call: function of `inputs` by name; returns a tuple of results.
        inputs: tensor arguments.
        differentiable: names of the arguments that receive a gradient.
        free: names of the arguments whose last size is not determined by other arguments.
        options: suffix of the test id.
    """

    name: str
    call: Callable[..., tuple[torch.Tensor, ...]]
    inputs: dict[str, torch.Tensor]
    differentiable: tuple[str, ...] = ()
    free: tuple[str, ...] = ()
    options: str = field(default="")


def _tuple(actual: Any) -> tuple[torch.Tensor, ...]:
    return actual if isinstance(actual, tuple) else (actual,)


def _assigned(gradient):
    def call(z, codebook, mask):
        actual = vq_assign(z, codebook, LAYOUT, mask, gradient=gradient)
        return actual.quantized.nan_to_num(), actual.squared_error, actual.counts, actual.sums, actual.codes

    return call


def _residual(gradient, cosine):
    def call(x, first, second, mask):
        actual = residual_vq(x, [first, second], mask, gradient=gradient, cosine=cosine)
        return actual.quantized, actual.errors, actual.counts, actual.sums, actual.codes

    return call


def _updated(codebook, cluster_size, code_sum, counts, sums, usage):
    ema_update(codebook, cluster_size, code_sum, counts, sums, LAYOUT, 0.9, "laplace", usage=usage)
    return codebook, cluster_size, code_sum, usage


def _reset(codebook, cluster_size, code_sum):
    replaced = reset_dead_codes(codebook, cluster_size, code_sum, LAYOUT, 0.5, noise=0.0)
    return codebook, cluster_size, code_sum, replaced


def _partial(x, quantized, codes, codebook, w1, b1, w2, b2):
    return _tuple(partial_loss(x, quantized, codes, codebook, Decoders(w1, b1, w2, b2), LAYOUT))


DECODERS = {"w1": normal(n, H), "b1": normal(G, H), "w2": normal(G, H, F), "b2": normal(G, F)}
MLP = {"x": normal(B, n), "w1": normal(n, H), "b1": normal(G, H), "w2": normal(G, H, E), "b2": normal(G, E)}
HEADS = {"x": normal(G, B, E), "gain": normal(G, E), "shift": normal(G, E, seed=1), "weight": normal(n, E)}
PROJECT = {**HEADS, "bias": normal(n), "part_weight": normal(n, seed=1), "part_bias": normal(n, seed=2)}
CODEBOOK = normal(entries)
QUANTIZED = lookup(CODES, CODEBOOK, LAYOUT)
Z = {"z": normal(B, n), "codebook": CODEBOOK, "mask": torch.arange(B) != 2}
ROWS = {"x": normal(B, 4), "first": normal(5, 4), "second": normal(3, 4), "mask": torch.arange(B) != 2}
UNIT = {name: t if name == "mask" else torch.nn.functional.normalize(t, dim=1) for name, t in ROWS.items()}
STATE = {"codebook": CODEBOOK, "cluster_size": 0.25 + torch.arange(K) % 4, "code_sum": normal(entries, seed=3)}
BATCH = {"counts": torch.arange(K) % 3 * 1.0, "sums": normal(entries, seed=4), "usage": torch.zeros(K)}
TOPO = {"x": normal(B, F), "latents": normal(B, n), "codes": CODES, "codebook": CODEBOOK}
NORM = {"x": normal(B, n), "weight": normal(n), "bias": normal(n, seed=1)}

TABLE = [
    Operator("vq_assign", _assigned("straight_through"), Z, ("z",)),
    Operator("vq_assign", _assigned("rotation"), Z, ("z",), options="rotation"),
    Operator("residual_vq", _residual("straight_through", False), ROWS, ("x",)),
    Operator("residual_vq", _residual("rotation", False), ROWS, ("x",), options="rotation"),
    Operator("residual_vq", _residual("straight_through", True), UNIT, ("x",), options="cosine"),
    Operator("quantize", lambda z, quantized: _tuple(quantize(z, quantized, LAYOUT)),
             {"z": normal(B, n), "quantized": QUANTIZED}, ("z",)),
    Operator("lookup", lambda codes, codebook: _tuple(lookup(codes, codebook, LAYOUT)),
             {"codes": CODES, "codebook": CODEBOOK}, ("codebook",)),
    Operator("grouped_mlp", lambda **a: _tuple(grouped_mlp(**a, inputs=SIZES)), MLP, tuple(MLP)),
    Operator("scaled_output_linear", lambda **a: _tuple(scaled_output_linear(**a, outputs=SIZES)),
             {**HEADS, "bias": normal(n)}, (*HEADS, "bias")),
    Operator("ragged_layer_norm", lambda **a: _tuple(ragged_layer_norm(**a, segments=Ragged.of([4, 2]))), NORM,
             tuple(NORM)),
    Operator("normalize_", lambda x: _tuple(normalize_(1.0 * x)), {"x": normal(G, B, E)}, ("x",), ("x",)),
    Operator("project", lambda x, **a: _tuple(project(1.0 * x, **a, outputs=SIZES, parts=PARTS)), PROJECT,
             tuple(PROJECT)),
    Operator("partial_loss", _partial,
             {"x": normal(B, F), "quantized": QUANTIZED, "codes": CODES, "codebook": CODEBOOK, **DECODERS},
             ("quantized", *DECODERS)),
    Operator("code_statistics", lambda x, codes: code_statistics(x, codes, LAYOUT), {"x": normal(B, F), "codes": CODES},
             free=("x",)),
    Operator("decode_codes", lambda codebook, **a: _tuple(decode_codes(codebook, Decoders(**a), LAYOUT)[:, :3]),
             {"codebook": CODEBOOK, **DECODERS}),
    Operator("topographic_correlations", lambda **a: topographic_correlations(**a, layout=LAYOUT), TOPO, ("latents",),
             ("x",)),
    Operator("topographic_loss", lambda **a: _tuple(topographic_loss(**a, layout=LAYOUT, pre_weight=0.3)), TOPO,
             ("latents",), ("x",)),
    Operator("ema_update", _updated, {**STATE, **BATCH}),
    Operator("reset_dead_codes", _reset, STATE),
    Operator("code_usage", lambda counts: code_usage(counts, LAYOUT), {"counts": BATCH["counts"]}),
    Operator("augmented_rows", lambda x, rows: augmented_rows(x, rows), {"x": normal(B, F), "rows": CODES[:, 0]},
             free=("x", "rows")),
]  # fmt: skip
OPERATORS = pytest.mark.parametrize("operator", TABLE, ids=lambda o: "-".join(filter(None, [o.name, o.options])))
DIFFERENTIABLE = pytest.mark.parametrize(
    "operator",
    [o for o in TABLE if o.differentiable],
    ids=lambda o: "-".join(filter(None, [o.name, o.options])),
)
pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),  # NaN in the interpreter
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]


@pytest.fixture(params=["native", "reference", pytest.param("triton", marks=pytest.mark.slow)])
def implementation(request, monkeypatch):
    """The implementation under test. New tensors are filled with NaN, which reveals elements that are not written."""
    if request.param == "triton":
        pytest.importorskip("triton", reason="the package triton is not installed here")
        if os.environ.get("TRITON_INTERPRET", "0") != "1":
            pytest.skip("kernels are compiled here: the GPU tests run them")
    if request.param != "native":
        monkeypatch.setenv(VARIABLE, request.param)

    def poisoned(plain):
        def fresh(*args, **kwargs):
            tensor = plain(*args, **kwargs)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor.fill_(1)

        return fresh

    for holder, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(holder, name, poisoned(getattr(holder, name)))
    return request.param


def contiguous(t):
    return t.clone()


def column_major(t):
    return t.clone().t().contiguous().t() if t.ndim == 2 else t.clone().transpose(0, -1).contiguous().transpose(0, -1)


def sliced(t):
    """A view of every second entry of a larger tensor."""
    memory = torch.zeros([2 * size + 1 for size in t.shape], dtype=t.dtype)
    view = memory[tuple(slice(1, None, 2) for _ in t.shape)]
    view.copy_(t)
    return view


def negated(t):
    """A lazily negated tensor: its memory has the opposite signs."""
    return torch._neg_view((-t).clone()) if t.is_floating_point() else t.clone()


def expanded(t):
    """Rows that share memory (stride 0)."""
    return t[:1].clone().expand(t.shape)


LAYOUTS = [contiguous, column_major, sliced, negated]


def run(operator, inputs, upstream=contiguous):
    """Results, and gradients with respect to the differentiable inputs, converted to float64."""
    leaves = {name: t.detach() for name, t in inputs.items()}
    for name in operator.differentiable:
        leaves[name].requires_grad_()
    actual = operator.call(**leaves)
    roots = [out for out in actual if out.requires_grad]
    grads = []
    if roots:
        wanted = [leaves[name] for name in operator.differentiable]
        shapes = [
            torch.ones(out.shape, device="cpu") if upstream is expanded else normal(*out.shape, seed=i)
            for i, out in enumerate(roots)
        ]
        given = [(upstream(s) if s.ndim else s).to(out) for s, out in zip(shapes, roots, strict=True)]
        grads = torch.autograd.grad(roots, wanted, given)
    return [part.detach().to(torch.float64) for part in (*actual, *grads)]


def exact(operator, inputs, upstream=contiguous):
    """`run` in float64 with backend "reference"."""
    wide = {name: t.double().clone() if t.is_floating_point() else t.clone() for name, t in inputs.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, "reference")
        return run(operator, wide, upstream)


def close(actual, expected, tolerance=2e-5):
    for ours, truth in zip(actual, expected, strict=True):
        torch.testing.assert_close(
            ours, truth, rtol=tolerance, atol=tolerance * (1.0 + float(truth.abs().max() if truth.numel() else 0.0))
        )


@OPERATORS
@pytest.mark.parametrize("implementation", ["native", "reference", "triton"], indirect=True)
def test_any_layout(operator, implementation):
    expected = exact(operator, operator.inputs)
    for layout in LAYOUTS:
        if layout is negated and (operator.name in IN_PLACE or implementation == "triton"):
            continue  # rejected by torch, or by backend "triton"
        close(run(operator, {name: layout(t) for name, t in operator.inputs.items()}), expected)
    assert_inputs_are_unchanged(operator)


def assert_inputs_are_unchanged(operator):
    for name, t in operator.inputs.items():
        assert torch.isfinite(t).all(), name


IN_PLACE = ("ema_update", "reset_dead_codes")  # entries that share memory cannot be written


@OPERATORS
def test_shared_memory(operator, implementation):
    """Arguments of stride 0, one at a time."""
    for name, t in operator.inputs.items():
        if t.dtype == torch.bool or (operator.name in IN_PLACE and name not in ("counts", "sums")):
            continue
        inputs = {**{k: v.clone() for k, v in operator.inputs.items()}, name: expanded(t)}
        if operator.name == "partial_loss" and name in ("codes", "codebook", "quantized"):
            continue  # quantized are the codes of the codebook
        if operator.name == "residual_vq" and name != "x":
            continue  # any of equal codes may be chosen
        expected = exact(operator, inputs)
        close(run(operator, inputs), expected, 5e-5)


@DIFFERENTIABLE
@pytest.mark.parametrize("upstream", [column_major, sliced, expanded])
def test_any_layout_of_upstream_gradients(operator, upstream, implementation):
    expected = exact(operator, operator.inputs, upstream)
    close(run(operator, {name: t.clone() for name, t in operator.inputs.items()}, upstream), expected)


@OPERATORS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types(operator, dtype, implementation):
    inputs = {name: t.to(dtype) if t.is_floating_point() else t.clone() for name, t in operator.inputs.items()}
    expected = exact(operator, inputs)
    actual = run(operator, inputs)
    eps = torch.finfo(dtype).eps
    close(actual, expected, max(2e-5 if dtype != torch.float64 else 1e-10, 16.0 * eps))


@OPERATORS
def test_wrong_arguments_are_rejected(operator, implementation):
    def assert_rejected(kinds, **changed):
        with pytest.raises(kinds) as caught:
            operator.call(**{**{name: t.clone() for name, t in operator.inputs.items()}, **changed})
        message = str(caught.value)
        assert message.startswith((f"{operator.name}: ", "topographic_correlations: ")), message
        assert "\n" not in message

    for name, t in operator.inputs.items():
        if name not in operator.free:
            assert_rejected(ValueError, **{name: torch.cat([t, t[..., :1]], -1)})
        if operator.name != "normalize_":
            assert_rejected(ValueError, **{name: t[None]})
        assert_rejected(TypeError, **{name: t.numpy()})
        assert_rejected(TypeError, **{name: t.to(torch.complex64)})
        assert_rejected(ValueError, **{name: t.to_sparse()})
        if len(operator.inputs) > 1:
            assert_rejected(ValueError, **{name: t.to("meta")})
        if t.dtype == torch.int64:
            assert_rejected(TypeError, **{name: t.double()})
            if name == "codes":
                wrong = t.clone()
                wrong[1, 1] = LAYOUT.num_codes[1]
                if implementation != "triton" or operator.name in ("lookup", "code_statistics"):
                    assert_rejected(IndexError, **{name: wrong}) if operator.name != "lookup" else None
        if t.dtype == torch.bool:
            assert_rejected(TypeError, **{name: t.to(torch.uint8)})


@OPERATORS
def test_no_rows(operator, implementation):
    batch = {"z", "x", "codes", "quantized", "latents", "rows", "mask"}
    if operator.name in ("project", "scaled_output_linear", "normalize_"):
        inputs = {name: t[:, :0] if name == "x" else t for name, t in operator.inputs.items()}
    else:
        inputs = {name: t[:0] if name in batch and t.shape[0] == B else t for name, t in operator.inputs.items()}
    inputs = {name: t.clone() for name, t in inputs.items()}
    expected = exact(operator, inputs)
    actual = run(operator, inputs)
    if operator.name == "partial_loss":  # the mean over no rows
        assert actual[0].isnan()
        return
    for ours, truth in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, truth, equal_nan=True, rtol=1e-5, atol=1e-5)


@OPERATORS
def test_other_default_devices_and_threads(operator, implementation):
    expected = exact(operator, operator.inputs)
    inputs = {name: t.clone() for name, t in operator.inputs.items()}
    failures = []

    def work():
        try:
            with torch.device("meta"):
                actual = run(operator, inputs)
            close(actual, expected)
        except BaseException as error:  # noqa: BLE001 reported by the main thread
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failures, failures[0]


def test_dropout_ignores_the_default_device():
    with torch.device("meta"):
        x = {name: t.clone() for name, t in MLP.items()}
        assert torch.isfinite(grouped_mlp(**x, inputs=SIZES, dropout=0.5)).all()
        norm = {name: t.clone() for name, t in NORM.items()}
        assert torch.isfinite(ragged_layer_norm(**norm, segments=Ragged.of([4, 2]), dropout=0.5)).all()


@OPERATORS
def test_fake_tensors_never_reach_native_code(operator):
    from torch._subclasses.fake_tensor import FakeTensorMode

    if operator.name in ("lookup", "code_statistics"):
        pytest.skip("reads the values of codes")
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = {name: mode.from_tensor(t.clone()) for name, t in operator.inputs.items()}
    real = operator.call(**{name: t.clone() for name, t in operator.inputs.items()})
    for actual, expected in zip(operator.call(**fakes), real, strict=True):
        assert actual.shape == expected.shape
        assert actual.dtype == expected.dtype


# Higher derivatives.


def smooth(operator, name):
    """Differentiable results as a function of one argument."""

    def function(x):
        inputs = {k: v.double() if v.is_floating_point() else v for k, v in operator.inputs.items()}
        return tuple(out for out in operator.call(**{**inputs, name: x}) if out.requires_grad)

    return function


def penalty(operator, inputs):
    """First derivatives of the results, and second derivatives through a function of the first."""
    leaves = {name: t.detach().clone() for name, t in inputs.items()}
    wanted = [leaves[name].requires_grad_() for name in operator.differentiable]
    actual = operator.call(**leaves)
    value = sum((out * (1.0 + out)).sum() for out in actual if out.requires_grad)
    grads = torch.autograd.grad(value, wanted, create_graph=True)
    total = sum((grad * (1.0 + grad)).sum() for grad in grads)
    if not total.requires_grad:
        return [*grads]
    return [*(g.detach() for g in grads), *torch.autograd.grad(total, wanted, allow_unused=True)]


@DIFFERENTIABLE
def test_gradients_of_gradients(operator, implementation, monkeypatch):
    """Against the formulas in plain PyTorch in float64."""
    inputs = {name: t.clone() for name, t in operator.inputs.items()}
    actual = penalty(operator, inputs)
    wide = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
    monkeypatch.setenv(VARIABLE, "reference")
    for ours, truth in zip(actual, penalty(operator, wide), strict=True):
        assert (ours is None) == (truth is None)
        if truth is not None:
            torch.testing.assert_close(ours.double(), truth, rtol=1e-3, atol=1e-3 * (1.0 + float(truth.abs().max())))


@DIFFERENTIABLE
def test_gradients_against_differences(operator):
    if operator.name in ("vq_assign", "residual_vq", "quantize", "topographic_correlations", "topographic_loss"):
        pytest.skip("gradients of codes are estimates, not derivatives")
    for name in operator.differentiable:
        if operator.name == "partial_loss" and name == "quantized":
            continue  # its value is taken from the codebook
        x = operator.inputs[name].double().clone().requires_grad_()
        assert gradcheck(smooth(operator, name), (x,), fast_mode=True)
        assert gradgradcheck(smooth(operator, name), (x,), fast_mode=True)


def test_second_derivatives_of_quantizers():
    """quantized = x + sg(q - x) has a constant Jacobian, |x - e|^2 the Hessian 2."""
    for call in (
        lambda x: vq_assign(x, CODEBOOK.double(), LAYOUT, gradient="straight_through").squared_error.sum(),
        lambda x: residual_vq(x, [normal(7, n).double()], gradient="straight_through").errors.sum(),
    ):
        x = normal(B, n).double().requires_grad_()
        assert gradgradcheck(call, (x,))
        hessian = torch.autograd.functional.hessian(call, x).reshape(B * n, B * n)
        torch.testing.assert_close(hessian, 2.0 * torch.eye(B * n, dtype=torch.float64))
    x = normal(B, n).requires_grad_()
    quantized = vq_assign(x, CODEBOOK, LAYOUT, gradient="straight_through").quantized
    (grad,) = torch.autograd.grad(quantized.square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), x)
    torch.testing.assert_close(second, 8.0 * quantized.detach())  # grad = 2 q, whose gradient goes straight through


@DIFFERENTIABLE
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # of torch, in forward mode
def test_transforms_of_torch_func(operator, implementation):
    inputs = {name: t.clone() for name, t in operator.inputs.items()}
    expected = run(operator, {name: t.clone() for name, t in inputs.items()})
    name = operator.differentiable[0]

    def value(x):
        actual = operator.call(**{**inputs, name: x})
        return sum(
            (out * normal(*out.shape, seed=i)).sum()
            for i, out in enumerate(o for o in actual if o.is_floating_point() and floats(o))
        )

    def floats(out):
        return out.shape != (K,) and out.shape != (entries,) and out.shape not in [(8,), (8, 4)]

    grad = torch.func.grad(value)(inputs[name])
    results = len(operator.call(**inputs))
    torch.testing.assert_close(grad.double(), expected[results], rtol=1e-4, atol=1e-4)
    _, pull = torch.func.vjp(value, inputs[name])
    torch.testing.assert_close(pull(torch.ones(()))[0], grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.func.jacrev(value)(inputs[name]), grad, rtol=1e-5, atol=1e-5)
    second = torch.func.grad(lambda x: torch.func.grad(value)(x).square().sum())(inputs[name])
    assert torch.isfinite(second).all()
    _, tangent = torch.func.jvp(value, (inputs[name],), (torch.ones_like(inputs[name]),))
    torch.testing.assert_close(tangent, grad.sum(), rtol=1e-3, atol=1e-3)


@DIFFERENTIABLE
def test_batches_of_gradients(operator, implementation):
    """As in `jacobian(vectorize=True)`."""
    leaves = {name: t.clone() for name, t in operator.inputs.items()}
    x = leaves[operator.differentiable[0]].requires_grad_()
    out = next(o for o in operator.call(**leaves) if o.requires_grad)
    upstream = torch.stack([normal(*out.shape, seed=i) for i in range(2)])
    (both,) = torch.autograd.grad(out, x, upstream, retain_graph=True, is_grads_batched=True)
    for one, given in zip(both, upstream, strict=True):
        torch.testing.assert_close(one, torch.autograd.grad(out, x, given, retain_graph=True)[0], rtol=1e-4, atol=1e-4)


def test_second_derivatives_of_dropout():
    leaves = {name: t.clone().requires_grad_() for name, t in MLP.items()}
    out = grouped_mlp(**leaves, inputs=SIZES, dropout=0.5)
    (grad,) = torch.autograd.grad(out.square().sum(), leaves["x"], create_graph=True)
    assert torch.isfinite(torch.autograd.grad(grad.square().sum(), leaves["w1"])[0]).all()
    norm = {name: t.clone().requires_grad_() for name, t in NORM.items()}
    out = ragged_layer_norm(**norm, segments=Ragged.of([4, 2]), dropout=0.5)
    (grad,) = torch.autograd.grad(out.square().sum(), norm["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        grad.sum().backward()


# The current device.


def test_launches_use_the_device_of_their_tensors(monkeypatch):
    """With tensors simulated to lie on another device, each launch happens inside the device guard."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    if os.environ.get("TRITON_INTERPRET", "0") != "1":
        pytest.skip("kernels are compiled here: the test with two devices runs them")
    monkeypatch.setenv(VARIABLE, "triton")
    depth, launched, outside = [0], [], []

    class Device:
        def __init__(self, device):
            pass

        def __enter__(self):
            depth[0] += 1

        def __exit__(self, *_):
            depth[0] -= 1

    plain = interpreter.InterpretedFunction.run

    def run_kernel(self, *args, **kwargs):
        launched.append(self.fn.__name__)
        if not depth[0]:
            outside.append(self.fn.__name__)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.InterpretedFunction, "run", run_kernel)
    monkeypatch.setattr(guard, "_is_current", lambda device: False)
    monkeypatch.setattr(torch.cuda, "device", Device)
    for operator in TABLE:
        run(operator, {name: t.clone() for name, t in operator.inputs.items()})
    large = CodebookLayout.of([70], [3])
    vq_assign(normal(B, 3), normal(210), large)
    residual_vq(normal(B, 150), [normal(5, 150)])
    augmented_rows(normal(B, F), CODES[:, 0], mixup_scale=0.5, noise_std=0.1)
    from spinlock_fast.kernels.adam.triton_update import AdamLauncher

    p, m, v = normal(4), torch.zeros(4), torch.zeros(4)
    AdamLauncher([p], [m], [v], (0.9, 0.999), 1e-8, 0.0, False)([normal(4)], torch.zeros(()), torch.ones(1))
    assert depth == [0]
    assert not outside
    assert len(set(launched)) >= 20


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@OPERATORS
def test_second_device(operator):
    expected = exact(operator, operator.inputs)
    with torch.cuda.device(0):
        given = {name: t.to("cuda:1") for name, t in operator.inputs.items()}
        close([part.cpu() for part in run(operator, given)], expected, 5e-3)
        assert torch.cuda.current_device() == 0
