"""Adam in one launch: the reference, and the kernel (interpreted without a CUDA device)."""

import copy

import pytest
import torch
from torch import nn

from spinlock_fast.kernels.adam.reference import adam_step
from spinlock_fast.training.optimizer import FusedAdam

pytest.importorskip("triton", reason="the package triton is not installed here")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []


@pytest.fixture(autouse=True)
def _use_triton(monkeypatch):
    monkeypatch.setenv("SPINLOCK_FAST_BACKEND", "triton")


def parameters(shapes):
    return [nn.Parameter(torch.randn(shape, device=DEVICE)) for shape in shapes]


def optimize(ours, rates, decay, decoupled, dtype=torch.float64):
    """Steps of `FusedAdam` and of torch's Adam in float64 with the same random gradients; returns both."""
    theirs = [nn.Parameter(p.detach().to(dtype)) for p in ours]
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    reference = kind(theirs, lr=0.0, weight_decay=decay)
    rate = torch.zeros(1, device=DEVICE)
    adam = FusedAdam(ours, rate, decay, decoupled)
    for value in rates:
        rate.fill_(value)
        reference.param_groups[0]["lr"] = value
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.to(dtype)
        adam.step()
        reference.step()
    return adam, theirs


@pytest.mark.parametrize(("decoupled", "decay"), [(False, 0.0), (False, 0.1), (True, 0.1)])
def test_parameters_equal_those_of_torch(decoupled, decay):
    ours = parameters([(3, 5), (1,), (1025,), (40, 30), (2, 3, 7)])
    ours[3] = nn.Parameter(ours[3].detach().t())  # dense, column-major
    adam, theirs = optimize(ours, [0.1, 0.05, 0.02, 0.01], decay, decoupled)
    assert int(adam.count) == 4
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("decoupled", "decay"), [(False, 0.0), (False, 0.1), (True, 0.1)])
def test_reference_equals_torch_and_the_kernel(decoupled, decay):
    (ours,) = parameters([(33, 7)])
    expected = ours.detach().double()
    mean, square = torch.zeros_like(expected), torch.zeros_like(expected)
    theirs = nn.Parameter(expected.clone())
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    optimizer = kind([theirs], lr=0.1, weight_decay=decay)
    adam = FusedAdam([ours], torch.full((1,), 0.1, device=DEVICE), decay, decoupled)
    for step in range(1, 4):
        ours.grad = torch.randn_like(ours)
        theirs.grad = ours.grad.double()
        adam.step()
        optimizer.step()
        expected, mean, square = adam_step(
            expected, theirs.grad, mean, square, step, 0.1, weight_decay=decay, decoupled=decoupled
        )
    torch.testing.assert_close(theirs.detach(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.detach().double(), expected, rtol=1e-6, atol=1e-6)


def test_more_tensors_than_one_launch_takes():
    ours = parameters([(n,) for n in range(1, 71)])
    adam, theirs = optimize(ours, [0.1, 0.1], 0.0, False)
    assert int(adam.count) == 2
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-6)


def test_unaligned_and_transposed_gradients():
    (ours,) = parameters([(20, 30)])
    start = ours.detach().clone()
    grad = torch.randn(20, 30, device=DEVICE)
    found = []
    for other in (grad, grad.t().contiguous().t(), torch.cat([grad.new_zeros(1), grad.flatten()])[1:].view(20, 30)):
        with torch.no_grad():
            ours.copy_(start)
        ours.grad = other
        adam = FusedAdam([ours], torch.full((1,), 0.1, device=DEVICE))
        adam.step()
        found.append(ours.detach().clone())
    assert not torch.equal(found[0], start)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_parameters_without_gradient_are_skipped():
    idle, used = parameters([(3,), (4,)])
    before = idle.detach().clone()
    adam = FusedAdam([idle, used], torch.full((1,), 0.1, device=DEVICE))
    used.grad = torch.ones_like(used)
    adam.step()
    assert torch.equal(idle, before)
    assert not adam.mean[0].any()
    idle.grad = torch.ones_like(idle)
    adam.step()
    assert (idle < before).all()


def test_small_gradients_keep_a_precise_square():
    """1 - beta2 is computed in float64; in float32 its relative error is 3e-5."""
    (ours,) = parameters([(100,)])
    adam = FusedAdam([ours], torch.full((1,), 0.1, device=DEVICE))
    ours.grad = torch.full_like(ours, 1e-4)
    adam.step()
    torch.testing.assert_close(adam.square[0].double(), torch.full_like(ours, 1e-11).double(), rtol=1e-6, atol=0)


def test_state_dict_loads_into_torch():
    ours = parameters([(6, 4)])
    adam, theirs = optimize(ours, [0.1], 0.0, False, torch.float32)
    reference = torch.optim.Adam(theirs)
    state = copy.deepcopy(adam.state_dict())
    state["param_groups"][0] |= {key: reference.param_groups[0][key] for key in reference.defaults}
    reference.load_state_dict(state)
    assert torch.equal(reference.state[theirs[0]]["exp_avg"], adam.mean[0])


def follows_torch_after(change):
    """Asserts that steps after `change` equal those of torch; returns whether the former memory was left unchanged."""
    (ours,) = parameters([(6, 8)])
    theirs = nn.Parameter(ours.detach().clone())
    adam = FusedAdam([ours], torch.full((1,), 0.1, device=DEVICE))
    reference = torch.optim.Adam([theirs], lr=0.1)
    old = ours.data
    for step in range(4):
        if step == 2:
            change(ours)
            untouched = old.clone()
        theirs.grad = torch.randn(6, 8, device=DEVICE)
        ours.grad = torch.empty_like(ours).copy_(theirs.grad)
        adam.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    return torch.equal(old, untouched)


def test_parameters_may_move_to_other_memory():
    def cloned(p):
        p.data = p.data.clone()

    assert follows_torch_after(cloned)  # and does not write to the former memory


def test_parameters_may_change_their_strides():
    def transposed(p):
        p.data = p.data.t().contiguous().t()

    assert follows_torch_after(transposed)


def test_parameters_may_become_non_dense():
    def gappy(p):
        p.data = p.data.repeat_interleave(2, 1)[:, ::2]

    assert follows_torch_after(gappy)


def test_half_precision_gradients():
    (ours,) = parameters([(100,)])
    full = copy.deepcopy(ours)
    grad = torch.randn(100, device=DEVICE).bfloat16()
    if not hasattr(ours, "grad_dtype"):
        pytest.skip("this torch has no gradients of another dtype than the parameter's")
    ours.grad_dtype = torch.bfloat16
    ours.grad, full.grad = grad, grad.float()
    for p in (ours, full):
        FusedAdam([p], torch.full((1,), 0.1, device=DEVICE)).step()
    assert torch.equal(ours, full)


def test_deepcopy_updates_its_own_parameters():
    (ours,) = parameters([(5,)])
    adam = FusedAdam([ours], torch.full((1,), 0.1, device=DEVICE))
    ours.grad = torch.ones_like(ours)
    adam.step()
    before, other = ours.detach().clone(), copy.deepcopy(adam)
    other.parameters[0].grad = torch.ones_like(ours)
    other.step()
    assert torch.equal(ours, before)
    assert not torch.equal(other.parameters[0], before)


def test_address_tables_are_bounded():
    (ours,) = parameters([(5,)])
    adam = FusedAdam([ours], torch.full((1,), 0.1, device=DEVICE))
    places = []
    for _ in range(40):
        ours.data = ours.data.clone()
        places.append(ours.data)  # keeps addresses distinct
        ours.grad = torch.ones_like(ours)
        adam.step()
    assert len(adam._launches) < 40
