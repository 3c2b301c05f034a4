"""Performs the runs of an ablation in worker processes; features are encoded once per distinct preparation."""

from __future__ import annotations

import multiprocessing
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Protocol

from spinlock_fast.ablation.plan import Run
from spinlock_fast.ablation.records import Record
from spinlock_fast.ablation.worker import Done, Failed, PrepareTask, Progress, RunTask, Warned, serve
from spinlock_fast.errors import OutputError, SpinlockFastError, TrainingError
from spinlock_fast.output.locks import locked_output_directory

# Imported once for all workers; the last three are what training imports at its first use.
_PRELOADED = [
    "spinlock_fast.ablation.worker",
    "scipy.cluster.hierarchy",
    "torch._subclasses.fake_tensor",
    "torch.fx.experimental.symbolic_shapes",
]


class Display(Protocol):
    """Shows the progress of an ablation."""

    def preparing(self, runs: Sequence[Run]) -> None: ...

    def started(self, run: Run) -> None: ...

    def epoch(self, run: Run, epoch: int, epochs: int) -> None: ...

    def finished(self, run: Run, record: Record) -> None: ...

    def failed(self, run: Run, error: SpinlockFastError) -> None: ...

    def warning(self, text: str) -> None: ...


@dataclass
class _Group:
    """Runs that share their features."""

    pending: list[Run]
    matrix: Path
    prepared: bytes | None = None
    preparing: bool = False
    active: int = 0  # runs in progress


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    group: _Group | None = field(default=None)
    run: Run | None = None  # None while it prepares, or is idle


def perform(
    runs: Sequence[Run], devices: Sequence[str], threads: int, scratch: Path, keep_checkpoints: bool, display: Display
) -> dict[Run, SpinlockFastError]:
    """Trains every run; a run that fails does not end the others.

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
    if not runs:
        return {}
    with _scratch_directory(scratch), _workers(devices, threads) as workers:
        return _Scheduler(runs, scratch, keep_checkpoints, display).perform(workers)


class _Scheduler:
    """Distributes the tasks: features first, then the runs that use them."""

    def __init__(self, runs: Sequence[Run], scratch: Path, keep_checkpoints: bool, display: Display) -> None:
        self._groups: dict[str, _Group] = {}
        for run in runs:
            group = self._groups.setdefault(run.preparation, _Group([], scratch / f"{run.preparation}.npy"))
            group.pending.append(run)
        self._keep, self._display = keep_checkpoints, display
        self._failures: dict[Run, SpinlockFastError] = {}

    def perform(self, workers: Sequence[_Worker]) -> dict[Run, SpinlockFastError]:
        while True:
            for worker in workers:
                if worker.group is None:
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

    def _assign(self, worker: _Worker) -> None:
        """Gives a worker the next task, if there is one."""
        for group in self._groups.values():
            if group.pending and group.prepared is not None:
                run = group.pending.pop(0)
                group.active += 1
                self._display.started(run)
                worker.group, worker.run = group, run
                worker.connection.send(RunTask(run, group.matrix, group.prepared, self._keep))
                return
            if group.pending and not group.preparing:
                group.preparing = True
                self._display.preparing(group.pending)
                worker.group, worker.run = group, None
                worker.connection.send(PrepareTask(group.pending[0].config, group.matrix))
                return

    def _receive(self, worker: _Worker, message: object) -> None:
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
                group.prepared = message.value
            else:
                self._display.finished(run, message.value)
        group.active -= run is not None
        if not group.pending and not group.active:
            group.prepared = None
            group.matrix.unlink(missing_ok=True)


def _ended(worker: _Worker) -> TrainingError:
    """The error of a worker that ended during a task."""
    worker.process.join(5.0)
    code = worker.process.exitcode
    how = f"by signal {-code}" if code is not None and code < 0 else f"with exit status {code}"
    what = "encoding features" if worker.run is None else worker.run.name
    return TrainingError(f"{what}: the worker process ended {how}; the same command goes on with the other runs")


@contextmanager
def _workers(devices: Sequence[str], threads: int) -> Iterator[list[_Worker]]:
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
            workers.append(_Worker(process, here))
        yield workers
    finally:
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            worker.process.join(5.0)
            worker.process.kill()
            worker.connection.close()


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
