"""Launches of residual quantization: 65,536 rows, 8 stages of 1,024 codes."""

from __future__ import annotations

from spinlock_fast.kernels._common.triton_average_codes import average_codes_kernel, loss_kernel
from spinlock_fast.kernels._common.triton_code_sums import SEGMENT_ROWS
from spinlock_fast.kernels._compile_report.launch import KernelLaunch
from spinlock_fast.kernels.residual_vq.reference import GRADIENTS
from spinlock_fast.kernels.residual_vq.triton_backward import residual_vq_bwd_kernel, row_block
from spinlock_fast.kernels.residual_vq.triton_forward import (
    ResidualConfig,
    residual_gather_kernel,
    residual_sum_kernel,
    residual_vq_fwd_kernel,
)
from spinlock_fast.kernels.residual_vq.triton_step import step_bwd_kernel, step_finish_kernel, step_sum_kernel


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
    return [*launches, *_step_launches()]


def _step_launches() -> list[KernelLaunch]:
    """A training step of `VectorQuantize`."""
    N, K = 65536, 1024
    launches = [KernelLaunch(loss_kernel, "2,048 tiles", {"BLOCK": 1024}, 8192, 2048, 0, types={"loss_scale": "fp32"})]
    for block_d, cosine, half in ((16, True, True), (16, False, False), (64, True, False), (64, False, True)):
        D = 16 if block_d == 16 else 256
        shape = f"{N:,} x {D}, K = {K:,}" + (", cosine" if cosine else "") + (", bfloat16" if half else "")
        pointer = "*bf16" if half else "*fp32"
        types = {"z_ptr": pointer, "quantized_ptr": pointer, "grad_ptr": pointer, "grad_z_ptr": pointer}
        types |= {"error_scale": "fp32", "loss_scale": "fp32"}
        block, z_bytes = {"BLOCK_N": 1024 // block_d, "BLOCK_D": block_d}, (2 if half else 4) * N * D
        constants = {"COSINE": cosine, "ROTATION": True, "COUNT": True, **block}
        num_bytes = 2 * z_bytes + 4 * K * D + 20 * N
        launches.append(KernelLaunch(step_finish_kernel, shape, constants, num_bytes, 8 * N * D, 0, types=types))
        constants = {"COSINE": cosine, "BLOCK_R": SEGMENT_ROWS, "BLOCK_D": block_d}
        num_bytes = z_bytes + 4 * K * D + 8 * N
        launches.append(KernelLaunch(step_sum_kernel, shape, constants, num_bytes, 2 * N * D, 0, types=types))
        for gradient, number in GRADIENTS.items():
            constants = {"COSINE": cosine, "GRADIENT": number, "HAS_GRAD_LOSS": True, **block}
            num_bytes = (3 if number else 2) * z_bytes + 4 * K * D + 4 * N
            name = f"{shape}, {gradient}"
            launches.append(KernelLaunch(step_bwd_kernel, name, constants, num_bytes, 40 * N * D, 0, types=types))
        for segments in (False, True):
            flags = {"SEGMENTS": segments, "SET_CODES": True, "UNIT": cosine, "WITH_LOSS": segments}
            tile = {"BLOCK_K": 16, "BLOCK_D": min(32, block_d)}
            types |= {"batch_counts_ptr": "*i32" if segments else "*fp32"}
            num_bytes = 20 * K * D + 32 * K
            launches.append(
                KernelLaunch(average_codes_kernel, shape, {**flags, **tile}, num_bytes, 8 * K * D, 0, types=dict(types))
            )
    return launches
