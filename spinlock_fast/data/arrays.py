"""Arrays as callers give them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spinlock_fast.errors import DataError


def without_mask(array: Any) -> NDArray[Any]:
    """An array whose missing values are NaN, where they were masked ones of a `numpy.ma.MaskedArray`.

    NumPy gives the numbers under a mask (often a fill value such as 1e20) when it converts such an array. Integers
    become float64 where one is masked.
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


def real_numbers(array: Any, name: str) -> Tensor:
    """An array of real numbers as a tensor, masked values as NaN; raises DataError for others."""
    if isinstance(array, Tensor):
        if array.is_complex():
            raise DataError(f"{name}: expected real numbers, got {array.dtype}")
        return array.detach()
    try:
        values = without_mask(array)
    except ValueError:  # lists of different lengths
        raise DataError(f"{name}: expected numbers in rows of one length") from None
    if values.dtype.kind not in "fiub":
        raise DataError(f"{name}: expected real numbers, got {values.dtype}")
    if values.dtype.kind == "f" and values.dtype.itemsize > 8:
        values = values.astype(np.float64)  # PyTorch has none of more precision
    native = np.asarray(values, values.dtype.newbyteorder("="), order="C")
    return torch.from_numpy(native if native.flags.writeable else native.copy())
