"""Launches of the grouped networks: a training step of the 100K run; the largest of those with the same tiles."""

from __future__ import annotations

from spinlock_fast.kernels._compile_report.launch import CATEGORY_SIZES, LAYOUT, ROWS, KernelLaunch, tf32_passes
from spinlock_fast.kernels.grouped_mlp.triton_backward import grouped_mlp_bwd_first_kernel
from spinlock_fast.kernels.grouped_mlp.triton_forward import (
    ProductConfig,
    grouped_mlp_fwd_first_kernel,
    grouped_product_kernel,
)


def launches(capability: int) -> list[KernelLaunch]:
    categories, decoder = (CATEGORY_SIZES, 512), ((LAYOUT.total_dims,), 256)
    return [
        *_networks_forward(*categories, "tf32"),
        *_networks_forward(*decoder, "tf32"),
        *_networks_forward(*decoder, "tf32x3"),
        *_networks_backward(*categories, "tf32", needs_x=False),
        *_networks_backward(*decoder, "tf32", needs_x=True),
        *_networks_backward(*decoder, "tf32x3", needs_x=True),
        *(
            _second_layer(len(CATEGORY_SIZES), *sizes, precision, bias)
            for precision in ("tf32", "tf32x3")
            for sizes, bias in (((512, 256), True), ((256, 512), False))
        ),
    ]


def _second_layer(G: int, K: int, N: int, precision: str, bias: bool) -> KernelLaunch:
    B = ROWS
    return KernelLaunch.of(
        grouped_product_kernel, f"{B} rows, {G} of {K} to {N}, {precision}",
        {"BIAS": bias, **ProductConfig.for_second_layer(precision).tiles},
        num_bytes=4 * G * (B * K + K * N + (1 + (not bias)) * B * N), float_ops=G * B * N,
        dot_ops=2 * G * B * K * N, passes=tf32_passes(precision),
    )  # fmt: skip


def _networks_forward(sizes: tuple[int, ...], H: int, precision: str) -> list[KernelLaunch]:
    G, B, total = len(sizes), ROWS, sum(sizes)
    return [
        KernelLaunch.of(
            grouped_mlp_fwd_first_kernel, f"{B} rows, {G} of {total} to {H}, {precision}",
            {"DROPOUT": True, **ProductConfig.of(G, B, H, precision).tiles},
            num_bytes=4 * (B * total + total * H + G * H + G * B * H), float_ops=2 * G * B * H,
            dot_ops=2 * B * total * H, passes=tf32_passes(precision),
        )
    ]  # fmt: skip


def _networks_backward(sizes: tuple[int, ...], H: int, precision: str, needs_x: bool) -> list[KernelLaunch]:
    G, B, total = len(sizes), ROWS, sum(sizes)
    return [
        KernelLaunch.of(
            grouped_mlp_bwd_first_kernel, f"{B} rows, {G} of {total} to {H}, {precision}",
            {"NEEDS_X": needs_x, **ProductConfig.for_weights(precision).tiles},
            num_bytes=4 * ((B + H) * total * (1 + needs_x) + G * H * (B + 1)), float_ops=G * B * H,
            dot_ops=2 * B * total * H * (1 + needs_x), passes=tf32_passes(precision),
        )
    ]  # fmt: skip
