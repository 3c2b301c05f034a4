"""Conditions that a user names: datasets of the analysed file, or columns of a CSV file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spinlock_fast.analysis.observations import LABELS, PARAMETERS, Observations
from spinlock_fast.data.csv_table import read_csv
from spinlock_fast.data.feature_source import FeatureSource, column_names, decode_text
from spinlock_fast.data.hdf5_links import ExternalFilePolicy, find_dataset, get_dataset
from spinlock_fast.data.input_files import open_file, reporting_damage
from spinlock_fast.errors import DataError
from spinlock_fast.messages import printable

_MAX_WIDTH = 64  # values of a row of a condition

Values = NDArray[Any]


def add_named_conditions(observed: Observations, source: FeatureSource, names: Sequence[str]) -> None:
    """Adds conditions to the parameters (numbers) and labels (texts) of observations.

    Args:
        observed: changed in place.
        source: the analysed data.
        names: paths of datasets [N] or [N, k] of numbers or texts in the file, with k up to 64; or "FILE.csv:COLUMN"
            with a row for each row of the data.

    Raises:
        DataError: there is no such dataset, file or column, it has another number of rows, or one value only.
    """
    for name in dict.fromkeys(names):
        if name.strip("/") in (PARAMETERS, *LABELS.values()) and source.read_whole(name) is not None:
            continue  # among the conditions already
        file, _, column = name.rpartition(":")
        if file.lower().endswith(".csv") and not _in_file(source, name):
            columns = {f"{Path(file).name}:{column}": _csv_column(Path(file), column)}
        elif name.lower().endswith(".csv") and not _in_file(source, name):
            listed = read_csv(Path(name)).listed_names()
            raise DataError(f"{name}: name a column: {name}:COLUMN, where COLUMN is one of {listed}")
        else:
            columns = _dataset_columns(source, name)
        rows = {len(values) for values in columns.values()}
        if rows != {source.rows}:
            raise DataError(f"{name}: has {rows.pop()} rows, but the features have {source.rows}")
        chosen = {label: values[observed.rows] for label, values in columns.items()}
        varying = {label: values for label, values in chosen.items() if _varies(values)}
        if not varying:
            raise DataError(f"{name}: has one value for all operators: nothing can depend on it")
        constant = [f"{printable(label)} is the same for all operators" for label in chosen if label not in varying]
        observed.notes.extend(constant)
        for label, values in varying.items():
            target: dict[str, Any] = observed.labels if values.dtype.kind == "U" else observed.parameters
            target[printable(label if label not in target else name)] = values


def _dataset_columns(source: FeatureSource, path: str) -> dict[str, Values]:
    """The columns of a dataset by name, as float64 or text; raises DataError."""
    values = source.read_whole(path)
    if values is None:
        policy = ExternalFilePolicy(source.allow_external)
        for file in source.files:
            with open_file(file) as handle, reporting_damage(file, path):
                get_dataset(file, handle, path, policy)  # raises for a file without it, with the nearest path
        raise DataError(f"{source.files[0]}: {path}: no such dataset")
    where = f"{source.files[0]}: {path}"
    if values.dtype.kind not in "OSUfiub" or values.ndim not in (1, 2) or 0 in values.shape[1:]:
        raise DataError(
            f"{where}: a condition is numbers or texts [N] or [N, k], got {values.dtype} {list(values.shape)}"
        )
    if values.ndim == 1:
        return {path: _typed(values)}
    width = values.shape[1]
    if width > _MAX_WIDTH:
        raise DataError(
            f"{where}: has {width} values a row, at most {_MAX_WIDTH} are conditions; name a smaller dataset"
        )
    if width == 1:
        return {path: _typed(values[:, 0])}
    names = column_names(source.files, path, (width,), groups=1) or [str(i) for i in range(width)]
    return {f"{path}[{name}]": _typed(values[:, i]) for i, name in enumerate(names)}


def _typed(values: Values) -> Values:
    if values.dtype.kind in "fiub":
        return values.astype(np.float64)
    return np.array([decode_text(value) for value in values], dtype=str)


def _in_file(source: FeatureSource, path: str) -> bool:
    with open_file(source.files[0]) as handle, reporting_damage(source.files[0], path):
        return find_dataset(source.files[0], handle, path, ExternalFilePolicy(source.allow_external)) is not None


def _csv_column(file: Path, column: str) -> Values:
    """A column as numbers if all of its values are, with NaN for empty ones; else as texts."""
    texts = read_csv(file).column(column)
    try:
        return np.array([float(text) if text else np.nan for text in texts])
    except ValueError:
        return np.array([printable(text) for text in texts], dtype=str)


def _varies(values: Values) -> bool:
    known = values[np.isfinite(values)] if values.dtype.kind == "f" else values
    return len(known) > 0 and (bool((known != known[0]).any()) or len(known) < len(values))
