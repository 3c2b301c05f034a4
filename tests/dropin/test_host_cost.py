"""Host cost of eager steps: numbers of operations, no host synchronisation, one native call for one codebook."""

import copy
import os
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common.op_counts import count_ops
from spinlock_fast import GroupedVectorQuantizer, ResidualVQ, VectorQuantize
from spinlock_fast.dropin import codebook, dead_codes, eager_step

native = pytest.mark.skipif("SPINLOCK_FAST_BACKEND" in os.environ, reason="counts operations of the native path")
SIZES = {"dim": 8, "codebook_size": 16}
# Upper bounds of the aten operations of a step; the loss of the test takes six, and clearing a gradient none.
BOUNDS = {
    "one codebook": (lambda: VectorQuantize(**SIZES), 20),
    "cosine": (lambda: VectorQuantize(**SIZES, use_cosine_sim=True), 20),
    "resets": (lambda: VectorQuantize(**SIZES, threshold_ema_dead_code=2), 80),
    "stages": (lambda: ResidualVQ(**SIZES, num_quantizers=8), 95),
    "stages, resets": (lambda: ResidualVQ(**SIZES, num_quantizers=8, threshold_ema_dead_code=2), 480),
    "groups": (lambda: GroupedVectorQuantizer([9, 4], [5, 3], codebook_init="uniform"), 45),
}


def step(layer, x):
    leaf = x.detach().requires_grad_()
    quantized, codes, loss = layer(leaf)[:3]
    (quantized.sin().sum() + loss.sum()).backward()
    return quantized.detach(), codes, loss.detach(), leaf.grad


@native
@pytest.mark.parametrize("case", BOUNDS)
def test_number_of_operations(case):
    make, bound = BOUNDS[case]
    layer, x = make(), torch.randn(4, 12, 8)
    step(layer, x)
    counted = count_ops(lambda: step(layer, x))
    assert 5 < counted.total() <= bound, counted


@native
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cosine_sim": True},
        {"rotation_trick": False, "commitment_weight": 0.3},
        {"heads": 2, "codebook_dim": 4},
        {"route_gradients_to_input": False},
        {"threshold_ema_dead_code": 2},
        {"decay": 0.3, "eps": 1e-3},
    ],
    ids=str,
)
def test_eager_step_equals_the_operator(options):
    """Outputs, codes, losses and gradients to the last bit; codes of the next step to rounding."""
    layer = VectorQuantize(**SIZES, **options)
    other = copy.deepcopy(layer)
    calls = mock.Mock(side_effect=eager_step.quantize_step)
    for i in range(3):
        x = torch.randn(2, 20, 8, generator=torch.Generator().manual_seed(i))
        torch.manual_seed(i)
        with mock.patch.object(eager_step, "quantize_step", calls):
            found = step(layer, x)
        torch.manual_seed(i)
        with (
            mock.patch.object(eager_step, "forward", return_value=None),
            mock.patch.object(codebook, "average_codes", return_value=False),
        ):
            expected = step(other, x)
        for one, two in zip(found, expected, strict=True):
            assert one is two is None or torch.equal(one, two)
        torch.testing.assert_close(layer.state_dict(), other.state_dict(), rtol=1e-6, atol=1e-6)
        assert torch.equal(layer._codebook.usage, other._codebook.usage)
        other.load_state_dict(layer.state_dict())
    assert calls.call_count == 3


@native
def test_changed_codes_do_not_change_the_gradient():
    layer, x = VectorQuantize(**SIZES, freeze_codebook=True), torch.randn(2, 20, 8)
    expected = step(layer, x)[3]
    leaf = x.clone().requires_grad_()
    quantized, codes, loss = layer(leaf)
    codes += 100
    layer.codebook = torch.zeros(16, 8)
    (quantized.sin().sum() + loss.sum()).backward()
    assert torch.equal(leaf.grad, expected)


class NoSynchronisation(TorchDispatchMode):
    """Refuses operations that read values on the host, or whose result has a shape that depends on them."""

    REFUSED = ("_local_scalar_dense", "nonzero", "masked_select", "item", "unique", "is_nonzero", "equal")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).removeprefix("aten.").split(".")[0]
        assert name not in self.REFUSED, f"{function} synchronises with the host"
        if name == "index":
            assert not any(i is not None and i.dtype == torch.bool for i in args[1]), "a mask selects rows"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("reset", [0, 2])
@pytest.mark.parametrize("kind", ["one", "per head", "cosine", "stages", "groups"])
def test_steps_do_not_synchronise(kind, reset):
    """What a CUDA graph of a step needs. Operators of this package are opaque to the mode."""
    resets = {**SIZES, "threshold_ema_dead_code": reset}
    layer = {
        "one": lambda: VectorQuantize(**resets),
        "per head": lambda: VectorQuantize(**resets, heads=2, codebook_dim=4, separate_codebook_per_head=True),
        "cosine": lambda: VectorQuantize(**resets, use_cosine_sim=True),
        "stages": lambda: ResidualVQ(**resets, num_quantizers=3),
        "groups": lambda: GroupedVectorQuantizer([9, 4], [5, 3], codebook_init="uniform"),
    }[kind]()
    x = torch.randn(4, 12, 8)
    step(layer, x)
    with NoSynchronisation():
        step(layer, x)


@pytest.mark.parametrize("num_rows", [5, 40])
def test_resets_of_all_stages_at_once_equal_those_one_by_one(num_rows):
    """As on a GPU, beside the path of a CPU."""
    layer = ResidualVQ(**SIZES, num_quantizers=3, threshold_ema_dead_code=2)
    other = copy.deepcopy(layer)
    x = torch.randn(1, num_rows, 8)
    torch.manual_seed(1)
    layer(x)
    torch.manual_seed(1)
    with mock.patch.object(dead_codes, "slots_at_once", lambda device, slots: slots):
        other(x)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [VectorQuantize, ResidualVQ])
def test_cuda_graphs(kind):
    """`torch.cuda.make_graphed_callables` gives the results of eager steps."""
    options = {"num_quantizers": 3} if kind is ResidualVQ else {}
    layer = kind(dim=64, codebook_size=512, freeze_codebook=True, **options).cuda()
    x = torch.randn(4, 256, 64, device="cuda")
    expected = step(layer, x)
    graphed = torch.cuda.make_graphed_callables(copy.deepcopy(layer), (x.clone().requires_grad_(),))
    for one, two in zip(step(graphed, x), expected, strict=True):
        torch.testing.assert_close(one, two)
