"""Launches of the replacement of dead codes: one codebook of 1,024 codes, 256 dimensions."""

from __future__ import annotations

from spinlock_fast.kernels._compile_report.launch import KernelLaunch
from spinlock_fast.kernels.dead_codes.triton_replace import choose_rows_kernel, replace_codes_kernel


def launches(capability: int) -> list[KernelLaunch]:
    K, D = 1024, 256
    launches = []
    types = {"index_ptr": "*i64", "threshold": "fp32", "size": "fp32"}
    for block_k in (32, 1024):
        constants = {"BLOCK_K": block_k}
        launches.append(
            KernelLaunch(choose_rows_kernel, f"K = {block_k:,}", constants, 12 * K, 100 * K, 0, types=types)
        )
    for block_d in (16, 64):
        constants = {"BLOCK_K": 16, "BLOCK_D": block_d}
        shape = f"{K:,} x {16 if block_d == 16 else D}"
        launches.append(KernelLaunch(replace_codes_kernel, shape, constants, 12 * K * D, K * D, 0, types=types))
    return launches
