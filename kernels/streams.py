"""Work that does not depend on each other, side by side on a GPU, and work that is not needed at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")

# Priorities of streams, the first one first. What a step waits for longest goes before what runs beside it, and that
# before what only the optimizer waits for. A captured graph keeps them.
MAIN, BESIDE, LATER = -2, -1, 0


class _Deferred:
    """Work that was put off, in one `joined`: the stream of each, and what it reads."""

    def __init__(self) -> None:
        self.entries: list[tuple[torch.cuda.Stream, Any]] = []


class _Family:
    """The streams that serve one caller's stream: branches beside it, and work that is put off.

    Callers on different streams share none, so that none waits for another, and a graph that one captures holds
    nothing of the other's. Autograd's thread runs a backward pass on the stream of its forward pass, which tells the
    family there, too.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sides: list[torch.cuda.Stream] = []
        self.laters: list[torch.cuda.Stream] = []
        self.open: list[_Deferred] = []  # of every `joined` that has not ended, the innermost last

    def _at_least(self, count: int, streams: list[torch.cuda.Stream], priority: int) -> list[torch.cuda.Stream]:
        """The family's own of `streams`, with as many new ones as are missing."""
        streams[:] = [stream for stream in streams if _families.get(stream) is self]
        while len(streams) < count:
            stream = _unused_stream(self.device, priority)
            _families[stream] = self
            streams.append(stream)
        return streams

    def sides_of(self, caller: torch.cuda.Stream, depth: int, count: int) -> list[torch.cuda.Stream]:
        """Streams that neither the caller nor one further up uses."""
        sides = self._at_least(depth + count + 1, self.sides, BESIDE)
        return [stream for stream in sides[depth:] if stream != caller][:count]

    def pending(self) -> list[torch.cuda.Stream]:
        """Streams of all work that is put off."""
        return [stream for deferred in self.open for stream, _ in deferred.entries]

    def next_later(self) -> torch.cuda.Stream:
        """A stream for more of it."""
        used = len(self.pending())
        return self._at_least(used + 1, self.laters, LATER)[used]


# Of every stream in use. Torch makes 32 streams of a device and priority, and then gives out the same ones again.
_STREAMS = 32
_families: dict[torch.cuda.Stream, _Family] = {}
_lock = threading.Lock()
_here = threading.local()  # depth: of the branches that this thread is in


def _unused_stream(device: torch.device, priority: int) -> torch.cuda.Stream:
    """A stream of no family, or, where there is none, of one with nothing put off; if need be, any."""
    streams = [torch.cuda.Stream(device, priority=priority) for _ in range(_STREAMS)]
    free = [stream for stream in streams if stream not in _families]
    idle = [stream for stream in streams if stream in _families and not _families[stream].open]
    return [*free, *idle, *streams][0]


def _family(caller: torch.cuda.Stream) -> _Family:
    found = _families.get(caller)
    if found is None:
        with _lock:
            found = _families.setdefault(caller, _Family(caller.device))
    return found


def side_by_side(works: Sequence[Callable[[], Result]], inputs: Sequence[Tensor]) -> list[Result]:
    """What each of `works` returns. On a CUDA device each runs on a stream of its own, the first on the caller's.

    Short kernels that wait for memory more than they compute leave most of a GPU idle; several of them fill it. A
    captured graph keeps the branches. Autograd runs the backward pass of each on the stream of its forward pass.

    Args:
        works: functions of no argument that return a tensor, or a tuple of tensors.
        inputs: tensors that they read; the first says the device. Their memory is not used again before all have
            read it.
    """
    device = inputs[0].device
    if device.type != "cuda" or len(works) < 2 or torch.compiler.is_compiling():
        return [work() for work in works]
    caller = torch.cuda.current_stream(device)
    depth: int = getattr(_here, "depth", 0)
    sides = _family(caller).sides_of(caller, depth, len(works) - 1)
    for side in sides:
        side.wait_stream(caller)
    found: list[Result] = []
    _here.depth = depth + len(sides)
    try:
        for work, side in zip(works[1:], sides, strict=True):
            with torch.cuda.stream(side):
                found.append(work())
            for tensor in inputs:
                tensor.record_stream(side)
        found.insert(0, works[0]())
    finally:
        _here.depth = depth
        for side in sides:  # also after an error: a capture must not end with a branch that nobody joined
            caller.wait_stream(side)
    for result in found[1:]:
        parts: tuple[Any, ...] = result if isinstance(result, tuple) else (result,)
        for part in parts:
            if isinstance(part, Tensor):
                part.record_stream(caller)
    return found


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Where work may be put off by `later`: the current stream waits for it at the end, also after an error.

    May be nested, and entered by several threads at once: each end waits for all work that was put off since its
    begin on streams that serve the same caller's stream.
    """
    if device.type != "cuda":
        yield
        return
    caller = torch.cuda.current_stream(device)
    family, deferred = _family(caller), _Deferred()
    family.open.append(deferred)
    try:
        yield
    finally:
        waits = family.pending()
        family.open.remove(deferred)
        for stream in waits:
            caller.wait_stream(stream)


def later(work: Callable[[], Result], inputs: Sequence[Tensor], after_others: bool = False) -> Result:
    """What `work` returns, which nobody may read before the end of `joined`; where that is not in use, at once.

    For what an optimizer alone asks for: gradients of weights, which need not delay those of the layer before.

    Args:
        work: function of no argument; it runs on a stream of its own, after what the current one was given so far.
        inputs: tensors that it reads; the first says the device. They are kept until the end of `joined`.
        after_others: it reads what was put off before.
    """
    device = inputs[0].device
    if device.type != "cuda" or torch.compiler.is_compiling():
        return work()
    current = torch.cuda.current_stream(device)
    family = _families.get(current)
    if family is None or not family.open:
        return work()
    before = family.pending() if after_others else []
    stream = family.next_later()
    family.open[-1].entries.append((stream, (work, list(inputs))))
    for other in (current, *before):
        stream.wait_stream(other)
    with torch.cuda.stream(stream):
        return work()
