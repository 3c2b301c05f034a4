"""Signals that stop a command: SIGINT, SIGTERM, and SIGHUP, which is sent when a terminal is closed."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_SEND_AGAIN_SECONDS = 0.01

Handler = Callable[[int, FrameType | None], Any]


def stopping_signals() -> list[int]:
    """SIGINT, SIGTERM, and SIGHUP unless it is ignored, as under nohup."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    return [int(number) for number in numbers]


@contextmanager
def handle_signals(handler: Handler) -> Iterator[None]:
    """Installs a handler for the stopping signals inside the block; does nothing outside the main thread.

    If the handler raises where Python ignores exceptions, as in a finalizer, the signal is sent again a little later.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    raised: list[tuple[BaseException, int]] = []

    def handle(number: int, frame: FrameType | None) -> None:
        try:
            handler(number, frame)
        except BaseException as error:
            raised[:] = [(error, number)]
            raise

    def handle_ignored(ignored: sys.UnraisableHookArgs) -> None:
        if raised and ignored.exc_value is raised[0][0]:
            send_again(raised[0][1])
        else:
            previous_hook(ignored)

    previous = {number: signal.signal(number, handle) for number in stopping_signals()}
    previous_hook, sys.unraisablehook = sys.unraisablehook, handle_ignored
    try:
        yield
    finally:
        sys.unraisablehook = previous_hook
        for number, old_handler in previous.items():
            signal.signal(number, old_handler)


@contextmanager
def deferred_interrupts(finalizing: bool = False) -> Iterator[None]:
    """Delays the handlers of the stopping signals until the end of the block; does nothing outside the main thread.

    Python ignores an exception that a handler raises inside a callback of a weak reference, and h5py has such a
    callback for each identifier that it closes. It also ignores one inside the finalizer of an object, such as a
    generator.

    Args:
        finalizing: whether a finalizer may run the block; the signals are then sent again a little later.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in stopping_signals()}
    received: dict[int, FrameType | None] = {}
    deferring = True

    def receive(number: int, frame: FrameType | None) -> None:
        if deferring:
            received[number] = frame
        else:  # the block has ended, but its handlers are not restored yet
            call(number, frame)

    def call(number: int, frame: FrameType | None) -> None:
        if callable(handler := handlers[number]):
            handler(number, frame)

    try:
        for number, handler in handlers.items():
            if callable(handler):
                signal.signal(number, receive)
        yield
    finally:
        deferring = False
        for number, handler in handlers.items():
            if callable(handler):
                signal.signal(number, handler)
        for number, frame in received.items():
            if finalizing:
                send_again(number)
            else:
                call(number, frame)


def send_again(number: int) -> None:
    """Sends a signal to the main thread, after it has left the functions that it executes now."""
    timer = threading.Timer(_SEND_AGAIN_SECONDS, signal.pthread_kill, (threading.main_thread().ident, number))
    timer.daemon = True
    timer.start()
