"""Processes that are forked from a server with the package imported: a start takes milliseconds, not seconds."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from typing import Any

import torch.multiprocessing

PRELOADED = (
    "pytest",
    "torch.distributed.device_mesh",
    "torch.fx.experimental.symbolic_shapes",
    "torch._subclasses.fake_tensor",
    "scipy.cluster.hierarchy",
    "spinlock_fast.commands.console",
    "spinlock_fast.dropin",
    "spinlock_fast.simulate.run",
    "spinlock_fast.tokenizer",
    "spinlock_fast.train",
    "spinlock_fast.training.run",
)


def forkserver() -> ForkServerContext:
    """The context of the one server of this test process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))  # takes effect before the first start
    return context


def run_ranks(worker: Callable[..., None], arguments: tuple[Any, ...], count: int) -> None:
    """Runs `worker(rank, *arguments)` in `count` processes; raises if one fails."""
    forkserver()
    torch.multiprocessing.start_processes(worker, arguments, nprocs=count, start_method="forkserver")
