"""The former names of `_compile_report.launch`."""

from spinlock_fast.kernels._compile_report.launch import LAYOUT as SEED
from spinlock_fast.kernels._compile_report.launch import ROWS, KernelLaunch

__all__ = ["ROWS", "SEED", "Specimen"]


class Specimen(KernelLaunch):
    launched = KernelLaunch.of
