"""Tables as dicts of columns, and their CSV and Parquet files."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from spinlock_fast.errors import ConfigError
from spinlock_fast.messages import csv_text
from spinlock_fast.output.atomic_files import write_atomically
from spinlock_fast.output.token_files import parquet_available

Table = dict[str, NDArray[Any]]

_ROWS_AT_ONCE = 50_000


def select(table: Table, rows: NDArray[Any]) -> Table:
    """Some rows of a table."""
    return {name: column[rows] for name, column in table.items()}


def length(table: Table) -> int:
    """Number of rows of a table."""
    return len(next(iter(table.values())))


def write_tables(tables: Mapping[str, Table], directory: Path, formats: tuple[str, ...]) -> list[Path]:
    """Writes <name>.csv and <name>.parquet of every table, each atomically.

    Raises:
        ConfigError: Parquet is asked for without pyarrow.
        OutputError: a file cannot be written.
    """
    if "parquet" in formats and not parquet_available():
        raise ConfigError("Parquet files need pyarrow: pip install 'spinlock-fast[analysis]'")
    written = []
    for name, table in tables.items():
        for suffix, write in (("csv", _write_csv), ("parquet", _write_parquet)):
            if suffix in formats:
                path = directory / f"{name}.{suffix}"
                write_atomically(path, partial(write, table))
                written.append(path)
    return written


def _write_csv(table: Table, path: Path) -> None:
    """RFC 4180 with a header, six significant digits, empty fields for NaN, and no text that is a formula."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(map(csv_text, table))
        for start in range(0, length(table), _ROWS_AT_ONCE):
            block = [_texts(column[start : start + _ROWS_AT_ONCE]) for column in table.values()]
            writer.writerows(zip(*block, strict=True))


def _texts(column: NDArray[Any]) -> list[Any]:
    if column.dtype.kind != "f":
        values: list[Any] = column.tolist()
        return [csv_text(value) if isinstance(value, str) else value for value in values]
    return ["" if value != value else f"{value:.6g}" for value in column.tolist()]


def _write_parquet(table: Table, path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {}
    for name, column in table.items():
        if column.dtype.kind == "U":
            # Few distinct texts in many rows.
            columns[name] = pa.array(column.tolist(), pa.string()).dictionary_encode()
        else:
            columns[name] = pa.array(column, from_pandas=True)
    pq.write_table(pa.table(columns), path)
