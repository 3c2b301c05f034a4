"""Launches of the augmented rows: the batch of the 100K run."""

from __future__ import annotations

from spinlock_fast.kernels._compile_report.launch import CATEGORY_SIZES, ROWS, KernelLaunch
from spinlock_fast.kernels.augment.triton_forward import TILES, augment_fwd_kernel


def launches(capability: int) -> list[KernelLaunch]:
    B, F = ROWS, sum(CATEGORY_SIZES)
    return [
        KernelLaunch.of(
            augment_fwd_kernel, f"{B} rows, {F} features",
            {"HAS_MIXUP": True, "HAS_DECAY": True, "HAS_NOISE": True, **TILES},
            num_bytes=4 * 4 * B * F + 8 * B, float_ops=60 * B * F, dot_ops=0,
        )
    ]  # fmt: skip
