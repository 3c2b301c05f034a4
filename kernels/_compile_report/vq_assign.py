"""Launches of the nearest-code assignment: the batch of the 100K run, and large codebooks."""

from __future__ import annotations

from itertools import product

from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels._common.triton_centred_codes import centre_codes_kernel, code_centres_kernel
from spinlock_fast.kernels._common.triton_code_sums import (
    SEGMENT_ROWS,
    code_sum_kernel,
    order_by_code_kernel,
    segment_sum_kernel,
)
from spinlock_fast.kernels._compile_report.launch import LAYOUT, ROWS, KernelLaunch
from spinlock_fast.kernels.vq_assign.triton_backward import vq_assign_bwd_kernel
from spinlock_fast.kernels.vq_assign.triton_forward import AssignConfig, vq_assign_fwd_kernel
from spinlock_fast.kernels.vq_assign.triton_streaming import SearchConfig, vq_finish_fwd_kernel, vq_search_fwd_kernel


def launches(capability: int) -> list[KernelLaunch]:
    return [*_tile_launches(capability), *_streaming_launches(capability)]


def _tile_launches(capability: int) -> list[KernelLaunch]:
    width, entries, codes, G = LAYOUT.total_dims, LAYOUT.total_entries, LAYOUT.total_codes, LAYOUT.groups
    shape = f"{ROWS} rows, {G} codebooks"
    launches = []
    for max_codes, centred, with_sums in product((16, 32, 64), (False, True), (True, False)):
        config = AssignConfig.of(CodebookLayout.cached((max_codes,), (16,)), capability)
        flags = (", centred" if centred else "") + ("" if with_sums else ", codes only")
        options = {"HAS_MASK": True, "WITH_SUMS": with_sums, "CENTRED": centred, **config.options}
        launches.append(
            KernelLaunch.of(
                vq_assign_fwd_kernel, f"{shape}, K <= {max_codes}{flags}", options,
                num_bytes=4 * (2 * ROWS * width + entries + (codes + entries) * with_sums) + 8 * ROWS * G,
                float_ops=4 * ROWS * width, dot_ops=2 * ROWS * entries * (1 + with_sums),
            )
        )  # fmt: skip
    for block_d, rotate in product((16, 32, 64), (False, True)):
        launches.append(
            KernelLaunch(
                vq_assign_bwd_kernel, f"{shape}, D <= {block_d}" + (", rotation" if rotate else ""),
                {"ROTATE": rotate, "BLOCK_N": 1024 // block_d, "BLOCK_D": block_d},
                num_bytes=16 * ROWS * width + 8 * ROWS * G, float_ops=(18 if rotate else 3) * ROWS * width, dot_ops=0,
            )
        )  # fmt: skip
    return launches


def _streaming_launches(capability: int) -> list[KernelLaunch]:
    N, K, D = 65536, 1024, 256
    shape = f"{N:,} x {D}, K = {K:,}"
    finish = {"HAS_MASK": True, "COUNT": True, "BLOCK_N": 32, "BLOCK_D": 32}
    launches = [
        KernelLaunch(code_centres_kernel, shape, {"BLOCK_K": 32, "BLOCK_D": 32}, 4 * (K + 1) * D, 2 * K * D, 0),
        KernelLaunch(vq_finish_fwd_kernel, shape, finish, 4 * (2 * N * D + K * D + 2 * N) + 8 * N, 4 * N * D, 0),
    ]
    for centred in (False, True):
        name = shape + (", centred" if centred else "")
        constants = {"CENTRED": centred, "COPY_CODES": True, "COPY_SIZES": True, "BLOCK_K": 32, "BLOCK_D": 32}
        launches.append(KernelLaunch(centre_codes_kernel, name, constants, 4 * (3 * K * D + 4 * K), 3 * K * D, 0))
        for aligned in (False, True):
            flags = {"CENTRED": centred, "COSINE": not centred, "ALIGNED": aligned}
            options = {**flags, **SearchConfig.of(capability).options}
            launches.append(
                KernelLaunch.of(
                    vq_search_fwd_kernel, name + (", aligned" if aligned else ""), options,
                    num_bytes=4 * (N * D + K * D + 2 * N), float_ops=2 * N * K, dot_ops=2 * N * K * D,
                )
            )  # fmt: skip
    for block_d in (16, 64):
        constants = {"BLOCK_R": SEGMENT_ROWS, "BLOCK_D": block_d}
        entries = N * block_d
        launches.append(KernelLaunch(segment_sum_kernel, f"{N:,} x {block_d}", constants, 4 * entries, entries, 0))
        entries, constants = K * block_d, {"BLOCK_K": 16, "BLOCK_D": min(32, block_d)}
        launches.append(KernelLaunch(code_sum_kernel, f"{K:,} x {block_d}", constants, 12 * entries, 2 * entries, 0))
    for block_k, searched in product((1, 4), (False, True)):
        name = f"{N:,} rows, K = {K:,}" + ("" if searched else ", sorted")
        constants = {"SEARCH": searched, "BLOCK_K": block_k, "BLOCK_N": 1024}
        operations = 3 * N * K if searched else 8 * K
        launches.append(KernelLaunch(order_by_code_kernel, name, constants, 12 * N * searched + 32 * K, operations, 0))
    return launches
