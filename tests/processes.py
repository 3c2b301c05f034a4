"""Processes forked from a server that has imported the package: a start takes milliseconds instead of seconds."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from multiprocessing import connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, NamedTuple

import torch.multiprocessing

from spinlock_fast.distributed import TIMEOUT_VARIABLE

PRELOADED = (
    "pytest",
    "torch.distributed.device_mesh",
    "torch.fx.experimental.symbolic_shapes",
    "torch._subclasses.fake_tensor",
    "scipy.cluster.hierarchy",
    "spinlock_fast.commands.analysis",
    "spinlock_fast.commands.console",
    "spinlock_fast.commands.extract",
    "spinlock_fast.data",
    "spinlock_fast.dropin",
    "spinlock_fast.simulate.run",
    "spinlock_fast.tokenizer",
    "spinlock_fast.train",
    "spinlock_fast.training.evaluation",
    "spinlock_fast.training.run",
)


def forkserver() -> ForkServerContext:
    """The context of the one server of this test process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))  # takes effect before the first start
    return context


def run_code(code: str, arguments: Sequence[str], directory: Path, seconds: float = 120.0) -> str:
    """Runs Python code with `sys.argv[1:]` set, and returns its standard output.

    Args:
        directory: where the output of the process is stored.
        seconds: a process that takes longer is killed.

    Raises:
        AssertionError: the exit status is not 0; the message has the end of both outputs.
    """
    outputs = directory / "stdout", directory / "stderr"
    process = forkserver().Process(target=_run_code, args=(code, list(arguments), outputs))
    process.start()
    process.join(seconds)
    process.kill()
    process.join()
    stdout, stderr = (path.read_text(errors="replace") if path.exists() else "" for path in outputs)
    assert process.exitcode == 0, f"exit status {process.exitcode}: {stdout[-500:]}{stderr[-2000:]}"
    return stdout


def _run_code(code: str, arguments: list[str], outputs: tuple[Path, Path]) -> None:
    for descriptor, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.argv[1:] = arguments
    exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})
    sys.stdout.flush()


def run_ranks(worker: Callable[..., None], arguments: tuple[Any, ...], count: int) -> None:
    """Runs `worker(rank, *arguments)` in `count` processes; raises if one fails."""
    forkserver()
    torch.multiprocessing.start_processes(worker, arguments, nprocs=count, start_method="forkserver")


class Ranks:
    """Commands in several processes with the environment that torchrun sets.

    Args:
        calls: (verb, arguments) of each command; a rank runs them one after the other, and ends after one that fails.
        world: number of processes.
        directory: where the outputs of the processes are stored.
        environment: further environment variables.
    """

    def __init__(
        self, calls: Sequence[tuple[str, Sequence[object]]], world: int, directory: Path, **environment: str
    ) -> None:
        texts = [(verb, [str(argument) for argument in arguments]) for verb, arguments in calls]
        ports = _free_ports(len(calls))
        common = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1"}
        directory.mkdir(parents=True, exist_ok=True)
        self._outputs = [(directory / f"stdout{rank}", directory / f"stderr{rank}") for rank in range(world)]
        self.processes = []
        for rank in range(world):
            variables = {name: str(value) for name, value in {**common, "RANK": rank, "LOCAL_RANK": rank}.items()}
            arguments = (texts, ports, {TIMEOUT_VARIABLE: "60", **variables, **environment}, self._outputs[rank])
            self.processes.append(forkserver().Process(target=_run_rank, args=arguments))
            self.processes[-1].start()

    def signal(self, rank: int, number: int) -> None:
        """Sends a signal to a rank."""
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def join(self, seconds: float = 60.0, end_others: bool = False) -> list[int | None]:
        """The exit status of each rank; those that do not end in time are killed.

        Args:
            end_others: the ranks get SIGTERM if one has failed, as from torchrun.
        """
        deadline = time.monotonic() + seconds
        while (alive := [process for process in self.processes if process.is_alive()]) and time.monotonic() < deadline:
            connection.wait([process.sentinel for process in alive], deadline - time.monotonic())
            if end_others and any(process.exitcode for process in self.processes):
                for process in alive:
                    process.terminate()
        for process in self.processes:
            process.kill()
            process.join()
        return [process.exitcode for process in self.processes]

    def stdout(self, rank: int) -> str:
        return self._outputs[rank][0].read_text(errors="replace")

    def stderr(self, rank: int) -> str:
        return self._outputs[rank][1].read_text(errors="replace")


class Ended(NamedTuple):
    """Exit statuses of the ranks, and all that they wrote to standard output and standard error."""

    statuses: list[int | None]
    stdout: str
    stderr: str


def run_on_ranks(
    calls: Sequence[tuple[str, Sequence[object]]],
    world: int,
    directory: Path,
    meanwhile: Callable[[Ranks], None] = lambda ranks: None,
) -> Ended:
    """Runs commands by `Ranks` to their end; `meanwhile` is called once the ranks are started."""
    ranks = Ranks(calls, world, directory / "ranks")
    meanwhile(ranks)
    statuses = ranks.join(120.0, end_others=True)
    out, err = ("".join(read(rank) for rank in range(world)) for read in (ranks.stdout, ranks.stderr))
    shutil.rmtree(directory / "ranks")
    return Ended(statuses, out, err)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        return [free.getsockname()[1] for free in sockets]


def _run_rank(
    calls: list[tuple[str, list[str]]], ports: list[int], environment: dict[str, str], outputs: tuple[Path, Path]
) -> None:
    from spinlock_fast.commands.main import command_of

    for descriptor, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.environ.update(environment)
    torch.set_num_threads(1)
    for port, (verb, arguments) in zip(ports, calls, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        try:
            command_of(verb)(arguments)
        except SystemExit as ended:
            sys.stdout.flush()
            if ended.code:
                raise
