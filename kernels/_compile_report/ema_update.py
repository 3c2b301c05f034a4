"""Launches of the codebook update: the codebooks of the 100K run, and one large codebook."""

from __future__ import annotations

from spinlock_fast.kernels._compile_report.launch import LAYOUT, KernelLaunch
from spinlock_fast.kernels.ema_update.triton_update import code_usage_kernel, ema_totals_kernel, ema_update_kernel


def launches(capability: int) -> list[KernelLaunch]:
    entries, codes = LAYOUT.total_entries, LAYOUT.total_codes
    launches = [KernelLaunch(ema_totals_kernel, "K = 8,192", {"BLOCK_K": 1024}, 8 * 8192, 2 * 8192, 0)]
    for block_k in (32, 64):
        launches.append(
            KernelLaunch(
                ema_update_kernel,
                f"33 codebooks, K <= {block_k}, 8 parts",
                {
                    "FUSED": True,
                    "LAPLACE": False,
                    "WITH_USAGE": True,
                    "BLOCK_K": block_k,
                    "BLOCK_D": 16 if block_k == 64 else 32,
                },
                4 * (3 * entries + 2 * codes + 8 * (entries + codes) + 2 * codes),
                12 * entries,
                0,
            )
        )
    constants = {"FUSED": False, "LAPLACE": True, "WITH_USAGE": True, "BLOCK_K": 16, "BLOCK_D": 16}
    launches.append(KernelLaunch(ema_update_kernel, "8,192 x 64", constants, 20 * 8192 * 64, 4 * 8192 * 64, 0))
    for block_k in (32, 1024):
        launches.append(
            KernelLaunch(
                code_usage_kernel, f"33 codebooks, K <= {block_k}", {"BLOCK_K": block_k}, 4 * codes, 9 * codes, 0
            )
        )
    return launches
