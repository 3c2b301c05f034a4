"""Training steps as CUDA graphs: captured once per kind of step, replayed with one launch."""

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

# Steps of a kind that run one by one before it is captured. They are steps of the training like all
# others: they make the optimizer's state, compile kernels, fill the caches of the libraries.
WARM_UP = 3
_ONE_KIND = StepKind(last=False, reset=False)  # what all repetitions of other work are

# Steps in one graph. More of them leave fewer gaps between launches, but an interruption waits for all.
STEPS_PER_LAUNCH = 4


class StepLauncher:
    """Runs training steps: one by one, or as CUDA graphs once they are warm.

    Where the step cannot be captured it goes on one by one and says why, once.

    Args:
        step: makes the next step; its tensors keep their places.
        device: of those tensors. On any but a CUDA device steps run one by one.
        graphs: False never captures.
        capture: how some steps of a kind become something to replay.
        name: of the steps, for what is said of them.
    """

    def __init__(
        self,
        step: Step,
        device: torch.device,
        graphs: bool = True,
        capture: Callable[[Step, StepKind, int], Replay] | None = None,
        name: str = "training steps",
    ) -> None:
        self.step = step
        self.steps_per_launch = STEPS_PER_LAUNCH
        self.capturing = graphs and (device.type == "cuda" or capture is not None)
        self._device = device
        self._name = name
        self._capture = capture or _CudaCapture(device)
        self._done: Counter[StepKind] = Counter()
        self._replays: dict[tuple[StepKind, int], Replay] = {}
        self._places: object = None
        self._others: list[StepLauncher] = []

    def run(self, kind: StepKind, most: int) -> int:
        """Runs one step or several of a kind, at most `most`; returns how many."""
        if not self.capturing:
            self.step(kind)
            return 1
        if self._done[kind] < WARM_UP:
            self._done[kind] += 1
            if self._done[kind] == WARM_UP and self._device.type == "cuda":
                self._step_watched(kind)
            else:
                self.step(kind)
            return 1
        count = self.steps_per_launch if most >= self.steps_per_launch else 1
        replay = self._replays.get((kind, count)) or self._captured(kind, count)
        if replay is None:
            return self.run(kind, most)
        replay()
        return count

    def beside(self, work: Callable[[], None], name: str) -> Callable[[], None]:
        """Other work that is repeated, always the same, to be called each time: replayed once it is warm.

        Its graph shares the memory of the others, so it runs before or after them, never at the same time.
        """
        on_cuda = self._device.type == "cuda"
        capture = self._capture if on_cuda else None
        launcher = StepLauncher(lambda _: work(), self._device, self.capturing, capture, name)

        def again() -> None:
            launcher.run(_ONE_KIND, 1)

        self._others.append(launcher)
        return again

    def follow(self, places: object) -> None:
        """Says where the tensors of the work lie now; where they have moved, its graphs are captured anew."""
        if places != self._places:
            self._replays.clear()
        self._places = places
        for other in self._others:
            other.follow(places)

    def _captured(self, kind: StepKind, count: int) -> Replay | None:
        try:
            replay = self._capture(self.step, kind, count)
        except RuntimeError as error:
            # Leaving the capture raises, too, and hides what went wrong inside.
            first = error.__context__ if isinstance(error.__context__, Exception) else error
            self._give_up(" ".join(str(first).split())[:200])
            return None
        self._replays[kind, count] = replay
        return replay

    def _step_watched(self, kind: StepKind) -> None:
        """A step, and whether it waits for the device: found here, nothing is broken; in a capture much is."""
        waits, others = [], []
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            before = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("warn")
            try:
                self.step(kind)
            finally:
                torch.cuda.set_sync_debug_mode(before)
        for warning in heard:
            text = str(warning.message)
            if "synchronizing CUDA operation" in text:
                waits.append(f"{Path(warning.filename).name}:{warning.lineno}")
            elif "ynchronization debug mode" not in text:
                others.append(warning)
        for warning in others:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        if waits:
            self._give_up(f"{waits[0]} waits for the device")

    def _give_up(self, reason: str) -> None:
        self.capturing = False
        self._replays.clear()
        log.warning("%s run one by one, not as CUDA graphs: %s", self._name, reason)


class _Graph:
    """A captured graph and the tables that it reads."""

    def __init__(self, graph: torch.cuda.CUDAGraph, tables: dict[int, Any]) -> None:
        self._graph, self._tables = graph, tables

    def replay(self) -> None:
        self._graph.replay()


class _CudaCapture:
    """Captures steps into graphs that share one pool of memory. No graph reads what another left there."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None

    def __call__(self, step: Step, kind: StepKind, count: int) -> Replay:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        try:
            # What other threads do meanwhile (write a checkpoint, read rows) must not break the capture.
            capture = torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local")
            with retained_tables() as tables, capture:
                for _ in range(count):
                    step(kind)
        except RuntimeError:
            # A broken capture leaves the generator's state as if it still went on; a copy of it does not.
            generator = torch.cuda.default_generators[self._device.index]
            generator.graphsafe_set_state(generator.clone_state())
            raise
        return _Graph(graph, tables).replay


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Puts what follows on a stream of its own: the default one cannot be captured, and a switch would cost waits."""
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
            torch.cuda.set_stream(caller)  # a broken capture may have left another one
            caller.wait_stream(stream)
