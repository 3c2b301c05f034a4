"""Training steps as CUDA graphs: captured once per kind of step, then replayed with one launch."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from spinlock_fast.kernels._common.streams import MAIN_PRIORITY
from spinlock_fast.kernels._common.table_cache import retained_tables
from spinlock_fast.training.step import StepKind

log = logging.getLogger(__name__)

Step = Callable[[StepKind], None]
Replay = Callable[[], None]

# Eager steps of a kind before it is captured. They are ordinary training steps: they create the optimizer's state,
# compile kernels and fill the caches of libraries.
WARM_UP_STEPS = 3

# Steps per graph. More steps leave fewer gaps between launches, but an interruption waits for all of them.
STEPS_PER_LAUNCH = 4

_OTHER_RANK = "another rank cannot capture them"

_WORK_KIND = StepKind(partial_batch=False, reset=False)  # of work passed to `StepLauncher.captured`


class StepLauncher:
    """Runs training steps eagerly, or as CUDA graphs after a warm-up.

    If a step cannot be captured, all steps run eagerly, and one warning gives the reason.

    Args:
        step: runs the next step; its tensors keep their addresses.
        device: of those tensors; only CUDA devices capture.
        graphs: False disables capture.
        capture: makes a replay of a number of steps of a kind; CUDA capture if not given.
        name: of the steps, for the warning.
        agree: whether all ranks of a distributed run can capture, given whether this one can. Steps that contain
            collective operations run alike on all ranks.
    """

    def __init__(
        self,
        step: Step,
        device: torch.device,
        graphs: bool = True,
        capture: Callable[[Step, StepKind, int], Replay] | None = None,
        name: str = "training steps",
        agree: Callable[[bool], bool] = bool,
    ) -> None:
        self.step = step
        self.steps_per_launch = STEPS_PER_LAUNCH
        self.capturing = graphs and (device.type == "cuda" or capture is not None)
        self._device = device
        self._name = name
        self._agree = agree
        self._capture = capture or _CudaCapture(device)
        self._eager_steps: Counter[StepKind] = Counter()
        self._replays: dict[tuple[StepKind, int], Replay] = {}
        self._layout: object = None
        self._work_launchers: list[StepLauncher] = []

    def run(self, kind: StepKind, max_steps: int) -> int:
        """Launches between one and `max_steps` steps of a kind; returns how many."""
        if not self.capturing:
            self.step(kind)
            return 1
        if self._eager_steps[kind] < WARM_UP_STEPS:
            self._eager_steps[kind] += 1
            if self._eager_steps[kind] == WARM_UP_STEPS and self._device.type == "cuda":
                self._step_with_sync_debugging(kind)
            else:
                self.step(kind)
            return 1
        count = self.steps_per_launch if max_steps >= self.steps_per_launch else 1
        replay = self._replays.get((kind, count)) or self._captured_steps(kind, count)
        if replay is None:
            return self.run(kind, max_steps)
        replay()
        return count

    def captured(self, work: Callable[[], None], name: str) -> Callable[[], None]:
        """A function that runs `work`, as a CUDA graph after the warm-up.

        The graph shares the memory pool of the steps, so it must not run concurrently with them.

        Args:
            work: launches the same kernels at every call.
            name: of the work, for the warning.
        """
        capture = self._capture if self._device.type == "cuda" else None
        launcher = StepLauncher(lambda _: work(), self._device, self.capturing, capture, name, self._agree)

        def run() -> None:
            launcher.run(_WORK_KIND, 1)

        self._work_launchers.append(launcher)
        return run

    def check_layout(self, layout: object) -> None:
        """Discards the graphs if the addresses or strides of the tensors have changed; they are captured again."""
        if layout != self._layout:
            self._replays.clear()
        self._layout = layout
        for launcher in self._work_launchers:
            launcher.check_layout(layout)

    def _captured_steps(self, kind: StepKind, count: int) -> Replay | None:
        replay, reason = None, _OTHER_RANK
        try:
            replay = self._capture(self.step, kind, count)
        except RuntimeError as error:
            # Ending an invalidated capture raises as well and hides the cause.
            cause = error.__context__ if isinstance(error.__context__, Exception) else error
            reason = " ".join(str(cause).split())[:200]
        if not self._agree(replay is not None):
            self._disable_capture(reason)
        if replay is None or not self.capturing:
            return None
        self._replays[kind, count] = replay
        return replay

    def _step_with_sync_debugging(self, kind: StepKind) -> None:
        """Runs one step with sync debugging; a host synchronisation disables capture, which it would invalidate."""
        synchronizations, other_warnings = [], []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            before = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("warn")
            try:
                self.step(kind)
            finally:
                torch.cuda.set_sync_debug_mode(before)
        for warning in caught:
            text = str(warning.message)
            if "synchronizing CUDA operation" in text:
                synchronizations.append(f"{Path(warning.filename).name}:{warning.lineno}")
            elif "ynchronization debug mode" not in text:
                other_warnings.append(warning)
        for warning in other_warnings:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        if not self._agree(not synchronizations):
            reason = f"{synchronizations[0]} synchronises with the device" if synchronizations else _OTHER_RANK
            self._disable_capture(reason)

    def _disable_capture(self, reason: str) -> None:
        self.capturing = False
        self._replays.clear()
        log.warning("%s run one by one, not as CUDA graphs: %s", self._name, reason)


class _CapturedGraph:
    """A captured graph, and references to the cached tables that it reads."""

    def __init__(self, graph: torch.cuda.CUDAGraph, tables: dict[int, Any]) -> None:
        self._graph, self._tables = graph, tables

    def replay(self) -> None:
        self._graph.replay()


class _CudaCapture:
    """Captures steps into graphs that share one memory pool; no graph reads memory that another graph wrote there."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None

    def __call__(self, step: Step, kind: StepKind, count: int) -> Replay:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        try:
            # thread_local: CUDA calls of other threads (checkpoints, row readers) must not invalidate the capture.
            capture = torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local")
            with retained_tables() as tables, capture:
                for _ in range(count):
                    step(kind)
        except RuntimeError:
            # An invalidated capture leaves the generator's state marked as capturing; a copy of the state is not.
            generator = torch.cuda.default_generators[self._device.index]
            generator.graphsafe_set_state(generator.clone_state())
            raise
        return _CapturedGraph(graph, tables).replay


@contextmanager
def dedicated_stream(device: torch.device) -> Iterator[None]:
    """Makes a new CUDA stream current; the default stream cannot be captured. Does nothing on other devices."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        caller = torch.cuda.current_stream(device)
        stream = torch.cuda.Stream(device, priority=MAIN_PRIORITY)
        stream.wait_stream(caller)
        try:
            with torch.cuda.stream(stream):
                yield
        finally:
            torch.cuda.set_stream(caller)  # an invalidated capture may leave another stream current
            caller.wait_stream(stream)
