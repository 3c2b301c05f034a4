"""Conversion of arrays given by callers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spinlock_fast.errors import DataError


def masked_to_nan(array: Any) -> NDArray[Any]:
    """Converts to a NumPy array; masked elements of a `numpy.ma.MaskedArray` become NaN.

    `np.asarray` would return the numbers under the mask, often a fill value such as 1e20. Integers become float64 if
    an element is masked.
    """
    if not isinstance(array, np.ma.MaskedArray):
        return np.asarray(array)
    values: NDArray[Any] = np.ma.getdata(array)
    mask = np.ma.getmaskarray(array)
    if values.dtype.kind not in "fiub" or not mask.any():
        return values
    if values.dtype.kind != "f":
        values = values.astype(np.float64)
    return np.where(mask, np.asarray(np.nan, values.dtype), values)


def to_real_tensor(array: Any, name: str) -> Tensor:
    """Converts an array of real numbers to a detached tensor, masked elements to NaN; raises DataError otherwise."""
    if isinstance(array, Tensor):
        if array.is_complex():
            raise DataError(f"{name}: expected real numbers, got {array.dtype}")
        return array.detach()
    try:
        values = masked_to_nan(array)
    except ValueError:  # lists of different lengths
        raise DataError(f"{name}: expected numbers in rows of one length") from None
    if values.dtype.kind not in "fiub":
        raise DataError(f"{name}: expected real numbers, got {values.dtype}")
    if values.dtype.kind == "f" and values.dtype.itemsize > 8:
        values = values.astype(np.float64)  # PyTorch has no wider floating-point type
    native = np.asarray(values, values.dtype.newbyteorder("="), order="C")
    return torch.from_numpy(native if native.flags.writeable else native.copy())


def to_token_tensor(array: Any, codebooks: int) -> Tensor:
    """Converts tokens [N, codebooks] of any real dtype to an int64 tensor.

    Raises:
        DataError: the tokens have another shape, or one is not a whole number.
    """
    given = to_real_tensor(array, "tokens")
    if given.layout is not torch.strided:
        raise DataError(f"tokens: expected a dense tensor, got {given.layout}")
    if given.ndim != 2 or given.shape[1] != codebooks:
        raise DataError(f"tokens: expected [N, {codebooks}], got {list(given.shape)}")
    index = given.to(torch.int64)
    if given.is_floating_point() and not torch.equal(index.to(given.dtype), given):
        raise DataError("tokens: expected whole numbers")
    return index
