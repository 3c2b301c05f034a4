"""The rotation of the rotation trick (Fifty et al., arXiv 2410.06424, section 4.2)."""

from __future__ import annotations

from torch import Tensor


def rotate(v: Tensor, scale: Tensor, source: Tensor, target: Tensor, bisector: Tensor) -> Tensor:
    """scale R v with R = 1 - 2 r r^T + 2 t s^T, the rotation that carries direction s to direction t.

    R^T is the rotation with `source` and `target` exchanged.

    Args:
        v: [..., D].
        scale: [..., 1].
        source: [..., D] s, unit length.
        target: [..., D] t, unit length.
        bisector: [..., D] r = (s + t) / |s + t|.
    """
    along_bisector = (v * bisector).sum(-1, keepdim=True)
    along_source = (v * source).sum(-1, keepdim=True)
    rotated: Tensor = scale * (v - 2.0 * along_bisector * bisector + 2.0 * along_source * target)
    return rotated
