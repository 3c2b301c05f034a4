"""Launches of the projections: a training step of the 100K run, and wider codebooks."""

from __future__ import annotations

from typing import Any

from spinlock_fast.kernels._common.ragged import Ragged
from spinlock_fast.kernels._compile_report.launch import LAYOUT, ROWS, KernelLaunch, tf32_passes
from spinlock_fast.kernels.grouped_mlp.projection import (
    ProjectConfig,
    project_bwd_rows_kernel,
    project_bwd_weights_kernel,
    project_fwd_kernel,
)


def launches(capability: int) -> list[KernelLaunch]:
    return [
        launch
        for precision in ("tf32", "tf32x3")
        for parts in (Ragged.of(LAYOUT.dims), _WIDE, _WIDER)
        for launch in _projection(256, parts, precision)
    ]


_WIDE = Ragged.of([32, 64, 96, 40, 80, 120])  # three levels of 64 and of 80 features
_WIDER = Ragged.of([52, 100, 152])


def _projection(E: int, parts: Ragged, precision: str) -> list[KernelLaunch]:
    B, S, total, levels = ROWS, parts.groups, parts.total, 3
    G = S // levels
    outputs = Ragged.of([sum(parts.sizes[g * levels : (g + 1) * levels]) for g in range(G)])
    config = ProjectConfig.of(E, outputs, parts, precision)
    shape = f"{B} rows, {G} of {E} to {total}, {precision}"
    x, out, weight, statistics = G * B * E, B * total, total * E, 2 * G * B
    dots: dict[str, Any] = {"dot_ops": 2 * out * E, "passes": tf32_passes(precision)}
    return [
        KernelLaunch.of(
            project_fwd_kernel, shape, {"DROPOUT": True, **config.forward},
            num_bytes=4 * (x + 2 * G * E + weight + 3 * total + statistics + 2 * out + S * B),
            float_ops=8 * x + 9 * out, **dots,
        ),
        KernelLaunch.of(
            project_bwd_rows_kernel, shape, {"DROPOUT": True, **config.rows},
            num_bytes=4 * (2 * x + G * E + weight + total + statistics + 3 * out + S * B),
            float_ops=10 * x + 9 * out, **dots,
        ),
        KernelLaunch.of(
            project_bwd_weights_kernel, shape, config.weights,
            num_bytes=4 * (x + 4 * G * E + 2 * weight + 3 * total + statistics + 3 * out),
            float_ops=2 * x + 4 * out + 7 * weight, **dots,
        ),
    ]  # fmt: skip
