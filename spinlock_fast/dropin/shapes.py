"""How inputs of different shapes become rows, and results of rows take the shape of the input."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spinlock_fast.kernels._common.guard import check_dense

Layout = str  # "sequence" [b, n, d], "token" [b, d], "channels_first" [b, d, n], "image" [b, d, h, w], "video"


@dataclass(frozen=True)
class InputShape:
    """The shape of one input."""

    layout: Layout
    space: tuple[int, ...]  # of images and videos

    @staticmethod
    def of(x: Tensor, dim: int, channel_last: bool, image: bool, video: bool) -> InputShape:
        """How to read x, which has `dim` channels.

        Raises:
            TypeError: x is no tensor.
            ValueError: x has other dimensions or channels than it should, or is not dense floating point.
        """
        check_dense("the input", x)
        if not x.is_floating_point():
            raise ValueError(f"the input must be of a floating-point type, got {x.dtype}")
        layout = "video" if video else "image" if image else "sequence" if channel_last else "channels_first"
        wanted = {"video": 5, "image": 4}.get(layout, 3)
        token = x.ndim == 2 and wanted == 3
        if x.ndim != wanted and not token:
            raise ValueError(f"the input must have {wanted} dimensions, got {list(x.shape)}")
        place = -1 if token or layout == "sequence" else 1
        if x.shape[place] != dim:
            where = "in its last dimension" if place == -1 else "in dimension 1"
            raise ValueError(f"the input must have {dim} channels {where}, got {list(x.shape)}")
        if token:
            return InputShape("token", ())
        return InputShape(layout, tuple(x.shape[2:]) if wanted > 3 else ())

    def rows(self, x: Tensor) -> Tensor:
        """[b, n, d]."""
        if self.layout == "token":
            return x[:, None]
        if self.layout == "sequence":
            return x
        return x.flatten(2).transpose(1, 2)

    def restore(self, rows: Tensor) -> Tensor:
        """[b, n, d] or [b, n, k, d] to the shape of the input, with k behind the positions."""
        if self.layout == "token":
            return rows[:, 0]
        if self.layout == "sequence":
            return rows
        return self.restore_positions(rows.movedim(-1, 1), 2)

    def restore_positions(self, values: Tensor, dim: int = 1) -> Tensor:
        """Values with positions n in dimension `dim`: codes [b, n, ...], losses."""
        if self.layout == "token":
            return values.squeeze(dim)
        return values.unflatten(dim, self.space) if self.space else values

    def flatten_positions(self, values: Tensor) -> Tensor:
        """The opposite of `restore_positions`: [b, n, ...]."""
        if self.layout == "token":
            return values[:, None]
        return values.flatten(1, len(self.space)) if self.space else values


def lengths_to_mask(lens: Tensor, n: int) -> Tensor:
    """[b, n] bool, True for the first lens[b] positions."""
    return torch.arange(n, device=lens.device) < lens[:, None]


def projected(projection: nn.Module, x: Tensor) -> Tensor:
    """x through a projection, in the type of its weights."""
    weight = next(projection.parameters(), None)
    output: Tensor = projection(x if weight is None else x.to(weight.dtype))
    return output


def widened(x: Tensor) -> Tensor:
    """x as it is compared with codes: float64 stays, the rest is float32."""
    return x if x.dtype == torch.float64 else x.float()


def beside(mask: Tensor, values: Tensor) -> Tensor:
    """mask [b, n] with as many dimensions as values [b, n, ...]."""
    return mask.view(*mask.shape, *([1] * (values.ndim - 2)))
