"""Ragged linear layers, two-layer networks and normalisation of many groups at once, with gradients written by hand."""

from spinlock_fast.kernels._common.ragged import Ragged
from spinlock_fast.kernels.grouped_mlp.op import (
    grouped_mlp,
    normalize_,
    project,
    ragged_layer_norm,
    scaled_output_linear,
)

__all__ = ["Ragged", "grouped_mlp", "normalize_", "project", "ragged_layer_norm", "scaled_output_linear"]
