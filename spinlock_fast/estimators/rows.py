"""Checks of the data that callers give to a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spinlock_fast.data.feature_source import FeatureSource
from spinlock_fast.data.input_arrays import masked_to_nan, to_real_tensor
from spinlock_fast.errors import DataError
from spinlock_fast.features.differentiable import raw_columns
from spinlock_fast.features.encode import FamilyEncoder
from spinlock_fast.messages import one_line, shown


def is_path(data: Any) -> TypeGuard[str | Path | list[str]]:
    """Whether data are a path, a glob, or a list of those."""
    return isinstance(data, (str, Path)) or (
        isinstance(data, list) and bool(data) and all(isinstance(part, (str, Path)) for part in data)
    )


def is_one_array(data: Any) -> bool:
    """Whether data are rows of one family, not {family: array} or a path."""
    return not is_path(data) and (not isinstance(data, Mapping) or hasattr(data, "toarray"))


def as_rows(data: Any, name: str = "X") -> Any:
    """Rows [N, D] or [N, T, D] of numbers: a torch tensor as it is, else a numpy array; raises DataError."""
    if hasattr(data, "toarray"):
        raise DataError(f"{name}: sparse matrices are not supported; .toarray() makes a dense one")
    rows: Any
    if isinstance(data, Tensor):
        if data.layout != torch.strided or data.is_meta:
            kind = "without values" if data.is_meta else "that are sparse"
            raise DataError(f"{name}: tensors {kind} are not supported; .to_dense() makes a sparse one dense")
        rows = data
    else:
        try:
            rows = masked_to_nan(data)
            if rows.dtype == object:
                rows = _frame_values(data, name) if _is_frame(data) else rows.astype(np.float64)
        except (TypeError, ValueError) as error:
            raise DataError(f"{name} must hold numbers in rows of one length: {one_line(error)}") from None
        if rows.dtype.kind == "c":
            raise DataError(f"Complex data not supported: {name} is {rows.dtype}")
        if rows.dtype.kind not in "fiub":
            raise DataError(f"{name} must hold numbers, got {rows.dtype}")
    if rows.ndim not in (2, 3):
        advice = ""
        if rows.ndim == 1:
            advice = "; Reshape your data: .reshape(-1, 1) for one feature, .reshape(1, -1) for one row"
        elif rows.ndim > 3:
            advice = "; of fields, spinlock_fast.descriptors.describe makes such arrays"
        raise DataError(f"{name} must be [N, D] or [N, T, D], got {list(rows.shape)}{advice}")
    if 0 in rows.shape[1:]:
        raise DataError(f"{name}: 0 feature(s) (shape={tuple(rows.shape)}) while a minimum of 1 is required.")
    return rows


def _is_frame(data: Any) -> bool:
    """Whether data are a data frame of pandas."""
    return hasattr(data, "convert_dtypes") and getattr(data, "ndim", 0) == 2


def _frame_values(data: Any, name: str) -> NDArray[np.float64]:
    """The values of a data frame, missing ones as NaN; raises DataError naming the first column without numbers."""
    for column, kind in data.dtypes.items():
        if str(kind) == "category" or getattr(kind, "kind", "O") not in "fiubO":
            raise DataError(f"{name}: column {shown(column)} must hold numbers, got {kind}")
    values: NDArray[np.float64] = data.to_numpy(np.float64, na_value=np.nan)
    return values


def column_names(data: Any) -> Any:
    """The columns of a data frame, if all are texts."""
    columns = list(getattr(data, "columns", []))
    return np.array(columns, dtype=object) if columns and all(isinstance(name, str) for name in columns) else None


def named_families(data: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """Families as arrays, see `as_rows`, and names of their columns: of data frames, and of `descriptors.Families`."""
    arrays = {str(name): as_rows(array, f"family {name!r}") for name, array in data.items()}
    names = {str(name): list(columns) for name, columns in getattr(data, "names", {}).items()}
    for name, array in data.items():
        if (columns := column_names(array)) is not None:
            names[str(name)] = columns.tolist()
    return arrays, names


def check_columns(family: FamilyEncoder, names: Sequence[str] | None, where: str) -> None:
    """Raises DataError if named columns are not those that a family was trained on, in the same order."""
    expected = None if family.column_names is None else raw_columns(family)
    unnamed = [f"{family.name}_{i}" for i in range(family.row_shape[-1])]
    if names is None or expected is None or expected in (list(names), unnamed) or len(names) != len(expected):
        return  # other numbers of columns are reported as shapes
    found, trained = next((a, b) for a, b in zip(names, expected, strict=True) if a != b)
    raise DataError(
        f"{where}: the columns differ from those of training, in name or order: "
        f"{shown(found)} instead of {shown(trained)}"
    )


def check_source(families: Sequence[FamilyEncoder], source: FeatureSource) -> None:
    """Raises DataError if the rows of a source have other shapes or columns than those of training."""
    for family in families:
        info = source.datasets[family.name]
        where = f"{source.files[0]}: {info.path}" if source.files else f"family {family.name!r}"
        if not family.accepts(info.row_shape):
            raise DataError(
                f"{where}: rows of shape {info.row_shape}, but family {family.name!r} of the checkpoint was trained on "
                f"{family.row_shape}"
            )
        names_of = source.feature_names if len(info.row_shape) == 1 else source.series_names
        check_columns(family, names_of(family.name), where)


def named_rows(raw: Mapping[str, Any], families: Sequence[FamilyEncoder]) -> dict[str, Any]:
    """{family: array}, see `as_rows`, of which named columns are checked; raises DataError."""
    arrays, names = named_families(raw)
    for family in families:
        check_columns(family, names.get(family.name), f"family {family.name!r}")
    return arrays


def families_of(raw: Any, families: Sequence[FamilyEncoder], feature_names: Sequence[str]) -> Mapping[str, Any]:
    """{family: array} of an argument of `Tokenizer.encode`; raises DataError naming the expected input."""
    if isinstance(raw, Mapping):
        return named_rows(raw, families)
    expected = ", ".join(f'"{f.name}": {shape_text(f.row_shape)}' for f in families)
    if not isinstance(raw, (np.ndarray, Tensor)):
        raise DataError(f"expected raw families {{{expected}}} or the path of an HDF5 file, got {type(raw).__name__}")
    if len(families) > 1:
        hint = ""
        if raw.ndim == 2 and raw.shape[1] == len(feature_names):
            hint = "; for cleaned, normalised features: tokenizer.model.get_tokens(x)"
        raise DataError(
            f"expected raw families {{{expected}}} or the path of an HDF5 file, "
            f"got one array of shape {list(raw.shape)}{hint}"
        )
    return named_rows({families[0].name: raw}, families)


def family_tensors(raw: Mapping[str, Any], families: Sequence[FamilyEncoder]) -> dict[str, Tensor]:
    """Raw families as tensors with equal numbers of rows; raises DataError."""
    names = [family.name for family in families]
    if set(raw) != set(names):
        raise DataError(f"expected the families {', '.join(names)}, got {', '.join(map(str, raw)) or 'none'}")
    arrays = {name: to_real_tensor(raw[name], f"family {name!r}") for name in names}
    for family in families:
        if arrays[family.name].ndim == 0:
            raise DataError(f"family {family.name!r}: expected {shape_text(family.row_shape)}, got one number")
    if len({array.shape[0] for array in arrays.values()}) > 1:
        raise DataError(
            "families differ in rows: " + ", ".join(f"{name} has {array.shape[0]}" for name, array in arrays.items())
        )
    return arrays


def shape_text(row_shape: tuple[int, ...]) -> str:
    """Shape of an array of rows, in messages."""
    return f"[N, {', '.join(str(size) if size >= 0 else 'any' for size in row_shape)}]"
