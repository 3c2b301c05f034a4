"""A kernel as it is launched at one shape: what the report compiles ahead of time and counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from spinlock_fast.kernels._common.layout import CodebookLayout

# The 33 codebooks of the 100K run, and its batch.
_CODES = "15 7 6 28 14 7 24 13 6 24 12 6 32 17 8 32 16 8 28 15 7 20 11 6 24 12 6 24 13 6 20 11 6"
_DIMS = "4 4 8 8 16 24 8 16 24 8 16 20 16 32 48 16 28 44 12 20 32 8 12 16 8 12 20 8 16 24 8 12 16"
SEED = CodebookLayout.of([int(k) for k in _CODES.split()], [int(d) for d in _DIMS.split()])
ROWS = 512
FEATURES = (4, 16, 15, 13, 32, 28, 20, 10, 11, 14, 9)  # of its categories, each with three codebooks

# Types of kernel parameters by name; a name that is not here and ends in _ptr is a float32 pointer.
_TYPES = {
    "mask_ptr": "*i1",
    "table_ptr": "*i32",
    "codes_ptr": "*i64",
    "code_ptr": "*i32",
    "order_ptr": "*i64",
    "zero_ptr": "*i32",
    "seed_ptr": "*i64",
    "item_code_ptr": "*i64",
    "item_first_ptr": "*i64",
    "item_last_ptr": "*i64",
    "codebook_of_code_ptr": "*i64",
    "first_entries_ptr": "*i64",
    "moments_ptr": "*fp64",
    "rounding": "fp32",
    "x_rounding": "fp32",
    "splits_ptr": "*i32",
    "decay": "fp32",
    "one_minus_decay": "fp32",
    "epsilon": "fp32",
    "idle_share": "fp32",
    "factor": "fp32",
    "mixing": "fp32",
    "noise": "fp32",
    "pre_factor": "fp32",
    "post_factor": "fp32",
    "pre_share": "fp32",
    "scale": "fp32",
    "eps": "fp32",
    "part_eps": "fp32",
}


@dataclass(frozen=True)
class Specimen:
    """One launch.

    Args:
        kernel: the compiled function.
        shape: where it is launched, in words.
        constants: its constexpr parameters.
        num_bytes: least traffic with device memory: inputs once, outputs once.
        float_ops: multiplications and additions outside of matrix products.
        dot_ops: those of matrix products, each product of two float32 numbers counted once.
        passes: TF32 products for one of those: three where it is accurate to float32.
        types: parameters whose type is not the usual one.
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
    def launched(
        cls,
        kernel: Any,
        shape: str,
        options: dict[str, Any],
        num_bytes: int,
        float_ops: int,
        dot_ops: int,
        passes: int = 3,
        types: dict[str, Any] | None = None,
    ) -> Specimen:
        """Of the keyword arguments of a launch: constexpr parameters, num_warps and num_stages."""
        constants = {name: value for name, value in options.items() if name.isupper()}
        warps, stages = options["num_warps"], options["num_stages"]
        return cls(kernel, shape, constants, num_bytes, float_ops, dot_ops, warps, stages, passes, types)

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)

    def signature(self) -> dict[str, Any]:
        """The type of every parameter, as Triton's compiler takes it."""
        chosen = {**_TYPES, **(self.types or {})}
        found = {}
        for name in self.kernel.arg_names:
            if name in self.constants:
                found[name] = "constexpr"
            else:
                found[name] = chosen.get(name, "*fp32" if name.endswith("_ptr") else "i32")
        return found
