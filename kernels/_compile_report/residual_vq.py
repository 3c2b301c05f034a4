"""Launches of residual quantization: 65,536 rows, 8 stages of 1,024 codes."""

from __future__ import annotations

from spinlock_fast.kernels._compile_report.launch import KernelLaunch
from spinlock_fast.kernels.residual_vq.triton_backward import residual_vq_bwd_kernel, row_block
from spinlock_fast.kernels.residual_vq.triton_forward import (
    ResidualConfig,
    residual_gather_kernel,
    residual_sum_kernel,
    residual_vq_fwd_kernel,
)


def launches(capability: int) -> list[KernelLaunch]:
    N, Q, K = 65536, 8, 1024
    launches = []
    for D, variants in ((64, ((False, True), (True, True), (False, False))), (128, ((True, True),))):
        config = ResidualConfig.of(D, capability)
        shape = f"65,536 x {D}, 8 x 1,024"
        tile = {"BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "BLOCK_D": config.block_d}
        block = {"BLOCK_N": row_block(config.block_d), "BLOCK_D": config.block_d}
        codebook_bytes = 4 * Q * K * D
        for cosine, rotation in variants:
            named = shape + (", cosine" if cosine else "") + (", rotation" if rotation else "")
            options = {"COSINE": cosine, "ROTATION": rotation, "HAS_MASK": cosine, **tile}
            options |= {"num_warps": config.num_warps, "num_stages": 1}
            num_bytes, operations = 4 * N * D + codebook_bytes + 8 * N * Q, 2 * N * Q * K
            launches.append(
                KernelLaunch.of(residual_vq_fwd_kernel, named, options, num_bytes, operations, operations * D)
            )
            constants = {"COSINE": cosine, "GRADIENT": 2 if rotation else 1, "HAS_MASK": cosine, **block}
            num_bytes = 12 * N * D + codebook_bytes + 8 * N * Q
            launches.append(KernelLaunch(residual_vq_bwd_kernel, named, constants, num_bytes, 20 * N * Q * D, 0))
        constants = {"HAS_MASK": True, "COUNT": True, **block}
        launches.append(KernelLaunch(residual_gather_kernel, shape, constants, num_bytes, N * Q * D, 0))
        constants = {"COSINE": True, "BLOCK_R": 32, "BLOCK_D": 64}
        num_bytes = 4 * N * D + 2 * codebook_bytes + 28 * N * Q
        launches.append(KernelLaunch(residual_sum_kernel, shape, constants, num_bytes, N * Q * Q * D, 0))
    return launches
