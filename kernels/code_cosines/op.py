"""The mean squared cosine: choice of the implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from spinlock_fast.kernels._common.higher_order import in_transform
from spinlock_fast.kernels._common.layout import CodebookLayout
from spinlock_fast.kernels._common.native import address, library, native_supports
from spinlock_fast.kernels.code_cosines import reference


def mean_squared_cosine(codebook: Tensor, layout: CodebookLayout) -> Tensor:
    """Mean over codebooks of the mean squared cosine between distinct codes; a scalar.

    Native where the codes have no gradient.

    Args:
        codebook: [sum K D] code vectors.
        layout: sizes of the codebooks; one of a single code counts as 0.
    """
    constant = not (codebook.requires_grad and torch.is_grad_enabled())
    if constant and codebook.is_contiguous() and not in_transform() and native_supports(codebook):
        sizes = list(layout.num_codes), list(layout.dims)
        return codebook.new_tensor(library.code_cosines(address(codebook), *sizes, torch.get_num_threads()))
    return reference.mean_squared_cosine(codebook, layout)
