"""Two processes that train autoencoders and compare them with one process that gets all rows."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from autoencoder import ROWS, assert_same, batch, make, optimizer_of, state_of, train
from processes import run_ranks
from torch import Tensor, nn

WORLD = 2
Wrap = Callable[[nn.Module], nn.Module]


def run_checks(
    checks: Sequence[Callable[[int], None]], directory: Any, before: Callable[[int, str], None] | None = None
) -> None:
    """Runs checks, functions of a module, one after another in two processes.

    Args:
        checks: called with the rank.
        directory: where files are written.
        before: called first, without a process group, with the rank and a file for `init_process_group`.
    """
    run_ranks(_worker, (str(directory), checks, before), WORLD)


def _worker(
    rank: int, directory: str, checks: Sequence[Callable[[int], None]], before: Callable[[int, str], None] | None
) -> None:
    torch.set_num_threads(1)
    # FSDP2 warns that changing outputs in place would have no effect; nothing here does.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    if before is not None:
        before(rank, f"{directory}/first")
    file = f"{directory}/second"
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=WORLD)
    _alone.extend(dist.new_group([other]) for other in range(WORLD))
    for check in checks:
        check(rank)
    dist.barrier()
    dist.destroy_process_group()


_alone: list[dist.ProcessGroup | None] = []


def group_of_one() -> dist.ProcessGroup | None:
    """A group of this process only: a quantizer with it does not synchronise."""
    return _alone[dist.get_rank()]


def alone(kind: str, batches: Sequence[Tensor], **more: Any) -> dict[str, Tensor]:
    """The state after training in this process only."""
    module = make(kind, **more)
    module.quantizer.process_group = group_of_one()
    torch.manual_seed(0)
    train(module, batches)
    return state_of(module)


def share(step: int, rank: int) -> Tensor:
    return batch(step).chunk(WORLD)[rank]


def uneven_share(step: int, rank: int) -> Tensor:
    """The second process gets a quarter of the rows, and none in every third step."""
    first = ROWS if step % 3 == 0 else ROWS * 3 // 4
    return batch(step)[:first] if rank == 0 else batch(step)[first:]


def trained(kind: str, wrap: Wrap, rank: int, shares: Sequence[Tensor], **more: Any) -> nn.Module:
    """The autoencoder after training on the shares of this process; asserts equal states in all processes."""
    module = make(kind, **more)
    wrapped = wrap(module)
    torch.manual_seed(rank)
    train(wrapped, shares, optimizer_of(module))
    assert_equal_ranks(module, kind)
    return module


def assert_equal_ranks(module: nn.Module, where: str) -> dict[str, Tensor]:
    """Asserts that the state is finite and equal in all processes, and returns it."""
    state = state_of(module)
    everywhere: list[Any] = [None] * WORLD
    dist.all_gather_object(everywhere, state)
    for name, value in state.items():
        assert not value.is_floating_point() or value.isfinite().all(), f"{where}: {name}"
        assert torch.equal(everywhere[0][name], everywhere[1][name]), f"{where}: {name} differs between processes"
    return state


def compare(kind: str, wrap: Wrap, rank: int, steps: int = 20, **more: Any) -> None:
    """Two processes with half of each batch end with the state of one process with whole batches."""
    state = state_of(trained(kind, wrap, rank, [share(step, rank) for step in range(steps)], **more))
    if rank == 0:
        assert_same(state, alone(kind, [batch(step) for step in range(steps)], **more), kind)
