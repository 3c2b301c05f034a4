"""Tokens as HDF5, NumPy, CSV and Parquet."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import helpers
import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from spinlock_fast.errors import ConfigError
from spinlock_fast.output import token_files
from spinlock_fast.output.token_files import TokenTable, token_file

TOKENS = np.random.default_rng(0).integers(0, 300, (50, 3))
TOKENS[:, :2] %= 7
TABLE = TokenTable(50, ["a/L0", "=cmd", "b/L0"], [7, 7, 300], "f" * 64)


def write(path: Path, table: TokenTable = TABLE, tokens: NDArray[Any] = TOKENS) -> None:
    write_blocks(path, table, np.array_split(tokens, 4))


def write_blocks(path: Path, table: TokenTable, blocks: Iterable[NDArray[Any]]) -> None:
    with token_file(path, table) as append:
        for block in blocks:
            append(block)


def read(path: Path) -> NDArray[Any]:
    match path.suffix:
        case ".npy":
            found: NDArray[Any] = np.load(path)
        case ".csv":
            found = np.loadtxt(path, np.uint16, delimiter=",", skiprows=1)
        case ".parquet":
            found = np.stack([column.to_numpy() for column in pq.read_table(path).columns], 1)
        case _:
            with h5py.File(path) as file:
                found = file["tokens"][:]
    return found


@pytest.mark.parametrize("name", ["t.h5", "t.hdf5", "t", "t.npy", "t.csv", "t.parquet"])
def test_the_ending_decides_the_format(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_files, "_GROUP_ROWS", 20)
    write(tmp_path / name)
    found = read(tmp_path / name)
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(found, TOKENS)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_small_codebooks_take_one_byte(tmp_path: Path) -> None:
    write(tmp_path / "t.npy", TokenTable(50, ["a", "b"], [7, 256], ""), TOKENS[:, :2])
    assert np.load(tmp_path / "t.npy").dtype == np.uint8


def test_columns_carry_the_names_of_codebooks(tmp_path: Path) -> None:
    write(tmp_path / "t.csv")
    write(tmp_path / "t.parquet")
    assert (tmp_path / "t.csv").read_text().splitlines()[0] == "a/L0,'=cmd,b/L0"  # no formula for a spreadsheet
    schema = pq.read_schema(tmp_path / "t.parquet")
    assert schema.names == ["a/L0", "=cmd", "b/L0"]
    assert schema.metadata == {b"codebook_sizes": b"7,7,300", b"checkpoint_sha256": b"f" * 64}
    assert pq.ParquetFile(tmp_path / "t.parquet").num_row_groups == 1


def test_files_record_the_search(tmp_path: Path) -> None:
    table = replace(TABLE, search={"search": "joint", "sweeps": 3})
    write(tmp_path / "t.h5", table)
    with h5py.File(tmp_path / "t.h5") as file:
        assert (file["tokens"].attrs["search"], file["tokens"].attrs["sweeps"]) == ("joint", 3)
    write(tmp_path / "t.parquet", table)
    assert {b"search": b"joint", b"sweeps": b"3"}.items() <= pq.read_schema(tmp_path / "t.parquet").metadata.items()


def failing() -> Iterator[NDArray[Any]]:
    yield TOKENS[:10]
    raise ZeroDivisionError


@pytest.mark.parametrize("name", ["t.h5", "t.npy", "t.csv", "t.parquet"])
def test_a_failure_leaves_the_earlier_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(b"earlier")
    with pytest.raises(ZeroDivisionError):
        write_blocks(path, TABLE, failing())
    assert path.read_bytes() == b"earlier"
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_files, "parquet_available", lambda: False)
    with helpers.raises_one_line(ConfigError, "t.parquet", "pip install 'spinlock-fast[analysis]'"):
        write(tmp_path / "t.parquet")
    assert not list(tmp_path.iterdir())
