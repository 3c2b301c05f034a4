"""Collective operations of the processes that share the updates of a quantizer."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

_LOST = (
    "a process group cannot be pickled: this quantizer was saved with one of its own and loaded without it; set its"
    " process_group (None for all processes)"
)


class Processes:
    """A process group of `torch.distributed`, or all processes.

    Evaluated in each call, so `init_process_group` may be called later. `copy.deepcopy` keeps the group. A group cannot
    be pickled: after unpickling, `size` raises if there are several processes, until the group is set again.

    Args:
        group: None for all processes.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.lost = False

    def set(self, group: dist.ProcessGroup | None) -> None:
        """Replaces the group; None for all processes."""
        self.group, self.lost = group, False

    def __deepcopy__(self, memo: dict[int, object]) -> Processes:
        copy = Processes(self.group)
        copy.lost = self.lost
        return copy

    def __getstate__(self) -> dict[str, object]:
        return {"group": None, "lost": self.lost or self.group is not None}

    def size(self) -> int:
        """Number of processes; 1 without `torch.distributed`, or if this process is not in the group.

        Raises:
            RuntimeError: the group was lost in pickling, and there are several processes.
        """
        # torch.compile takes `is_initialized` for a constant, but guards on this attribute: a later group recompiles.
        if not dist.is_available() or dist.distributed_c10d._world.default_pg is None:
            return 1
        if self.lost and dist.get_world_size() > 1:
            raise RuntimeError(_LOST)
        return max(1, dist.get_world_size(self.group))

    def rank(self) -> int:
        """Rank of this process; requires `size() > 1`."""
        return dist.get_rank(self.group)

    def sum_(self, tensor: Tensor) -> Tensor:
        """All-reduces `tensor` in place by sum."""
        dist.all_reduce(tensor, group=self.group)
        return tensor

    def copy_first_(self, tensor: Tensor) -> Tensor:
        """Replaces finite `tensor` by that of the first process; an all-reduce, which torch.compile can trace."""
        if self.rank() != 0:
            tensor.zero_()
        return self.sum_(tensor)

    def sample(self, rows: Tensor, max_rows: int) -> Tensor:
        """A random sample of the rows of all processes, identical on each of them.

        Each process contributes distinct rows in proportion to its number of rows.

        Args:
            rows: [N, D] floating-point rows of this process; N may differ between processes, and be 0.
            max_rows: size of the sample, if there are as many rows.

        Returns:
            [min(sum of N, max_rows), D].
        """
        size, rank = self.size(), self.rank()
        counts = torch.zeros(size, dtype=torch.int64, device=rows.device)
        counts[rank] = len(rows)
        offsets = [0, *self.sum_(counts).cumsum(0).tolist()]
        total = offsets[-1]
        first, last = (min(total, max_rows) * offsets[r] // max(total, 1) for r in (rank, rank + 1))
        packed = rows.new_zeros(min(total, max_rows), rows.shape[1])
        packed[first:last] = rows[torch.randperm(len(rows), device=rows.device)[: last - first]]
        return self.sum_(packed) if len(packed) else packed
