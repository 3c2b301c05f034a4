"""An event that a signal sets, so that a simulation stops at the end of a tile."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from spinlock_fast.interrupts import handle_signals


class StopEvent(threading.Event):
    """An event set by a signal, with the signal's number."""

    signal_number = 0


@contextmanager
def stop_on_signal() -> Iterator[StopEvent]:
    """An event that SIGINT, SIGTERM or SIGHUP sets within the block; without effect outside of the main thread."""
    stop = StopEvent()

    def handle(number: int, frame: FrameType | None) -> None:
        stop.signal_number = stop.signal_number or number
        stop.set()

    with handle_signals(handle):
        yield stop
