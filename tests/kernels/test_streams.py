"""Work side by side: the same values as one after the other, also where memory is reused at once."""

import itertools
import threading
from contextlib import contextmanager

import pytest
import torch

from spinlock_fast.kernels.streams import BESIDE, LATER, joined, later, side_by_side

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


class FakeStream:
    """A stream that notes which others it waits for; all of them know what they have waited for."""

    made = 0

    def __init__(self, device=None, priority=0):
        FakeStream.made += 1
        self.number, self.device, self.waited = FakeStream.made, torch.device("cuda", 0), []

    def wait_stream(self, other):
        self.waited.append(other)


class FakeTensor:
    """A tensor on a CUDA device, as far as streams are concerned."""

    device = torch.device("cuda", 0)

    def record_stream(self, stream):
        pass


@pytest.fixture
def cuda(monkeypatch):
    """torch.cuda with streams of each thread, without a device; returns how to make a stream the current one."""
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


def stream_of_later():
    """The stream that work put off now runs on."""
    return later(lambda: torch.cuda.current_stream(FakeTensor.device), [FakeTensor()])


def test_nested_times_of_later_work_each_wait_for_theirs(cuda):
    caller = torch.cuda.current_stream(FakeTensor.device)
    with joined(FakeTensor.device):
        outer = stream_of_later()
        with joined(FakeTensor.device):
            inner = stream_of_later()
            assert inner not in caller.waited
        assert inner in caller.waited
        after = stream_of_later()
        assert after not in (outer, caller)
    assert {outer, after} <= set(caller.waited)
    assert stream_of_later() is caller  # at once: nothing is joined


def test_an_error_in_nested_later_work_is_the_one_that_arrives(cuda):
    caller = torch.cuda.current_stream(FakeTensor.device)

    def fails():
        raise ValueError("no")

    put_off = []

    def nested():
        with joined(FakeTensor.device):
            put_off.append(stream_of_later())
            with joined(FakeTensor.device):
                later(fails, [FakeTensor()])

    with pytest.raises(ValueError, match="no"):
        nested()
    assert put_off[0] in caller.waited
    with joined(FakeTensor.device):
        inner = stream_of_later()
    assert inner in caller.waited


def test_threads_put_off_their_own_work(cuda):
    """Two callers on streams of their own: each waits for its own work alone, whoever ends first."""
    meeting, found = threading.Barrier(2, timeout=30), {}

    def trains(name):
        mine = FakeStream()
        cuda(mine)
        with joined(FakeTensor.device):
            meeting.wait()
            streams = {stream_of_later() for _ in range(3)}
            meeting.wait()
        found[name] = mine, streams

    threads = [threading.Thread(target=trains, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (first, of_first), (second, of_second) = found["a"], found["b"]
    assert set(first.waited) == of_first
    assert set(second.waited) == of_second
    assert len(of_first) == len(of_second) == 3
    assert not of_first & of_second


def test_a_backward_pass_in_another_thread_puts_work_off(cuda):
    """Autograd's thread has the stream of the forward pass: what it puts off belongs to that caller."""
    caller = torch.cuda.current_stream(FakeTensor.device)
    found = []

    def backward(stream):
        cuda(stream)
        found.append(stream_of_later())

    def branch():
        return torch.cuda.current_stream(FakeTensor.device)

    with joined(FakeTensor.device):
        streams = side_by_side([branch, branch, branch], [FakeTensor()])
        assert streams[0] is caller
        for stream in streams:
            thread = threading.Thread(target=backward, args=(stream,))
            thread.start()
            thread.join()
    assert len({*streams, *found}) == 6
    assert set(found) <= set(caller.waited)


def test_many_callers_share_the_streams_that_there_are(cuda, monkeypatch):
    """torch makes 32 streams of a priority and then gives out the same ones: a run uses those of runs that ended."""
    pools = {priority: itertools.cycle([FakeStream() for _ in range(32)]) for priority in (BESIDE, LATER)}
    monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority: next(pools[priority]))
    for _ in range(40):
        caller = FakeStream()
        cuda(caller)
        with joined(FakeTensor.device):
            work = [lambda: torch.cuda.current_stream(FakeTensor.device)] * 4
            assert len(set(side_by_side(work, [FakeTensor()]))) == 4
            put_off = {stream_of_later() for _ in range(3)}
        assert len(put_off) == 3
        assert put_off <= set(caller.waited)
