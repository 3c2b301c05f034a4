"""Launches of the nearest-code assignment: the batch of the 100K run, and large codebooks."""

from __future__ import annotations

from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels._common.triton_centred_codes import centre_codes_kernel, code_centres_kernel
from spinlock_fast.kernels._common.triton_code_sums import SEGMENT_ROWS, segment_sum_kernel
from spinlock_fast.kernels._compile_report.launch import LAYOUT, ROWS, KernelLaunch
from spinlock_fast.kernels.vq_assign.triton_backward import vq_assign_bwd_kernel
from spinlock_fast.kernels.vq_assign.triton_forward import AssignConfig, vq_assign_fwd_kernel
from spinlock_fast.kernels.vq_assign.triton_streaming import SearchConfig, vq_finish_fwd_kernel, vq_search_fwd_kernel


def launches(capability: int) -> list[KernelLaunch]:
    return [*_tile_launches(capability), *_streaming_launches(capability)]


def _tile_launches(capability: int) -> list[KernelLaunch]:
    launches = []
    width, entries, codes = LAYOUT.total_dims, LAYOUT.total_entries, LAYOUT.total_codes
    for largest in (16, 32, 64):
        config = AssignConfig.of(CodebookLayout.cached((largest,), (16,)), capability)
        for centred in (False, True):
            for with_sums in (True, False):
                launches.append(
                    KernelLaunch(
                        vq_assign_fwd_kernel,
                        f"512 rows, 33 codebooks, K <= {largest}"
                        + (", centred" if centred else "")
                        + ("" if with_sums else ", codes only"),
                        {
                            "HAS_MASK": True,
                            "WITH_SUMS": with_sums,
                            "CENTRED": centred,
                            "BLOCK_N": config.block_n,
                            "BLOCK_K": config.block_k,
                            "BLOCK_D": config.block_d,
                        },
                        num_bytes=4 * (2 * ROWS * width + entries + (codes + entries) * with_sums) + 8 * ROWS * 33,
                        float_ops=4 * ROWS * width,
                        dot_ops=2 * ROWS * entries * (1 + with_sums),
                        num_warps=config.num_warps,
                        num_stages=config.num_stages,
                    )
                )
    for block_d in (16, 32, 64):
        for rotate in (False, True):
            launches.append(
                KernelLaunch(
                    vq_assign_bwd_kernel,
                    f"512 rows, 33 codebooks, D <= {block_d}" + (", rotation" if rotate else ""),
                    {"ROTATE": rotate, "BLOCK_N": 1024 // block_d, "BLOCK_D": block_d},
                    num_bytes=4 * 4 * ROWS * width + 8 * ROWS * 33,
                    float_ops=(18 if rotate else 3) * ROWS * width,
                    dot_ops=0,
                )
            )
    return launches


def _streaming_launches(capability: int) -> list[KernelLaunch]:
    """65,536 rows of 256 dimensions, 1,024 codes."""
    N, K, D = 65536, 1024, 256
    shape = "65,536 x 256, K = 1,024"
    config = SearchConfig.of(capability)
    constants: dict[str, object] = {"HAS_MASK": True, "BLOCK_N": 32, "BLOCK_D": 32}
    launches = [
        KernelLaunch(code_centres_kernel, shape, {"BLOCK_K": 32, "BLOCK_D": 32}, 4 * (K + 1) * D, 2 * K * D, 0),
        KernelLaunch(vq_finish_fwd_kernel, shape, constants, 4 * (2 * N * D + K * D + 2 * N) + 8 * N, 4 * N * D, 0),
    ]
    for centred in (False, True):
        with_centre = shape + (", centred" if centred else "")
        constants = {"CENTRED": centred, "BLOCK_K": 32, "BLOCK_D": 32}
        launches.append(KernelLaunch(centre_codes_kernel, with_centre, constants, 4 * (2 * K * D + K), 3 * K * D, 0))
        for aligned in (False, True):
            launches.append(
                KernelLaunch(
                    vq_search_fwd_kernel,
                    with_centre + (", aligned" if aligned else ""),
                    {
                        "CENTRED": centred,
                        "ALIGNED": aligned,
                        "BLOCK_N": config.block_n,
                        "BLOCK_K": config.block_k,
                        "BLOCK_D": config.block_d,
                    },
                    4 * (N * D + K * D + 2 * N),
                    2 * N * K,
                    2 * N * K * D,
                    num_warps=config.num_warps,
                    num_stages=config.num_stages,
                )
            )
    for level in (0, 1):
        for block_d in (16, 64):
            constants = {"LEVEL": level, "BLOCK_R": SEGMENT_ROWS, "BLOCK_D": block_d}
            rows = N if level == 0 else 2 * K
            launches.append(
                KernelLaunch(
                    segment_sum_kernel, f"{rows:,} x {block_d}", constants, 4 * rows * block_d, rows * block_d, 0
                )
            )
    return launches
