"""Side streams and deferred work give the results of sequential execution, also when memory is reused at once."""

import itertools
import threading
from contextlib import contextmanager

import pytest
import torch

from spinlock_fast.kernels._common.streams import (
    DEFERRED_PRIORITY,
    SIDE_PRIORITY,
    defer,
    deferred_scope,
    run_on_side_streams,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []


def busy(x, rounds):
    for _ in range(rounds):
        x = torch.sin(x) + 1.0
    return x


def loss(leaf):
    x = leaf * 1.0  # torch accumulates the gradient of a leaf on one stream
    works = [lambda: busy(x, 3).sum(), lambda: (busy(x, 50).sum(), x.square())]
    first, (second, third) = run_on_side_streams(works, [x])
    nested = run_on_side_streams([lambda: x.sum(), lambda: sum(run_on_side_streams([x.sum, x.sum, x.sum], [x]))], [x])
    return first + second + third.sum() + sum(nested)


def test_results_and_gradients_equal_sequential_ones():
    start = torch.randn(500, 700, device=DEVICE)
    for _ in range(5):
        x = start.clone().requires_grad_()
        loss(x).backward()
        expected = start.clone().double().requires_grad_()
        (busy(expected, 3) + busy(expected, 50) + expected.square() + 4.0 * expected).sum().backward()
        filler = [torch.full_like(start, torch.nan) for _ in range(8)]  # overwrites freed memory
        torch.testing.assert_close(x.grad.double(), expected.grad, rtol=1e-4, atol=1e-4)
        del filler


def test_side_streams_are_joined_after_an_error():
    x = torch.randn(3, device=DEVICE)

    def fails():
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        run_on_side_streams([x.sum, fails], [x])
    assert run_on_side_streams([x.sum, x.sum], [x])[1] == x.sum()


@pytest.mark.skipif(DEVICE == "cpu", reason="a CPU has no streams")
def test_side_streams_are_captured():
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
    """x * w, with a deferred gradient of w."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        grad_w = defer(lambda: busy(grad * x, 40).sum(0), [grad, x])
        return grad * w, grad_w


def test_deferred_results_are_valid_after_the_scope():
    start, weights = torch.randn(900, 700, device=DEVICE), torch.randn(3, 700, device=DEVICE)
    expected = None
    for scoped in (False, True, True):
        x, w = start.clone().requires_grad_(), [v.clone().requires_grad_() for v in weights]
        y = x
        for v in w:
            y = Weighted.apply(y, v)
        if scoped:
            with deferred_scope(x.device):
                y.sum().backward()
                filler = [torch.full_like(start, torch.nan) for _ in range(8)]  # overwrites freed memory
        else:
            y.sum().backward()
        found = torch.stack([x.grad.sum(0), *(v.grad for v in w)])
        if expected is None:
            expected = found
        assert torch.equal(found, expected)
    del filler


def test_scope_closes_after_an_error():
    x = torch.randn(3, device=DEVICE)

    def fails():
        with deferred_scope(x.device):
            defer(x.sum, [x])
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fails()
    with deferred_scope(x.device):
        total = defer(x.sum, [x])
    assert total == x.sum()


class FakeStream:
    """A stream that records the streams it waits for."""

    made = 0

    def __init__(self, device=None, priority=0):
        FakeStream.made += 1
        self.number, self.device, self.waited = FakeStream.made, torch.device("cuda", 0), []

    def wait_stream(self, other):
        self.waited.append(other)


class FakeTensor:
    """The attributes of a CUDA tensor that streams need."""

    device = torch.device("cuda", 0)

    def record_stream(self, stream):
        pass


@pytest.fixture
def cuda(monkeypatch):
    """torch.cuda with a current stream per thread, without a device; returns a setter of the current stream."""
    current = threading.local()

    @contextmanager
    def use(stream):
        before = current.stream
        current.stream = stream
        try:
            yield
        finally:
            current.stream = before

    def current_stream(device):
        if not hasattr(current, "stream"):
            current.stream = FakeStream()
        return current.stream

    def start(stream):
        current.stream = stream

    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    monkeypatch.setattr(torch.cuda, "stream", use)
    start(FakeStream())
    return start


def deferred_stream():
    """The stream that deferred work runs on."""
    return defer(lambda: torch.cuda.current_stream(FakeTensor.device), [FakeTensor()])


def test_nested_scopes_wait_for_their_work(cuda):
    caller = torch.cuda.current_stream(FakeTensor.device)
    with deferred_scope(FakeTensor.device):
        outer = deferred_stream()
        with deferred_scope(FakeTensor.device):
            inner = deferred_stream()
            assert inner not in caller.waited
        assert inner in caller.waited
        after = deferred_stream()
        assert after not in (outer, caller)
    assert {outer, after} <= set(caller.waited)
    assert deferred_stream() is caller  # no scope is open


def test_error_in_a_nested_scope_propagates(cuda):
    caller = torch.cuda.current_stream(FakeTensor.device)

    def fails():
        raise ValueError("no")

    deferred = []

    def nested():
        with deferred_scope(FakeTensor.device):
            deferred.append(deferred_stream())
            with deferred_scope(FakeTensor.device):
                defer(fails, [FakeTensor()])

    with pytest.raises(ValueError, match="no"):
        nested()
    assert deferred[0] in caller.waited
    with deferred_scope(FakeTensor.device):
        inner = deferred_stream()
    assert inner in caller.waited


def test_threads_do_not_share_deferred_streams(cuda):
    """Two callers on different streams each wait for their own work only, whichever ends first."""
    meeting, found = threading.Barrier(2, timeout=30), {}

    def trains(name):
        mine = FakeStream()
        cuda(mine)
        with deferred_scope(FakeTensor.device):
            meeting.wait()
            streams = {deferred_stream() for _ in range(3)}
            meeting.wait()
        found[name] = mine, streams

    threads = [threading.Thread(target=trains, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (first, deferred_by_first), (second, deferred_by_second) = found["a"], found["b"]
    assert set(first.waited) == deferred_by_first
    assert set(second.waited) == deferred_by_second
    assert len(deferred_by_first) == len(deferred_by_second) == 3
    assert not deferred_by_first & deferred_by_second


def test_backward_in_another_thread_finds_the_scope(cuda):
    """Autograd's thread runs on the stream of the forward pass, so its deferred work belongs to that caller."""
    caller = torch.cuda.current_stream(FakeTensor.device)
    found = []

    def backward(stream):
        cuda(stream)
        found.append(deferred_stream())

    def branch():
        return torch.cuda.current_stream(FakeTensor.device)

    with deferred_scope(FakeTensor.device):
        streams = run_on_side_streams([branch, branch, branch], [FakeTensor()])
        assert streams[0] is caller
        for stream in streams:
            thread = threading.Thread(target=backward, args=(stream,))
            thread.start()
            thread.join()
    assert len({*streams, *found}) == 6
    assert set(found) <= set(caller.waited)


def test_streams_of_closed_scopes_are_reused(cuda, monkeypatch):
    """torch has 32 streams per priority and hands them out again: later scopes use those of closed scopes."""
    pools = {
        priority: itertools.cycle([FakeStream() for _ in range(32)]) for priority in (SIDE_PRIORITY, DEFERRED_PRIORITY)
    }
    monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority: next(pools[priority]))
    for _ in range(40):
        caller = FakeStream()
        cuda(caller)
        with deferred_scope(FakeTensor.device):
            work = [lambda: torch.cuda.current_stream(FakeTensor.device)] * 4
            assert len(set(run_on_side_streams(work, [FakeTensor()]))) == 4
            deferred = {deferred_stream() for _ in range(3)}
        assert len(deferred) == 3
        assert deferred <= set(caller.waited)
