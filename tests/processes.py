"""Processes forked from a server that has imported the package: a start takes milliseconds instead of seconds."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch.multiprocessing

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
    """A command in several processes with the environment that torchrun sets; nobody ends them if one fails.

    Args:
        verb: command.
        arguments: of the command.
        world: number of processes.
        directory: where the outputs of the processes are stored.
        environment: further environment variables.
    """

    def __init__(self, verb: str, arguments: Sequence[object], world: int, directory: Path, **environment: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        directory.mkdir(parents=True, exist_ok=True)
        self._outputs = [(directory / f"stdout{rank}", directory / f"stderr{rank}") for rank in range(world)]
        self.processes = []
        for rank in range(world):
            variables = {name: str(value) for name, value in {**common, "RANK": rank, "LOCAL_RANK": rank}.items()}
            arguments_of_rank = (verb, [str(a) for a in arguments], {**variables, **environment}, self._outputs[rank])
            self.processes.append(forkserver().Process(target=_run_rank, args=arguments_of_rank))
            self.processes[-1].start()

    def signal(self, rank: int, number: int) -> None:
        """Sends a signal to a rank."""
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def join(self, seconds: float = 60.0) -> list[int | None]:
        """The exit status of each rank; those that do not end in time are killed."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        for process in self.processes:
            process.kill()
            process.join()
        return [process.exitcode for process in self.processes]

    def stdout(self, rank: int) -> str:
        return self._outputs[rank][0].read_text(errors="replace")

    def stderr(self, rank: int) -> str:
        return self._outputs[rank][1].read_text(errors="replace")


def _run_rank(verb: str, arguments: list[str], environment: dict[str, str], outputs: tuple[Path, Path]) -> None:
    from spinlock_fast.commands.main import command_of

    for descriptor, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.environ.update(environment)
    torch.set_num_threads(1)
    command_of(verb)(arguments)
