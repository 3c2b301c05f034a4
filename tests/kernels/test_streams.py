"""Work side by side: the same values as one after the other, also where memory is reused at once."""

import pytest
import torch

from spinlock_fast.kernels.streams import joined, later, side_by_side

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []


def busy(x, rounds):
    for _ in range(rounds):
        x = torch.sin(x) + 1.0
    return x


def loss(leaf):
    x = leaf * 1.0  # a leaf itself should be used by one stream: torch adds up its gradient there
    first, (second, third) = side_by_side([lambda: busy(x, 3).sum(), lambda: (busy(x, 50).sum(), x.square())], [x])
    nested = side_by_side([lambda: x.sum(), lambda: sum(side_by_side([x.sum, x.sum, x.sum], [x]))], [x])
    return first + second + third.sum() + sum(nested)


def test_values_and_gradients():
    start = torch.randn(500, 700, device=DEVICE)
    for _ in range(5):
        x = start.clone().requires_grad_()
        loss(x).backward()
        expected = start.clone().double().requires_grad_()
        (busy(expected, 3) + busy(expected, 50) + expected.square() + 4.0 * expected).sum().backward()
        filler = [torch.full_like(start, torch.nan) for _ in range(8)]  # what freed memory turns into
        torch.testing.assert_close(x.grad.double(), expected.grad, rtol=1e-4, atol=1e-4)
        del filler


def test_an_error_leaves_no_branch_open():
    x = torch.randn(3, device=DEVICE)

    def fails():
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        side_by_side([x.sum, fails], [x])
    assert side_by_side([x.sum, x.sum], [x])[1] == x.sum()


@pytest.mark.skipif(DEVICE == "cpu", reason="a CPU has no streams")
def test_branches_are_captured():
    x = torch.randn(300, 300, device=DEVICE)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        x.requires_grad_()
        for _ in range(2):
            (expected,) = torch.autograd.grad(loss(x), x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            (found,) = torch.autograd.grad(loss(x), x)
        for _ in range(3):
            graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(found, expected)


class Weighted(torch.autograd.Function):
    """x * w, whose gradient of w nobody waits for."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        of_w = later(lambda: busy(grad * x, 40).sum(0), [grad, x])
        return grad * w, of_w


def test_later_work_is_there_at_the_end():
    start, weights = torch.randn(900, 700, device=DEVICE), torch.randn(3, 700, device=DEVICE)
    expected = None
    for joins in (False, True, True):
        x, w = start.clone().requires_grad_(), [v.clone().requires_grad_() for v in weights]
        y = x
        for v in w:
            y = Weighted.apply(y, v)
        if joins:
            with joined(x.device):
                y.sum().backward()
                filler = [torch.full_like(start, torch.nan) for _ in range(8)]  # what freed memory turns into
        else:
            y.sum().backward()
        found = torch.stack([x.grad.sum(0), *(v.grad for v in w)])
        if expected is None:
            expected = found
        assert torch.equal(found, expected)
    del filler


def test_an_error_ends_the_time_of_later_work():
    x = torch.randn(3, device=DEVICE)

    def fails():
        with joined(x.device):
            later(x.sum, [x])
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fails()
    with joined(x.device):
        total = later(x.sum, [x])
    assert total == x.sum()
