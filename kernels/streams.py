"""Work that does not depend on each other, side by side on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")

_streams: dict[torch.device, list[torch.cuda.Stream]] = {}
_depth: dict[torch.device, int] = {}


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
        streams.append(torch.cuda.Stream(device))
    return [stream for stream in streams[depth:] if stream != caller][:count]
