"""Converts inputs (sequences, tokens, images, videos) to rows [b, n, d], and results back to the input's layout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spinlock_fast.kernels._common.guard import check_dense

Layout = str  # "sequence" [b, n, d], "token" [b, d], "channels_first" [b, d, n], "image" [b, d, h, w], "video"


@dataclass(frozen=True)
class InputLayout:
    """Layout of one input tensor."""

    layout: Layout
    spatial_shape: tuple[int, ...]  # of images and videos, else ()

    @staticmethod
    def of(x: Tensor, dim: int, channel_last: bool, image: bool, video: bool) -> InputLayout:
        """The layout of `x`, which must have `dim` channels.

        Raises:
            TypeError: x is not a tensor.
            ValueError: x has the wrong number of dimensions or channels, or is not dense floating point.
        """
        check_dense("the input", x)
        if not x.is_floating_point():
            raise ValueError(f"the input must be of a floating-point type, got {x.dtype}")
        layout = "video" if video else "image" if image else "sequence" if channel_last else "channels_first"
        ndim = {"video": 5, "image": 4}.get(layout, 3)
        is_token = x.ndim == 2 and ndim == 3
        if x.ndim != ndim and not is_token:
            raise ValueError(f"the input must have {ndim} dimensions, got {list(x.shape)}")
        channel_dim = -1 if is_token or layout == "sequence" else 1
        if x.shape[channel_dim] != dim:
            where = "in its last dimension" if channel_dim == -1 else "in dimension 1"
            raise ValueError(f"the input must have {dim} channels {where}, got {list(x.shape)}")
        if is_token:
            return InputLayout("token", ())
        return InputLayout(layout, tuple(x.shape[2:]) if ndim > 3 else ())

    def to_rows(self, x: Tensor) -> Tensor:
        """The input as rows [b, n, d]."""
        if self.layout == "token":
            return x[:, None]
        if self.layout == "sequence":
            return x
        return x.flatten(2).transpose(1, 2)

    def from_rows(self, rows: Tensor) -> Tensor:
        """Rows [b, n, d] or [b, n, k, d] in the layout of the input; k follows the positions."""
        if self.layout == "token":
            return rows[:, 0]
        if self.layout == "sequence":
            return rows
        return self.unflatten_positions(rows.movedim(-1, 1), 2)

    def unflatten_positions(self, values: Tensor, dim: int = 1) -> Tensor:
        """Restores the input's spatial dimensions from the flattened positions n in dimension `dim`."""
        if self.layout == "token":
            return values.squeeze(dim)
        return values.unflatten(dim, self.spatial_shape) if self.spatial_shape else values

    def flatten_positions(self, values: Tensor) -> Tensor:
        """Inverse of `unflatten_positions` with dim=1: [b, n, ...]."""
        if self.layout == "token":
            return values[:, None]
        return values.flatten(1, len(self.spatial_shape)) if self.spatial_shape else values


def lengths_to_mask(lens: Tensor, n: int) -> Tensor:
    """[b, n] bool, True for the first lens[b] positions."""
    return torch.arange(n, device=lens.device) < lens[:, None]


def apply_projection(projection: nn.Module, x: Tensor) -> Tensor:
    """`projection(x)`, computed in the dtype of the projection's weights."""
    weight = next(projection.parameters(), None)
    output: Tensor = projection(x if weight is None else x.to(weight.dtype))
    return output


def at_least_float32(x: Tensor) -> Tensor:
    """x as float64 if it is float64, else as float32."""
    return x if x.dtype == torch.float64 else x.float()


def expand_mask(mask: Tensor, values: Tensor) -> Tensor:
    """mask [b, n] with trailing dimensions of size 1, to broadcast with values [b, n, ...]."""
    return mask.view(*mask.shape, *([1] * (values.ndim - 2)))
