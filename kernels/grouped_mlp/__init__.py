"""Ragged linear layers, two-layer networks and normalisation of many groups at once, with gradients written by hand."""

from spinlock_fast.kernels.grouped_mlp.op import (
    grouped_mlp,
    normalize_,
    project,
    ragged_layer_norm,
    scaled_output_linear,
)
from spinlock_fast.kernels.grouped_mlp.ragged import Ragged

__all__ = ["Ragged", "grouped_mlp", "normalize_", "project", "ragged_layer_norm", "scaled_output_linear"]
