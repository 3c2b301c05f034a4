"""Work side by side: the same values as one after the other, also where memory is reused at once."""

import pytest
import torch

from spinlock_fast.kernels.streams import side_by_side

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
