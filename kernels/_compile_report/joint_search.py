"""Launches of the joint search: one codebook of a batch of the 100K run."""

from __future__ import annotations

from spinlock_fast.kernels._compile_report.launch import CATEGORY_SIZES, LAYOUT, ROWS, KernelLaunch
from spinlock_fast.kernels.joint_search.triton_forward import SearchConfig, joint_search_fwd_kernel


def launches(capability: int) -> list[KernelLaunch]:
    B, F, H, K = ROWS, sum(CATEGORY_SIZES), 256, LAYOUT.max_codes
    config = SearchConfig.of(H, F)
    return [
        KernelLaunch.of(
            joint_search_fwd_kernel, f"{B} rows, {F} features, {K} codes",
            {**config.options, "HAS_COST": has_cost, "HAS_LINEAR": has_linear},
            num_bytes=4 * (B * (F + 2 * H + 1) + K * H + H * F) + 16 * B + 4 * has_cost * B * K
            + 4 * has_linear * F * (B + K),
            float_ops=B * K * (2 * H + (4 if has_linear else 3) * F),
            dot_ops=2 * B * K * H * F,
        )
        for has_cost, has_linear in ((False, False), (True, False), (False, True))
    ]  # fmt: skip
