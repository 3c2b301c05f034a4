"""Launches of the topographic correlations: the batch of the 100K run."""

from __future__ import annotations

from spinlock_fast.kernels._compile_report.launch import CATEGORY_SIZES, LAYOUT, ROWS, KernelLaunch
from spinlock_fast.kernels.topo_loss import triton_backward, triton_forward


def launches(capability: int) -> list[KernelLaunch]:
    return [*_forward(), *_backward()]


def _forward() -> list[KernelLaunch]:
    S, G, width, entries, F = ROWS, LAYOUT.groups, LAYOUT.total_dims, LAYOUT.total_entries, sum(CATEGORY_SIZES)
    pairs = S * S
    shape = f"{S} rows, {G} codebooks, {F} features"
    parts = 1 + 2 * triton_forward.SPLITS
    points = S * (F + 2 * width)
    return [
        KernelLaunch.of(
            triton_forward.topo_points_fwd_kernel, shape, triton_forward.POINTS_TILES,
            num_bytes=4 * (S * (F + width) + entries + points) + 8 * S * G, float_ops=4 * points, dot_ops=0,
        ),
        KernelLaunch.of(
            triton_forward.topo_distances_fwd_kernel, shape, triton_forward.DISTANCES_TILES,
            num_bytes=4 * (points + parts * pairs // 2), float_ops=2 * pairs * G, dot_ops=pairs * (F + 2 * width),
        ),
        KernelLaunch(
            triton_forward.topo_moments_fwd_kernel, shape, {"BLOCK_S": triton_forward.BLOCK_PAIRS},
            num_bytes=4 * (parts + 2) * pairs // 2, float_ops=(parts + 12) * pairs // 2, dot_ops=0,
        ),
        KernelLaunch(
            triton_forward.topo_stats_fwd_kernel, shape, {"BLOCK_T": 128},
            num_bytes=8 * 8 * 256, float_ops=8 * 256, dot_ops=0,
        ),
    ]  # fmt: skip


def _backward() -> list[KernelLaunch]:
    S, G, width, entries = ROWS, LAYOUT.groups, LAYOUT.total_dims, LAYOUT.total_entries
    pairs = S * S
    shape = f"{S} rows, {G} codebooks"
    result = [
        KernelLaunch(
            triton_backward.topo_weights_bwd_kernel, shape, {"BLOCK_S": triton_forward.BLOCK_PAIRS},
            num_bytes=4 * 7 * pairs // 2, float_ops=14 * pairs // 2, dot_ops=0,
        )
    ]  # fmt: skip
    for tiles in triton_backward.LATENTS_TILES:
        dims = [d for d in LAYOUT.dims if triton_backward.handles_width(tiles, d)]
        dims = dims or [triton_backward.columns_per_program(tiles)]
        result.append(
            KernelLaunch.of(
                triton_backward.topo_latents_bwd_kernel, f"{S} rows, {len(dims)} codebooks of {sum(dims)}", tiles,
                num_bytes=4 * (2 * S * sum(dims) + pairs), float_ops=6 * pairs * len(dims),
                dot_ops=4 * pairs * sum(dims),
            )
        )  # fmt: skip
    for codes in (16, 32, 64):
        result.append(
            KernelLaunch.of(
                triton_backward.topo_codes_bwd_kernel, f"{shape}, K <= {codes}", triton_backward.codes_tiles(codes),
                num_bytes=4 * (2 * S * width + entries + pairs) + 8 * S * G,
                float_ops=6 * S * LAYOUT.total_codes,
                dot_ops=2 * pairs * LAYOUT.total_codes + 4 * S * entries,
            )
        )  # fmt: skip
    return result
