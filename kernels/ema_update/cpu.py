"""`reference` by the native CPU kernels: all codebooks in one call, in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spinlock_fast.kernels._common.native import address, library, native_supports

SMOOTHING = {"none": 0, "laplace": 1, "division": 2}  # numbers in the native kernels


def supports(*arguments: Tensor | None) -> bool:
    """Whether `average_codes` can compute on these tensors; the last one is `usage`."""
    *floats, usage = arguments
    held = [tensor for tensor in floats if tensor is not None]
    return (
        native_supports(*held)
        and all(tensor.is_contiguous() for tensor in held)
        and (usage is None or (usage.dtype == torch.int64 and usage.is_cpu and usage.is_contiguous()))
    )


def average_codes(
    codes: Tensor | None,
    cluster_size: Tensor,
    code_sum: Tensor,
    counts: Tensor,
    sums: Tensor,
    usage: Tensor | None,
    num_codes: Sequence[int],
    dims: Sequence[int],
    decay: float,
    smoothing: str,
    epsilon: float,
    *,
    unit: bool = False,
    keep_without_rows: bool = True,
) -> None:
    """Updates moving counts and sums, and `codes` unless None: `reference.ema_update`, `averages.average_codes`.

    Args:
        unit: normalises codes to unit length.
        keep_without_rows: changes nothing in a codebook to which no row was assigned.
    """
    library.average_codes(
        address(codes), address(cluster_size), address(code_sum), address(usage), address(counts), address(sums),
        list(num_codes), list(dims), 1.0 - decay, SMOOTHING[smoothing], epsilon, unit, keep_without_rows,
        torch.get_num_threads(),
    )  # fmt: skip
