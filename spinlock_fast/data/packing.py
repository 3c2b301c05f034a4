"""Stored numbers that stand for others: netCDF's fill values, scales and offsets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from spinlock_fast.data.files import one_line
from spinlock_fast.errors import DataError

# What netCDF writes where nothing was written, without an attribute that says so. Bytes have no such value: all 256 of
# them are data.
_NETCDF_DEFAULT_FILLS: dict[str, int | float] = {
    "i2": -(2**15) + 1,
    "u2": 2**16 - 1,
    "i4": -(2**31) + 1,
    "u4": 2**32 - 1,
    "i8": -(2**63) + 2,
    "u8": 2**64 - 2,
    "f4": 9.969209968386869e36,
    "f8": 9.969209968386869e36,
}


@dataclass(frozen=True)
class Packing:
    """value = stored * scale + offset, NaN where `stored` is one of `missing` (the CF conventions).

    Args:
        missing: compared with the numbers as they are stored, before scale and offset.
        unsigned: signed integers whose bits are those of unsigned ones (netCDF's `_Unsigned`).
        dtype: of the result.
    """

    missing: tuple[int | float, ...]
    scale: float
    offset: float
    unsigned: bool
    dtype: np.dtype[Any]

    def __call__(self, stored: NDArray[Any]) -> NDArray[Any]:
        """Values of the result's type, of the same shape."""
        if self.unsigned:
            stored = stored.view(stored.dtype.str.replace("i", "u"))
        if self.scale == 1.0 and self.offset == 0.0:
            values = stored.astype(self.dtype)
        else:
            values = (stored.astype(np.float64) * self.scale + self.offset).astype(self.dtype)
        for number in self.missing:
            values[stored == stored.dtype.type(number)] = np.nan
        return values

    def __str__(self) -> str:
        parts = []
        if self.missing:
            parts.append(f"the stored {', '.join(f'{number:.9g}' for number in self.missing)} counts as missing (NaN)")
        if self.scale != 1.0 or self.offset != 0.0:
            parts.append(f"values are stored * {self.scale:.9g} + {self.offset:.9g} (scale_factor, add_offset)")
        if self.unsigned:
            parts.append("integers are unsigned (_Unsigned)")
        return "; ".join(parts)


def read_packing(dataset: h5py.Dataset) -> Packing | None:
    """The packing that the attributes of a dataset of real numbers describe; None where there is none.

    Raises:
        DataError: `scale_factor` or `add_offset` is not one finite number.
    """
    attributes = dataset.attrs
    kind = np.dtype(dataset.dtype.str).newbyteorder("=")
    unsigned = kind.kind == "i" and _text(attributes.get("_Unsigned")).lower() == "true"
    compared = np.dtype(kind.str.replace("i", "u")) if unsigned else kind
    candidates = [
        number
        for name in ("_FillValue", "missing_value")
        if name in attributes
        for number in _numbers(attributes[name])
    ]
    if (default := _netcdf_default_fill(dataset, kind)) is not None:
        candidates.append(default)
    missing = [number for candidate in candidates if (number := _as_stored(candidate, kind, compared)) is not None]
    scale, scale_type = _one_number(dataset, "scale_factor", 1.0)
    offset, offset_type = _one_number(dataset, "add_offset", 0.0)
    if not missing and not unsigned and scale == 1.0 and offset == 0.0:
        return None
    scaled = scale != 1.0 or offset != 0.0
    if unsigned and not missing and not scaled:
        return Packing((), 1.0, 0.0, True, compared)
    if kind.kind == "f":
        dtype = np.result_type(kind, scale_type, offset_type) if scaled else kind
    else:
        small = kind.itemsize <= 2 and {scale_type, offset_type} <= {np.dtype(np.float16), np.dtype(np.float32)}
        dtype = np.dtype(np.float32 if small else np.float64)
    return Packing(tuple(dict.fromkeys(missing)), scale, offset, unsigned, dtype)


def _netcdf_default_fill(dataset: h5py.Dataset, kind: np.dtype[Any]) -> int | float | None:
    """The default fill value of a netCDF variable; None where it has another one, or the file is not netCDF's."""
    default = _NETCDF_DEFAULT_FILLS.get(kind.str[1:])
    if default is None or ("_NCProperties" not in dataset.file.attrs and "_Netcdf4Dimid" not in dataset.attrs):
        return None
    stored = dataset.fillvalue
    return default if stored is not None and bool(stored == np.asarray(default, kind)) else None


def _as_stored(candidate: float | int, kind: np.dtype[Any], compared: np.dtype[Any]) -> int | float | None:
    """The number as the dataset would store it; None where no stored number can equal it, or it is NaN already."""
    if kind.kind == "f":
        with np.errstate(over="ignore"):
            number = float(np.asarray(candidate, np.float64).astype(kind))
        return None if np.isnan(number) or (np.isinf(number) and not np.isinf(candidate)) else number
    if not np.isfinite(candidate) or candidate != int(candidate):
        return None
    whole = int(candidate)
    if compared.kind == "u" and kind.kind == "i" and whole < 0:
        whole += 1 << (8 * kind.itemsize)
    limits = np.iinfo(compared)
    return whole if limits.min <= whole <= limits.max else None


def _numbers(value: Any) -> list[int | float]:
    """Numbers of an attribute, also where they are written as text; others are none that could be stored."""
    found = np.asarray(value)
    if found.dtype.kind in "iu":
        return [int(number) for number in found.ravel()]
    if found.dtype.kind in "fb":
        return [float(number) for number in found.ravel()]
    numbers: list[int | float] = []
    for text in np.ravel(found):
        try:
            numbers.append(float(_text(text)))
        except ValueError:
            continue
    return numbers


def _one_number(dataset: h5py.Dataset, name: str, default: float) -> tuple[float, np.dtype[Any]]:
    if name not in dataset.attrs:
        return default, np.dtype(np.float16)
    value = dataset.attrs[name]
    numbers = _numbers(value)
    if len(numbers) != 1 or np.size(value) != 1 or not np.isfinite(numbers[0]):
        shown = one_line(ValueError(value))
        raise DataError(
            f"{dataset.file.filename}: {dataset.name.lstrip('/')}: {name} is {shown}, expected one finite number"
        )
    found = np.asarray(value).dtype
    return float(numbers[0]), found if found.kind == "f" else np.dtype(np.float64)


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else "" if value is None else str(value)
