"""Launches of the augmented rows: the batch of the 100K run."""

from __future__ import annotations

from spinlock_fast.kernels._compile_report.launch import CATEGORY_SIZES, ROWS, KernelLaunch
from spinlock_fast.kernels.augment.triton import TILES, augment_kernel


def launches(capability: int) -> list[KernelLaunch]:
    B, F = ROWS, sum(CATEGORY_SIZES)
    options = {"MIXED": True, "FADED": True, "NOISY": True}
    return [
        KernelLaunch.of(
            augment_kernel, f"{B} rows, {F} features", {**options, **TILES},
            num_bytes=4 * 4 * B * F + 8 * B, float_ops=60 * B * F, dot_ops=0,
        )
    ]  # fmt: skip
