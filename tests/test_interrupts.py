"""Signals are not lost where Python ignores exceptions, and are delayed where they must not raise."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import NoReturn

import pytest

from spinlock_fast.interrupts import deferred_interrupts, handle_signals


class SignalError(Exception):
    pass


def interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise SignalError(number)


class Finalizing:
    """Sends SIGTERM to its own process when it is finalized, where an exception is ignored."""

    def __init__(self, deferred: bool) -> None:
        self.deferred = deferred

    def __del__(self) -> None:
        if self.deferred:
            with deferred_interrupts(finalizing=True):
                os.kill(os.getpid(), signal.SIGTERM)
        else:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("deferred", [True, False])
def test_a_signal_in_a_finalizer_is_sent_again(deferred: bool) -> None:
    def finalize() -> None:
        Finalizing(deferred)
        time.sleep(10.0)

    with handle_signals(interrupt), pytest.raises(SignalError, match=str(int(signal.SIGTERM))):
        finalize()


def test_other_ignored_exceptions_reach_the_previous_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing:
        def __del__(self) -> None:
            raise ValueError("other")

    seen: list[object] = []
    monkeypatch.setattr("sys.unraisablehook", lambda ignored: seen.append(ignored.exc_type))
    with handle_signals(interrupt):
        Failing()
    assert seen == [ValueError]


def test_deferred_signals_are_handled_at_the_end_of_the_block() -> None:
    steps = []

    def send() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        steps.append("block")

    def send_deferred() -> None:
        with deferred_interrupts():
            send()

    with handle_signals(interrupt):
        with pytest.raises(SignalError):
            send_deferred()
        with pytest.raises(SignalError):  # the handler is restored
            send()
    assert steps == ["block"]


def test_a_thread_does_not_change_handlers() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def run() -> None:
        with deferred_interrupts():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before]
