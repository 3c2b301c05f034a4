"""Side streams on a GPU: independent work that runs concurrently, and work that is deferred.

Every stream of a caller has its own pool of side streams. Callers on different streams share none of them, so neither
waits for the other, and a graph that one captures contains no work of the other. Autograd runs each backward node on
the stream of its forward node; its thread finds the same pool through that stream.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")

# Stream priorities, lower runs first: the critical path of a step, then what runs beside it, then what only the
# optimizer needs. A captured graph keeps them.
MAIN_PRIORITY, SIDE_PRIORITY, DEFERRED_PRIORITY = -2, -1, 0

_STREAMS_PER_PRIORITY = 32  # torch hands out this many streams per device and priority, then the same ones again
_pools: dict[torch.cuda.Stream, _StreamPool] = {}  # by every stream that is a caller's, a side or a deferred stream
_lock = threading.Lock()
_thread = threading.local()  # depth: number of side streams in use by the enclosing calls of this thread


class _Scope:
    """The deferred work of one `deferred_scope`: the stream of each, and what it reads, which stays alive."""

    def __init__(self) -> None:
        self.entries: list[tuple[torch.cuda.Stream, Any]] = []


class _StreamPool:
    """Side streams and streams of deferred work that belong to one caller's stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.side: list[torch.cuda.Stream] = []
        self.deferred: list[torch.cuda.Stream] = []
        self.scopes: list[_Scope] = []  # open ones, innermost last

    def _at_least(self, count: int, streams: list[torch.cuda.Stream], priority: int) -> list[torch.cuda.Stream]:
        """Drops streams that another pool has taken and adds new ones until there are `count`."""
        streams[:] = [stream for stream in streams if _pools.get(stream) is self]
        while len(streams) < count:
            stream = _unused_stream(self.device, priority)
            _pools[stream] = self
            streams.append(stream)
        return streams

    def side_streams(self, caller: torch.cuda.Stream, depth: int, count: int) -> list[torch.cuda.Stream]:
        """`count` streams that neither the caller nor an enclosing call uses."""
        streams = self._at_least(depth + count + 1, self.side, SIDE_PRIORITY)
        return [stream for stream in streams[depth:] if stream != caller][:count]

    def pending(self) -> list[torch.cuda.Stream]:
        """Streams of all deferred work of the open scopes."""
        return [stream for scope in self.scopes for stream, _ in scope.entries]

    def next_deferred(self) -> torch.cuda.Stream:
        used = len(self.pending())
        return self._at_least(used + 1, self.deferred, DEFERRED_PRIORITY)[used]


def _unused_stream(device: torch.device, priority: int) -> torch.cuda.Stream:
    """A stream of no pool; else one of a pool without open scopes; else any."""
    streams = [torch.cuda.Stream(device, priority=priority) for _ in range(_STREAMS_PER_PRIORITY)]
    free = [stream for stream in streams if stream not in _pools]
    idle = [stream for stream in streams if stream in _pools and not _pools[stream].scopes]
    return [*free, *idle, *streams][0]


def _pool_of(caller: torch.cuda.Stream) -> _StreamPool:
    pool = _pools.get(caller)
    if pool is None:
        with _lock:
            pool = _pools.setdefault(caller, _StreamPool(caller.device))
    return pool


def run_on_side_streams(works: Sequence[Callable[[], Result]], inputs: Sequence[Tensor]) -> list[Result]:
    """Runs independent functions concurrently on a CUDA device, one after the other elsewhere.

    The first runs on the current stream, each other on a side stream; the current stream waits for all of them, also
    after an error. Short kernels that are bound by latency leave most of a GPU idle, and several of them fill it. A
    captured graph keeps the branches. Autograd runs the backward pass of each on the stream of its forward pass.

    Args:
        works: functions without arguments that return a tensor or a tuple.
        inputs: tensors that they read, on one device. Their memory is not reused before all have read it.

    Returns:
        The result of each function.
    """
    device = inputs[0].device
    if device.type != "cuda" or len(works) < 2 or torch.compiler.is_compiling():
        return [work() for work in works]
    caller = torch.cuda.current_stream(device)
    depth: int = getattr(_thread, "depth", 0)
    streams = _pool_of(caller).side_streams(caller, depth, len(works) - 1)
    for stream in streams:
        stream.wait_stream(caller)
    results: list[Result] = []
    _thread.depth = depth + len(streams)
    try:
        for work, stream in zip(works[1:], streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(work())
            for tensor in inputs:
                tensor.record_stream(stream)
        results.insert(0, works[0]())
    finally:
        _thread.depth = depth
        for stream in streams:  # a capture fails if a branch is not joined
            caller.wait_stream(stream)
    for result in results[1:]:
        parts: tuple[Any, ...] = result if isinstance(result, tuple) else (result,)
        for part in parts:
            if isinstance(part, Tensor):
                part.record_stream(caller)
    return results


@contextmanager
def deferred_scope(device: torch.device) -> Iterator[None]:
    """Enables `defer` on the current stream, which waits for all deferred work on exit, also after an error.

    Scopes nest, and several threads may enter scopes at once. On exit a scope waits for all pending work of the
    caller's stream, that of enclosing scopes included.
    """
    if device.type != "cuda":
        yield
        return
    caller = torch.cuda.current_stream(device)
    pool, scope = _pool_of(caller), _Scope()
    pool.scopes.append(scope)
    try:
        yield
    finally:
        pending = pool.pending()
        pool.scopes.remove(scope)
        for stream in pending:
            caller.wait_stream(stream)


def defer(work: Callable[[], Result], inputs: Sequence[Tensor], after_deferred: bool = False) -> Result:
    """Runs `work` on a low-priority stream; outside of a `deferred_scope`, and on a CPU, on the current one.

    For results that only the optimizer reads, such as gradients of weights: they do not delay the backward pass of
    the layer before.

    Args:
        work: function without arguments. It starts after what the current stream has been given so far.
        inputs: tensors that it reads, on one device; kept alive until the scope exits.
        after_deferred: whether it also waits for all work deferred before.

    Returns:
        Result of `work`; valid after the enclosing `deferred_scope` exits.
    """
    device = inputs[0].device
    if device.type != "cuda" or torch.compiler.is_compiling():
        return work()
    current = torch.cuda.current_stream(device)
    pool = _pools.get(current)
    if pool is None or not pool.scopes:
        return work()
    pending = pool.pending() if after_deferred else []
    stream = pool.next_deferred()
    pool.scopes[-1].entries.append((stream, (work, list(inputs))))
    for other in (current, *pending):
        stream.wait_stream(other)
    with torch.cuda.stream(stream):
        return work()
