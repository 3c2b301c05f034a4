"""Error messages for files that cannot be opened and for invalid paths."""

from __future__ import annotations

import errno
import io
import logging
import os
from pathlib import Path
from typing import Any

import h5py
import helpers
import numpy as np
import pytest

from spinlock_fast.data import HDF5Loader, input_files
from spinlock_fast.data.feature_source import FeatureSource
from spinlock_fast.errors import ConfigError, DataError

ESCAPE = "\x1b[31mred\x1b[0m\x07"


@pytest.fixture
def file(tmp_path: Path) -> str:
    return str(helpers.write_arrays(tmp_path / "a.h5", {"x": np.zeros((20, 3), np.float32)}))


def test_open_file_as_path_is_an_error(file: str) -> None:
    with h5py.File(file) as handle:
        for given in (handle, handle["x"], [handle]):
            with helpers.raises_one_line(ConfigError, "an open h5py", "pass its path", file):
                HDF5Loader(given, "x")  # type: ignore[arg-type]


@pytest.mark.parametrize("given", [None, 3, io.BytesIO(), [None]])
def test_other_types_of_paths_are_errors(given: Any) -> None:
    with helpers.raises_one_line(ConfigError, "paths:", "expected a path"):
        HDF5Loader(given, "x")


def test_bytes_path_is_accepted(file: str) -> None:
    assert HDF5Loader(os.fsencode(file), "x").rows == 20  # type: ignore[arg-type]


def test_path_with_nul_is_an_error() -> None:
    with helpers.raises_one_line(DataError, "NUL"):
        HDF5Loader("a\0.h5", "x")


def fail_locks(monkeypatch: pytest.MonkeyPatch, number: int, unlocked: bool) -> None:
    """Simulates a file system whose locks fail with an errno; opening without locks succeeds if `unlocked`."""
    original = h5py.File

    def open_with_lock(name: Any, mode: str = "r", locking: Any = None, **options: Any) -> h5py.File:
        if locking is False and unlocked:
            return original(name, mode, **options)
        raise OSError(
            f"Unable to synchronously open file (unable to lock file, errno = {number}, error message = '...')"
        )

    monkeypatch.setattr(input_files.h5py, "File", open_with_lock)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EACCES])
def test_file_system_without_locks_is_logged_once(
    file: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    monkeypatch.setattr(input_files, "_logged_devices", set())
    fail_locks(monkeypatch, number, unlocked=True)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            input_files.open_file(Path(file)).close()
    (message,) = caplog.messages
    assert "does not support locks" in message
    assert os.strerror(number) in message
    assert "HDF5_USE_FILE_LOCKING" in message


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EIO])
def test_required_locks_that_fail_are_errors(file: str, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    fail_locks(monkeypatch, number, unlocked=False)
    with helpers.raises_one_line(DataError, file, os.strerror(number), "HDF5_USE_FILE_LOCKING"):
        input_files.open_file(Path(file))


def test_lock_of_a_writer_is_an_error(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_locks(monkeypatch, errno.EAGAIN, unlocked=True)
    with helpers.raises_one_line(DataError, file, "another program is writing to it"):
        input_files.open_file(Path(file))


def test_escape_sequences_in_names_are_escaped(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset(ESCAPE, data=np.zeros((2, 2), "S3"))
        file["link"] = h5py.SoftLink(f"/{ESCAPE}none")
        file["outside"] = h5py.ExternalLink(f"{ESCAPE}.h5", f"/{ESCAPE}")
        file.create_dataset("x", data=np.zeros((4, 2), np.float32)).attrs["feature_names"] = [ESCAPE, "b"]
    for name in (ESCAPE, "link", "outside", ESCAPE + "x", "zzz"):
        with pytest.raises(DataError) as caught:
            HDF5Loader(str(path), name)
        assert str(caught.value).isprintable(), name
    with FeatureSource(str(path), {"family": "x"}) as source:
        assert source.feature_names("family") == [r"\x1b[31mred\x1b[0m\x07", "b"]
