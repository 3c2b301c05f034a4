"""Codes that are parameters under FSDP2 (`torch.distributed.fsdp.fully_shard`).

In a forward pass, a module of FSDP2 holds gathered parameters: temporary copies, which are freed without being written
back. The optimizer changes the shards. Values that a quantizer writes to its codes (k-means, dead-code resets, moving
averages of codes that also have a gradient) must therefore be written to the shards too.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class ShardKey:
    """A unique name of a module, for an operator, which takes no objects. A copy has its own name.

    The module stores it as the attribute `shard_key`.
    """

    def __init__(self) -> None:
        self.name = f"module {next(_numbers)}"

    def __deepcopy__(self, memo: dict[int, object]) -> ShardKey:
        return ShardKey()

    def __reduce__(self) -> tuple[type[ShardKey], tuple[()]]:
        return ShardKey, ()


_numbers = itertools.count()


@torch.no_grad()
def store_written(module: nn.Module, name: str) -> None:
    """Copies values that were written to a gathered parameter during `forward` to its shards.

    Does nothing if `name` is a buffer or a parameter that is not sharded. All processes must have written equal values.
    """
    parameter = module._parameters.get(name)
    if parameter is not None and dist.is_available() and dist.is_initialized():
        key = module.shard_key
        assert isinstance(key, ShardKey)
        torch.ops.spinlock_fast.store_written(parameter.detach(), key.name)


torch.library.define("spinlock_fast::store_written", "(Tensor(a!) gathered, str key) -> ()")


@torch.library.impl("spinlock_fast::store_written", "default")
def _store_written(gathered: Tensor, key: str) -> None:
    for shard in _shards(key):
        local = shard.to_local()
        new = _local_part(gathered, shard)
        # A gathered parameter may have a lower precision: entries that were not written keep theirs.
        local.copy_(torch.where(new != local.to(new.dtype), new.to(local.dtype), local))


torch.library.register_fake("spinlock_fast::store_written", lambda *arguments: None)


def _shards(key: str) -> Iterator[Any]:
    """The sharded parameter (a DTensor) of the module with this key, if FSDP2 manages it and has gathered it."""
    if "torch.distributed.fsdp" not in sys.modules:
        return
    # torch has no public way from a gathered parameter to its shards.
    from torch.distributed._composable_state import _module_state_mapping
    from torch.distributed.fsdp._fully_shard._fsdp_param import ShardedState
    from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState

    states = {id(state): state for reference in _module_state_mapping.values() if (state := reference()) is not None}
    for state in states.values():
        if not isinstance(state, FSDPState):
            continue
        groups = getattr(state, "_fsdp_param_groups", None)  # torch 2.11 and 2.12 have one group, or None
        for group in [state._fsdp_param_group] if groups is None else groups:
            for parameter in () if group is None else group.fsdp_params:
                info: Any = parameter._module_info
                keys = [getattr(module, "shard_key", None) for module in (info.module, *info.shared_modules)]
                found = any(isinstance(one, ShardKey) and one.name == key for one in keys)
                if found and parameter.sharded_state == ShardedState.UNSHARDED:
                    yield parameter.sharded_param


def _local_part(values: Tensor, shard: Any) -> Tensor:
    """The part of the full `values` that this process stores of a DTensor."""
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = shard.device_mesh, shard.placements
    part: Tensor = distribute_tensor(values.detach(), mesh, placements, src_data_rank=None).to_local()
    return part.to(shard.to_local().device)


@torch.no_grad()
def assign_(target: Tensor, values: Tensor) -> None:
    """Copies full `values` to a tensor or to a DTensor, outside of `forward`; processes must have equal values."""
    if is_sharded(target):
        local = target.to_local()  # type: ignore[attr-defined]
        local.copy_(_local_part(values, target))
    else:
        target.copy_(values)


def gathered(value: Tensor) -> Tensor:
    """The full tensor of a DTensor, gathered from all processes; another tensor as it is."""
    full: Tensor = value.full_tensor() if is_sharded(value) else value  # type: ignore[attr-defined]
    return full


def is_sharded(value: Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    tensors = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and isinstance(value, tensors.DTensor)
