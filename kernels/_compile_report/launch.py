"""A kernel launch: the kernel, its compile-time parameters, and the work that it does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from spinlock_fast.kernels._common.layout import CodebookLayout

# The 33 codebooks of the 100K run, the features of its 11 categories (three codebooks each), and its batch size.
_CODES = "15 7 6 28 14 7 24 13 6 24 12 6 32 17 8 32 16 8 28 15 7 20 11 6 24 12 6 24 13 6 20 11 6"
_DIMS = "4 4 8 8 16 24 8 16 24 8 16 20 16 32 48 16 28 44 12 20 32 8 12 16 8 12 20 8 16 24 8 12 16"
LAYOUT = CodebookLayout.of([int(k) for k in _CODES.split()], [int(d) for d in _DIMS.split()])
CATEGORY_SIZES = (4, 16, 15, 13, 32, 28, 20, 10, 11, 14, 9)
ROWS = 512

# Types of kernel parameters by name. Other names that end in _ptr are float32 pointers, all others int32 numbers.
_TYPES = {
    **dict.fromkeys(("mask_ptr",), "*i1"),
    **dict.fromkeys(
        (
            "offsets_ptr", "sets_ptr", "code_ptr", "zero_ptr", "splits_ptr", "counts32_ptr", "sorted_rows_ptr",
            "item_code_ptr", "item_first_ptr", "item_last_ptr", "first_item_ptr",
        ),
        "*i32",
    ),
    **dict.fromkeys(
        (
            "codes_ptr", "new_codes_ptr", "rows_ptr", "next_row_ptr", "seed_ptr", "codebook_of_code_ptr",
            "addresses_ptr", "usage_ptr",
        ),
        "*i64",
    ),
    **dict.fromkeys(("moments_ptr",), "*fp64"),
    **dict.fromkeys(
        (
            "rounding", "x_rounding", "decay", "one_minus_decay", "epsilon", "idle_share", "factor",
            "mixup_scale", "noise_std", "pre_factor", "post_factor", "pre_weight", "scale", "eps", "part_eps",
        ),
        "fp32",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class KernelLaunch:
    """One launch of a Triton kernel.

    Args:
        kernel: the function under `triton.jit`.
        shape: sizes of the launch, for the table.
        constants: constexpr parameters.
        num_bytes: least traffic with device memory: inputs read once, outputs written once.
        float_ops: multiplications and additions outside of matrix products.
        dot_ops: multiplications and additions of matrix products, in float32.
        passes: TF32 products per float32 product: 3 for `tf32x3`, 1 for `tf32`.
        types: parameters whose type differs from that of `_TYPES`.
    """

    kernel: Any
    shape: str
    constants: dict[str, Any]
    num_bytes: int
    float_ops: int
    dot_ops: int
    num_warps: int = 4
    num_stages: int = 1
    passes: int = 3
    types: dict[str, Any] | None = None

    @classmethod
    def of(
        cls,
        kernel: Any,
        shape: str,
        options: dict[str, Any],
        num_bytes: int,
        float_ops: int,
        dot_ops: int,
        passes: int = 3,
        types: dict[str, Any] | None = None,
    ) -> KernelLaunch:
        """From the keyword arguments of a launch: constexpr parameters (in capitals), num_warps and num_stages."""
        constants = {name: value for name, value in options.items() if name.isupper()}
        warps, stages = options["num_warps"], options.get("num_stages", 1)
        return cls(kernel, shape, constants, num_bytes, float_ops, dot_ops, warps, stages, passes, types)

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)

    def signature(self) -> dict[str, Any]:
        """Type of every parameter, in the form that `triton.compile` takes."""
        types = {**_TYPES, **(self.types or {})}
        signature = {}
        for name in self.kernel.arg_names:
            if name in self.constants:
                signature[name] = "constexpr"
            else:
                signature[name] = types.get(name, "*fp32" if name.endswith("_ptr") else "i32")
        return signature


def tf32_passes(precision: str) -> int:
    """TF32 products per float32 product, by the precision of `tl.dot`."""
    return 1 if precision == "tf32" else 3
