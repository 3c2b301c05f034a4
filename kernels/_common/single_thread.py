"""Arithmetic whose rounding does not depend on the number of threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def single_thread(device: torch.device) -> Iterator[None]:
    """Operations of the CPU run on one thread meanwhile, so that its sums have one order, whatever the machine.

    Products and decompositions of the linear algebra libraries split their sums by threads. What follows from them is
    the start of a training, or its end, of which the last bit makes other weights. Nothing happens where the
    arithmetic is that of another device.

    Args:
        device: where the operands lie.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
