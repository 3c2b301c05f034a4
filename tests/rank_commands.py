"""Commands run by several ranks, in forked processes with the environment of torchrun."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import wait
from pathlib import Path

import torch
from processes import forkserver

from spinlock_fast.distributed import TIMEOUT_VARIABLE


@dataclass(frozen=True)
class Ended:
    """Exit statuses of the ranks, and all that they wrote to standard output and standard error."""

    statuses: list[int | None]
    stdout: str
    stderr: str


def run_on_ranks(
    verbs: Sequence[tuple[str, Sequence[object]]],
    count: int,
    directory: Path,
    meanwhile: Callable[[list[int]], None] = lambda pids: None,
) -> Ended:
    """Runs commands, one after the other, with `count` ranks each; stops after one that fails.

    Args:
        verbs: (module of the package, arguments) of each command.
        directory: where the outputs are kept.
        meanwhile: called with the process IDs of the ranks once they are started.
    """
    calls = [(verb, [str(argument) for argument in arguments]) for verb, arguments in verbs]
    ports = _free_ports(len(calls))
    started = []
    for rank in range(count):
        paths = [directory / f"rank{rank}.{stream}" for stream in ("out", "err")]
        process = forkserver().Process(target=_run, args=(rank, count, ports, calls, paths))
        process.start()
        started.append((process, paths))
    meanwhile([process.pid or 0 for process, _ in started])
    deadline = time.monotonic() + 120.0
    while waiting := [process for process, _ in started if process.is_alive()]:
        wait([process.sentinel for process in waiting], deadline - time.monotonic())
        if time.monotonic() > deadline or any(process.exitcode for process, _ in started):
            for process in waiting:
                process.terminate()  # as torchrun does
    out, err = ("".join(paths[i].read_text() for _, paths in started) for i in (0, 1))
    return Ended([process.exitcode for process, _ in started], out, err)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        return [free.getsockname()[1] for free in sockets]


def _run(rank: int, count: int, ports: list[int], calls: list[tuple[str, list[str]]], paths: list[Path]) -> None:
    for descriptor, path in enumerate(paths, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", TIMEOUT_VARIABLE: "60"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    for port, (verb, arguments) in zip(ports, calls, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        try:
            import_module(f"spinlock_fast.{verb}").main(arguments)
        except SystemExit as ended:
            sys.stdout.flush()
            if ended.code:
                os._exit(int(ended.code))
