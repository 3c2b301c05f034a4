"""Processes forked from a server that has imported the package: a start takes milliseconds instead of seconds."""

from __future__ import annotations

import multiprocessing
import os
import sys
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
