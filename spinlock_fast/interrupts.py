"""Signals that ask a command to end: SIGINT, SIGTERM, and SIGHUP, which closing a terminal sends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

Handler = Callable[[int, FrameType | None], Any]


def stopping_signals() -> list[int]:
    """SIGINT, SIGTERM, and SIGHUP unless it is ignored, as under nohup."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    return [int(number) for number in numbers]


@contextmanager
def handling(handler: Handler) -> Iterator[None]:
    """Within the block the handler gets these signals; no effect but in the main thread, which alone can set one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = {number: signal.signal(number, handler) for number in stopping_signals()}
    try:
        yield
    finally:
        for number, before in old.items():
            signal.signal(number, before)
