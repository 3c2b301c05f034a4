"""Launches of the partial decoders: a training step of the 100K run."""

from __future__ import annotations

from spinlock_fast.kernels._compile_report.launch import CATEGORY_SIZES, LAYOUT, ROWS, KernelLaunch
from spinlock_fast.kernels.code_decoders.triton_backward import code_decoders_bwd_kernel
from spinlock_fast.kernels.code_decoders.triton_forward import DecoderConfig, code_decoders_fwd_kernel


def launches(capability: int) -> list[KernelLaunch]:
    B, F, H, G, D = ROWS, sum(CATEGORY_SIZES), 128, LAYOUT.groups, LAYOUT.total_dims
    codes, entries = LAYOUT.total_codes, LAYOUT.total_entries
    config = DecoderConfig.of(LAYOUT, H)
    shape = f"{B} rows, {F} features, {G} codebooks"
    parameters = D * H + G * H * F
    inner = codes * (H + 2 * F)  # hidden, decoded, residual
    return [
        KernelLaunch.of(
            code_decoders_fwd_kernel, shape, config.forward,
            num_bytes=4 * (B * F + entries + parameters + G * (H + F) + inner) + 8 * B * G,
            float_ops=3 * B * F + codes * (2 * H + 9 * F),
            dot_ops=2 * (B * codes * F + entries * H + codes * H * F),
        ),
        KernelLaunch.of(
            code_decoders_bwd_kernel, shape, config.backward,
            num_bytes=4 * (B * F + entries + 2 * parameters + inner + B * D + G * (H + F)) + 8 * B * G,
            float_ops=G * B * (F + H) + codes * (2 * F + 2 * H),
            dot_ops=2 * (B * G * F * H + B * D * H + 2 * codes * H * F + entries * H),
            passes=1,
        ),
    ]  # fmt: skip
