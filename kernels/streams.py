"""Work that does not depend on each other, side by side on a GPU, and work that is not needed at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")

# Priorities of streams, the first one first. What a step waits for longest goes before what runs beside it, and that
# before what only the optimizer waits for. A captured graph keeps them.
MAIN, BESIDE, LATER = -2, -1, 0

_streams: dict[torch.device, list[torch.cuda.Stream]] = {}
_depth: dict[torch.device, int] = {}
_later_streams: dict[torch.device, list[torch.cuda.Stream]] = {}
_waiting: dict[torch.device, list[Any]] = {}  # what deferred work reads, while it may run


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
    depth = _depth.get(device, 0)
    sides = _sides(device, caller, depth, len(works) - 1)
    for side in sides:
        side.wait_stream(caller)
    found: list[Result] = []
    _depth[device] = depth + len(sides)
    try:
        for work, side in zip(works[1:], sides, strict=True):
            with torch.cuda.stream(side):
                found.append(work())
            for tensor in inputs:
                tensor.record_stream(side)
        found.insert(0, works[0]())
    finally:
        _depth[device] = depth
        for side in sides:  # also after an error: a capture must not end with a branch that nobody joined
            caller.wait_stream(side)
    for result in found[1:]:
        parts: tuple[Any, ...] = result if isinstance(result, tuple) else (result,)
        for part in parts:
            if isinstance(part, Tensor):
                part.record_stream(caller)
    return found


def _sides(device: torch.device, caller: torch.cuda.Stream, depth: int, count: int) -> list[torch.cuda.Stream]:
    """Streams that neither the caller nor one further up uses."""
    streams = _streams.setdefault(device, [])
    while len(streams) < depth + count + 1:
        streams.append(torch.cuda.Stream(device, priority=BESIDE))
    return [stream for stream in streams[depth:] if stream != caller][:count]


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Where work may be put off by `later`: the current stream waits for it at the end. May not be nested."""
    if device.type != "cuda":
        yield
        return
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    waiting = _waiting[device] = []
    try:
        yield
    finally:
        del _waiting[device]
        caller = torch.cuda.current_stream(device)
        for stream in _later_streams.get(device, [])[: len(waiting)]:
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
    waiting = _waiting.get(device)
    if waiting is None or torch.compiler.is_compiling():
        return work()
    streams = _later_streams.setdefault(device, [])
    if len(streams) == len(waiting):
        streams.append(torch.cuda.Stream(device, priority=LATER))
    stream = streams[len(waiting)]
    waiting.append((work, list(inputs)))
    before = streams[: len(waiting) - 1] if after_others else []
    for other in (torch.cuda.current_stream(device), *before):
        stream.wait_stream(other)
    with torch.cuda.stream(stream):
        return work()
