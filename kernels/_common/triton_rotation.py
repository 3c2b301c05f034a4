"""The rotation of the rotation trick for Triton kernels; `rotation.rotate` has the formula."""

from __future__ import annotations

import triton
import triton.language as tl  # noqa: F401 Triton looks for it in the globals of a kernel


@triton.jit
def rotation_transpose(grad, scale, bisector, along_bisector, source, along_target):
    """scale R^T grad = scale (grad - 2 (grad.r) r + 2 (grad.t) s) for tiles [BLOCK_N, BLOCK_D].

    `along_bisector` and `along_target` [BLOCK_N] are 2 (grad.r) and 2 (grad.t), divided by what normalises `bisector`
    and `source` where these are not of unit length.
    """
    return scale[:, None] * (grad - along_bisector[:, None] * bisector + along_target[:, None] * source)
