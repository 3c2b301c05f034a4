"""Processes of a run started by torchrun: ranks, shares of the rows, and collective operations.

`torch.distributed` does the communication; torch is imported only if there are several processes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

from spinlock_fast.errors import (
    ConfigError,
    DataError,
    DistributedError,
    OutputError,
    SpinlockFastError,
    TrainingError,
)
from spinlock_fast.messages import one_line, shown

if TYPE_CHECKING:
    from torch import Tensor

Result = TypeVar("Result")

TIMEOUT_VARIABLE = "SPINLOCK_FAST_DISTRIBUTED_TIMEOUT"
_DEFAULT_TIMEOUT = 1800.0  # seconds that a collective operation waits for the slowest rank


@dataclass(frozen=True)
class Ranks:
    """The processes of a distributed run, as one of them sees them.

    All ranks must call the collective operations in the same order. With one process they return at once. Operations
    raise DistributedError if another rank is lost or does not answer in time.

    Args:
        rank: number of this process, from 0.
        size: number of processes.
        local_rank: number of this process on its host.
        local_size: number of processes on this host.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """This rank's part of `count` consecutive items; the parts of all ranks cover them once, in order."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sums a tensor over the ranks, in place; every rank receives the same bits."""
        return self._reduce(tensor, "SUM")

    def max_(self, tensor: Tensor) -> Tensor:
        """Elementwise maximum over the ranks, in place."""
        return self._reduce(tensor, "MAX")

    def min_(self, tensor: Tensor) -> Tensor:
        """Elementwise minimum over the ranks, in place."""
        return self._reduce(tensor, "MIN")

    def broadcast_(self, tensor: Tensor, source: int = 0) -> Tensor:
        """Copies a tensor from rank `source` into the tensors of the others, which have the same shape and dtype."""
        if self.size > 1:
            import torch.distributed as dist

            with self._errors():
                dist.broadcast(tensor, source)
        return tensor

    def gather_into(self, output: Tensor, tensor: Tensor) -> Tensor:
        """Writes the tensors [n, ...] of the ranks, which have the same shape, to `output` [size * n, ...]."""
        if self.size == 1:
            return output.copy_(tensor)
        import torch.distributed as dist

        # torch 2.13 renamed the function and deprecated the old name.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        with self._errors():
            gather(output, tensor)
        return output

    def broadcast_object(self, value: Any, source: int = 0) -> Any:
        """The value that rank `source` passes; it is pickled, and only the processes of this run read it."""
        if self.size == 1:
            return value
        import torch.distributed as dist

        values = [value if self.rank == source else None]
        with self._errors():
            dist.broadcast_object_list(values, source)
        return values[0]

    def gather_objects(self, value: Any) -> list[Any]:
        """The values that the ranks pass, in their order, on every rank; they are pickled."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        with self._errors():
            dist.all_gather_object(values, value)
        return values

    def on_main(self, work: Callable[[], Result]) -> Result:
        """The result of `work`, which rank 0 runs while the others wait; it is pickled.

        An error of the package that `work` raises is raised on every rank.
        """
        if self.size == 1:
            return work()
        result, error = None, None
        if self.is_main:
            try:
                result = work()
            except SpinlockFastError as raised:
                error = raised
        outcome = (result, None if error is None else (type(error).__mro__, error.lines, error.exit_status))
        result, failure = self.broadcast_object(outcome)
        if error is not None:
            raise error
        if failure is not None:
            raise _error_of_main(*failure)
        return cast("Result", result)

    def gather_on_main(self, value: Any) -> list[Any]:
        """The values that the ranks pass, in their order, on rank 0; an empty list on the others. They are pickled."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] | None = [None] * self.size if self.is_main else None
        with self._errors():
            dist.gather_object(value, values)
        return values or []

    def barrier(self) -> None:
        """Waits until every rank has reached this point."""
        if self.size > 1:
            import torch
            import torch.distributed as dist

            with self._errors():
                dist.all_reduce(torch.zeros(1))  # on the CPU group; `dist.barrier` would choose a device

    def _reduce(self, tensor: Tensor, operation: str) -> Tensor:
        if self.size > 1:
            import torch.distributed as dist

            with self._errors():
                dist.all_reduce(tensor, getattr(dist.ReduceOp, operation))
        return tensor

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # Gloo's errors and torch.distributed.DistBackendError
            raise self._lost(error) from error

    def _lost(self, error: RuntimeError) -> DistributedError:
        reason = one_line(str(error).split(". ")[0], 120)
        return DistributedError(
            f"rank {self.rank} of {self.size} lost contact with another rank, which ended or did not answer within "
            f"{timeout_seconds():g} s ({TIMEOUT_VARIABLE}); torchrun reports the rank that failed first ({reason})"
        )


def _error_of_main(types: Sequence[type], lines: list[str], status: int) -> SpinlockFastError:
    """The error of rank 0, as the first of its types that can be constructed from lines."""
    plain = (ConfigError, DataError, OutputError, DistributedError, TrainingError)
    error = next((kind for kind in types if kind in plain), SpinlockFastError)(*lines)
    error.exit_status, error.repeats_rank_0 = status, True
    return error


SINGLE = Ranks()


def launched_ranks() -> Ranks:
    """The ranks in the environment that torchrun sets; one process without it.

    Raises:
        ConfigError: a variable is missing or impossible.
    """
    size = _environment_number("WORLD_SIZE", 1)
    if size == 1:
        return SINGLE
    ranks = Ranks(
        _environment_number("RANK"),
        size,
        _environment_number("LOCAL_RANK"),
        _environment_number("LOCAL_WORLD_SIZE", size),
    )
    if size < 1 or not 0 <= ranks.rank < size or not 0 <= ranks.local_rank < ranks.local_size:
        raise ConfigError(
            f"RANK {ranks.rank} of WORLD_SIZE {size}, LOCAL_RANK {ranks.local_rank} of LOCAL_WORLD_SIZE "
            f"{ranks.local_size}: not a set of processes; start the command with torchrun"
        )
    return ranks


def _environment_number(name: str, default: int | None = None) -> int:
    text = os.environ.get(name, "").strip()
    if not text and default is not None:
        return default
    try:
        return int(text)
    except ValueError:
        given = f"is {shown(text)}" if text else "is not set"
        raise ConfigError(
            f"{name} {given}, but WORLD_SIZE says that there are several processes: start the command with torchrun"
        ) from None


def timeout_seconds() -> float:
    """How long collective operations wait; raises ConfigError if the variable is not a positive number."""
    text = os.environ.get(TIMEOUT_VARIABLE, "").strip()
    try:
        seconds = float(text) if text else _DEFAULT_TIMEOUT
    except ValueError:
        _refuse_timeout(text)
    if not 0.0 < seconds < 1e7:
        _refuse_timeout(text)
    return seconds


def _refuse_timeout(text: str) -> NoReturn:
    raise ConfigError(f"{TIMEOUT_VARIABLE} is {shown(text)}: it must be a number of seconds above 0")


def current_ranks() -> Ranks:
    """The ranks of the default process group of `torch.distributed`; one process if there is none."""
    import sys

    if "torch" not in sys.modules:
        return SINGLE
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return SINGLE
    rank, size = dist.get_rank(), dist.get_world_size()
    local_rank, local_size = (os.environ.get(name, "") for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    if local_rank.isdecimal() and local_size.isdecimal():
        return Ranks(rank, size, int(local_rank), int(local_size))
    return Ranks(rank, size, rank, size)


@contextmanager
def process_group() -> Iterator[Ranks]:
    """The ranks that torchrun started, with a process group inside the block.

    Gloo connects CPU tensors, NCCL those on CUDA devices; each rank uses the device with its local rank.

    Raises:
        ConfigError: the environment is not that of torchrun.
        DistributedError: the other ranks cannot be reached.
    """
    ranks = launched_ranks()
    if ranks.size == 1:
        yield SINGLE
        return
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    cuda = torch.cuda.is_available() and dist.is_nccl_available()
    if cuda:
        torch.cuda.set_device(ranks.local_rank % torch.cuda.device_count())
    try:
        timeout = timedelta(seconds=timeout_seconds())
        store, rank, size = next(rendezvous("env://", timeout=timeout))
        if ranks.local_size == ranks.size:
            # After a restart, torchrun's store still has the addresses of the ranks that have ended.
            store = PrefixStore(f"restart_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        raise DistributedError(
            f"rank {ranks.rank} of {ranks.size} cannot reach the others: {one_line(str(error), 200)}"
        ) from error
    try:
        yield ranks
    finally:
        dist.destroy_process_group()
