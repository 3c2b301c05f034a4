"""Text files that list the shards of a data set."""

from __future__ import annotations

from pathlib import Path

import h5py
import helpers
import numpy as np
import pytest

from spinlock_fast.data import HDF5Loader
from spinlock_fast.errors import DataError


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    values = np.arange(30, dtype=np.float32)[:, None]
    parts = enumerate(np.split(values, 3))
    return [helpers.write_arrays(tmp_path / f"shards/s{i}.h5", {"x": part}) for i, part in parts]


def read(path: str | list[str]) -> list[float]:
    return [value for batch in HDF5Loader(path, "x", shuffle=False) for value in batch["x"][:, 0].tolist()]


@pytest.mark.parametrize("form", ["@{}", "{}"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_are_paths_relative_to_the_list(tmp_path: Path, shards: list[Path], form: str, end: str) -> None:
    file = tmp_path / "files.txt"
    file.write_bytes(b"\xef\xbb\xbf" + end.join(["# comment", "shards/s2.h5", "", f"{shards[0]} "]).encode())
    assert read(form.format(file)) == [*range(20, 30), *range(10)]
    assert read([form.format(file), str(shards[1])])[20:] == [*range(10, 20)]


def test_at_sign_takes_any_name(tmp_path: Path, shards: list[Path]) -> None:
    (tmp_path / "list").write_text("shards/s*.h5\n")
    assert read(f"@{tmp_path / 'list'}") == [*range(30)]


def test_names_that_are_not_utf8(tmp_path: Path, shards: list[Path]) -> None:
    name = b"s\xff.h5"
    Path(shards[0]).rename(tmp_path / "shards" / name.decode(errors="surrogateescape"))
    (tmp_path / "files.txt").write_bytes(b"shards/" + name + b"\n")
    assert read(str(tmp_path / "files.txt")) == [*range(10)]


def test_hdf5_file_with_the_suffix_txt_is_read(tmp_path: Path, shards: list[Path]) -> None:
    assert read(str(shards[1].rename(tmp_path / "a.txt"))) == [*range(10, 20)]


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ("shards/s0.h5\nshards/none.h5", ("files.txt: line 2: ", "none.h5: no such file")),
        ("\n\nshards/n*.h5", ("files.txt: line 3: ", "no file matches")),
        ("shards", ("line 1: ", "is a directory")),
        ("# nothing\n", ("lists no paths",)),
        ("@other.txt", ("line 1: ", "cannot name another list")),
        ("shards/s0.h5\nshards/s0.h5", ("lists", "twice")),
        ("a\0b", ("is not a text file",)),
    ],
)
def test_wrong_lists_are_errors(tmp_path: Path, shards: list[Path], content: str, texts: tuple[str, ...]) -> None:
    file = tmp_path / "files.txt"
    file.write_text(content)
    with helpers.raises_one_line(DataError, *texts):
        read(str(file))


def test_missing_list_is_an_error(tmp_path: Path) -> None:
    for name in ("@none.txt", f"@{tmp_path}/none", f"{tmp_path}/none.txt"):
        with helpers.raises_one_line(DataError, "none"):
            read(name)
    with helpers.raises_one_line(DataError, "is not a text file"):
        read(f"@{tmp_path}")


def test_list_that_is_an_hdf5_file_is_an_error(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"] = np.zeros((2, 2))
    with helpers.raises_one_line(DataError, "is not a text file"):
        read(f"@{tmp_path / 'a.h5'}")
