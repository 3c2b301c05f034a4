"""Performs the runs of an ablation in worker processes; features are encoded once per distinct preparation."""

from __future__ import annotations

import math
import multiprocessing
import shutil
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from spinlock_fast.ablation.plan import Run
from spinlock_fast.ablation.worker import Done, Failed, PrepareTask, Progress, RunTask, Task, Warned, serve
from spinlock_fast.errors import OutputError, SpinlockFastError, TrainingError
from spinlock_fast.output.locks import locked_output_directory

# Imported once for all workers; the last three are what training imports at its first use.
_PRELOADED = [
    "spinlock_fast.ablation.worker",
    "scipy.cluster.hierarchy",
    "torch._subclasses.fake_tensor",
    "torch.fx.experimental.symbolic_shapes",
]


class Named(Hashable, Protocol):
    """A run, which messages call by its name."""

    @property
    def name(self) -> str: ...


RunT = TypeVar("RunT", bound=Named)
_RunT = TypeVar("_RunT", bound=Named, contravariant=True)


class Display(Protocol[_RunT]):
    """Shows the progress of runs."""

    def preparing(self, runs: Sequence[_RunT]) -> None: ...

    def started(self, run: _RunT) -> None: ...

    def epoch(self, run: _RunT, epoch: int, epochs: int) -> None: ...

    def finished(self, run: _RunT, result: Any) -> None: ...

    def failed(self, run: _RunT, error: SpinlockFastError) -> None: ...

    def warning(self, text: str) -> None: ...


@dataclass
class Group(Generic[RunT]):
    """Runs that share what is prepared for them.

    Args:
        pending: the runs, in order.
        task: from a run and the result of `prepare`, the task of the run.
        prepare: the task to be performed before those of the runs; None if there is nothing to prepare.
        release: called when the last run has ended.
    """

    pending: list[RunT]
    task: Callable[[RunT, Any], Task]
    prepare: Task | None = None
    release: Callable[[], object] = lambda: None
    prepared: Any = field(default=None, init=False)
    ready: bool = field(default=False, init=False)
    preparing: bool = field(default=False, init=False)
    active: int = field(default=0, init=False)  # runs in progress


@dataclass
class _Worker(Generic[RunT]):
    process: BaseProcess
    connection: Connection
    group: Group[RunT] | None = field(default=None)
    run: RunT | None = None  # None while it prepares, or is idle


def perform(
    runs: Sequence[Run],
    devices: Sequence[str],
    threads: int,
    scratch: Path,
    keep_checkpoints: bool,
    display: Display[Run],
) -> dict[Run, SpinlockFastError]:
    """Trains every run of an ablation; a run that fails does not end the others.

    Args:
        runs: the runs. They are started in order, those with the same features together.
        devices: device of each worker process.
        threads: CPU threads of each worker.
        scratch: directory for features, locked and emptied; removed at the end.
        keep_checkpoints: whether runs write their checkpoint directory, or only metrics.json.
        display: shows progress.

    Returns:
        The runs that failed, with their errors.

    Raises:
        OutputError: a result cannot be written.
        TrainingError: a worker process was ended from outside.
    """
    alike: dict[str, list[Run]] = {}
    for run in runs:
        alike.setdefault(run.preparation, []).append(run)

    def group(name: str, pending: list[Run]) -> Group[Run]:
        matrix = scratch / f"{name}.npy"
        return Group(
            pending,
            lambda run, prepared: RunTask(run, matrix, prepared, keep_checkpoints),
            PrepareTask(pending[0].config, matrix),
            lambda: matrix.unlink(missing_ok=True),
        )

    if not runs:
        return {}
    with _scratch_directory(scratch):
        return perform_groups([group(*item) for item in alike.items()], devices, threads, display)


def perform_groups(
    groups: Sequence[Group[RunT]],
    devices: Sequence[str],
    threads: int,
    display: Display[RunT],
    deadline: float = math.inf,
) -> dict[RunT, SpinlockFastError]:
    """Performs the tasks of groups of runs in worker processes; see `perform`.

    Args:
        groups: started in order.
        devices: device of each worker process.
        threads: CPU threads of each worker.
        display: shows progress.
        deadline: `time.time()` after which no task is started.
    """
    with _workers(devices, threads) as workers:
        return _Scheduler(groups, display, deadline).perform([_Worker(*worker) for worker in workers])


class _Scheduler(Generic[RunT]):
    """Distributes the tasks: what is prepared first, then the runs that use it."""

    def __init__(self, groups: Sequence[Group[RunT]], display: Display[RunT], deadline: float) -> None:
        self._groups, self._display, self._deadline = groups, display, deadline
        self._failures: dict[RunT, SpinlockFastError] = {}

    def perform(self, workers: Sequence[_Worker[RunT]]) -> dict[RunT, SpinlockFastError]:
        while True:
            for worker in workers:
                if worker.group is None and time.time() < self._deadline:
                    self._assign(worker)
            busy = {worker.connection: worker for worker in workers if worker.group is not None}
            if not busy:
                return self._failures
            for connection in wait(list(busy)):
                worker = busy[connection]  # type: ignore[index]
                try:
                    message = worker.connection.recv()
                except EOFError:
                    raise _ended(worker) from None
                self._receive(worker, message)

    def _assign(self, worker: _Worker[RunT]) -> None:
        """Gives a worker the next task, if there is one."""
        for group in self._groups:
            if group.pending and (group.ready or group.prepare is None):
                run = group.pending.pop(0)
                group.active += 1
                self._display.started(run)
                worker.group, worker.run = group, run
                worker.connection.send(group.task(run, group.prepared))
                return
            if group.pending and not group.preparing:
                group.preparing = True
                self._display.preparing(group.pending)
                worker.group, worker.run = group, None
                worker.connection.send(group.prepare)
                return

    def _receive(self, worker: _Worker[RunT], message: object) -> None:
        group, run = worker.group, worker.run
        assert group is not None
        if isinstance(message, Warned):
            self._display.warning(message.text)
            return
        if isinstance(message, Progress):
            if run is not None:
                self._display.epoch(run, message.epoch, message.epochs)
            return
        worker.group = worker.run = None
        if isinstance(message, Failed):
            if isinstance(message.error, OutputError):
                raise message.error
            for failed in [run] if run is not None else group.pending:
                self._failures[failed] = message.error
                self._display.failed(failed, message.error)
            if run is None:
                group.pending.clear()
        elif isinstance(message, Done):
            if run is None:
                group.prepared, group.ready = message.value, True
            else:
                self._display.finished(run, message.value)
        group.active -= run is not None
        if not group.pending and not group.active:
            group.prepared = None
            group.release()


def _ended(worker: _Worker[RunT]) -> TrainingError:
    """The error of a worker that ended during a task."""
    worker.process.join(5.0)
    code = worker.process.exitcode
    how = f"by signal {-code}" if code is not None and code < 0 else f"with exit status {code}"
    what = "encoding features" if worker.run is None else worker.run.name
    return TrainingError(f"{what}: the worker process ended {how}; the same command goes on with the other runs")


@contextmanager
def _workers(devices: Sequence[str], threads: int) -> Iterator[Sequence[tuple[BaseProcess, Connection]]]:
    """Starts a worker process per device; ends them on exit."""
    # A server that has imported the package, but has not used CUDA, forks the workers.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    workers = []
    try:
        for device in devices:
            here, there = context.Pipe()
            process = context.Process(target=serve, args=(there, device, threads), daemon=True)
            process.start()
            there.close()
            workers.append((process, here))
        yield workers
    finally:
        for process, _ in workers:
            process.terminate()
        for process, connection in workers:
            process.join(5.0)
            process.kill()
            connection.close()


@contextmanager
def _scratch_directory(directory: Path) -> Iterator[None]:
    """A locked directory without the files of a killed ablation; removed on exit."""
    with locked_output_directory(directory):
        for path in directory.glob("*.npy"):
            path.unlink()
        try:
            yield
        finally:
            shutil.rmtree(directory, ignore_errors=True)
