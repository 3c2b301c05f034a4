"""CPU arithmetic whose rounding does not depend on the number of threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def single_thread(device: torch.device) -> Iterator[None]:
    """Runs CPU operations on one thread, so that sums have the same order on every machine.

    Linear algebra libraries split the sums of products and decompositions by threads. A different last bit in the
    initialisation leads training to different weights. No effect for other devices.

    Args:
        device: of the operands.
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
