"""Launches of Adam: the model of the 100K run."""

from __future__ import annotations

from spinlock_fast.kernels._compile_report.launch import KernelLaunch
from spinlock_fast.kernels.adam.triton_update import adam_kernel, launch_options


def launches(capability: int) -> list[KernelLaunch]:
    tensors, entries = 18, 3_300_000
    return [
        KernelLaunch.of(
            adam_kernel, f"{tensors} tensors, {entries:,} entries",
            {**launch_options((0.9, 0.999), 1e-8, decay, decoupled), "ALIGNED": True},
            num_bytes=4 * 7 * entries, float_ops=16 * entries, dot_ops=0,
            types={"gradients": ("*fp32",) * tensors},
        )
        for decay, decoupled in ((0.0, False), (1.0, True))
    ]  # fmt: skip
