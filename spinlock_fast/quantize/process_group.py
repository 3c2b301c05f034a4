"""Which processes of `torch.distributed` share the updates of a quantizer."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

_LOST = (
    "a process group cannot be pickled: this quantizer was saved with one of its own and loaded without it; set its"
    " process_group (None for all processes)"
)


class Processes:
    """A process group, or all processes. What it says is asked anew each time: `init_process_group` may come later.

    A copy by `copy.deepcopy` is of the same group. A group cannot be pickled: after unpickling, `size` raises where
    several processes run, until the group is set again.

    Args:
        group: None for all processes, whichever they are when they are asked for.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.lost = False

    def set(self, group: dist.ProcessGroup | None) -> None:
        """From now on the processes of `group`; None for all."""
        self.group, self.lost = group, False

    def __deepcopy__(self, memo: dict[int, object]) -> Processes:
        copy = Processes(self.group)
        copy.lost = self.lost
        return copy

    def __getstate__(self) -> dict[str, object]:
        return {"group": None, "lost": self.lost or self.group is not None}

    def size(self) -> int:
        """Number of processes: 1 without `torch.distributed`, or where this process is not in the group.

        Raises:
            RuntimeError: the group was lost in pickling, and there are several processes.
        """
        if not dist.is_available() or not dist.is_initialized():
            return 1
        if self.lost and dist.get_world_size() > 1:
            raise RuntimeError(_LOST)
        return max(1, dist.get_world_size(self.group))

    def rank(self) -> int:
        """The number of this process, from 0; to be asked where `size` is above 1."""
        return dist.get_rank(self.group)

    def sum_(self, tensor: Tensor) -> Tensor:
        """`tensor` becomes the sum of the tensors of all processes."""
        dist.all_reduce(tensor, group=self.group)
        return tensor

    def max_(self, tensor: Tensor) -> Tensor:
        """`tensor` becomes the greatest of the tensors of all processes, entry by entry."""
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)
        return tensor

    def sample(self, rows: Tensor, most: int) -> Tensor:
        """Random rows of all processes, the same in all of them.

        Each process gives distinct rows, in proportion to how many it has.

        Args:
            rows: [N, D] floating-point rows of this process; N may differ between processes, and be 0.
            most: how many are given at most; all of them where there are fewer.

        Returns:
            [min(sum of N, most), D].
        """
        size, rank = self.size(), self.rank()
        counts = torch.zeros(size, dtype=torch.int64, device=rows.device)
        counts[rank] = len(rows)
        before = [0, *self.sum_(counts).cumsum(0).tolist()]
        total = before[-1]
        first, last = (min(total, most) * before[r] // max(total, 1) for r in (rank, rank + 1))
        packed = rows.new_zeros(min(total, most), rows.shape[1])
        packed[first:last] = rows[torch.randperm(len(rows), device=rows.device)[: last - first]]
        return self.sum_(packed) if len(packed) else packed
