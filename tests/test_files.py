import json
import os
import resource
import stat

import h5py
import helpers
import numpy as np
import pytest
import torch

from spinlock_fast.errors import OutputError
from spinlock_fast.files import check_writable, replacing, write_atomically, write_json, write_text


def names(directory):
    return sorted(entry.name for entry in directory.iterdir())


def test_a_file_is_written_and_nothing_else(tmp_path):
    write_text(tmp_path / "a.txt", "hällo\n")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "hällo\n"
    assert names(tmp_path) == ["a.txt"]


def test_directories_are_made(tmp_path):
    write_text(tmp_path / "b" / "c" / "a.txt", "x")
    assert (tmp_path / "b" / "c" / "a.txt").exists()


def test_an_old_file_is_replaced(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old and longer")
    write_text(path, "new")
    assert path.read_text() == "new"


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt, ValueError])
def test_the_old_file_stays_when_writing_fails(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write(temporary):
        temporary.write_text("half")
        raise error

    with pytest.raises(error):
        write_atomically(path, write)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_full_disk_is_an_output_error_and_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write(temporary):
        raise OSError(28, "No space left on device")

    with helpers.raises_one_line(OutputError, "a.txt", "No space left"):
        write_atomically(path, write)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


@pytest.fixture
def _files_of_at_most_64_kb():
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def write_hdf5(path):
    with h5py.File(path, "w") as file:
        file["x"] = np.zeros(100_000)


@pytest.mark.usefixtures("_files_of_at_most_64_kb")
@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(bytes(10**6)),
        lambda path: np.savez(path, x=np.zeros(100_000)),
        lambda path: torch.save(torch.zeros(100_000), path),
        write_hdf5,
    ],
    ids=["bytes", "numpy", "torch", "hdf5"],
)
def test_a_file_that_does_not_fit_is_an_output_error(tmp_path, write):
    with helpers.raises_one_line(OutputError, "a.npz", "cannot be written"):
        write_atomically(tmp_path / "a.npz", write)
    assert names(tmp_path) == []


def test_readers_see_the_old_file_while_the_new_is_written(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.parent == path.parent
    assert path.read_text() == "new"


def test_the_temporary_name_keeps_the_suffix(tmp_path):
    with replacing(tmp_path / "a.npz") as temporary:
        assert temporary.suffix == ".npz"


def test_contents_reach_the_disk_before_the_name(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: order.append("fsync") or fsync(fd))
    monkeypatch.setattr(os, "replace", lambda a, b: order.append("replace") or replace(a, b))
    write_text(tmp_path / "a.txt", "x")
    assert order[:2] == ["fsync", "replace"]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_permissions_follow_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_text(tmp_path / "a.txt", "x")
        assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o666 & ~umask
        assert os.umask(umask) == umask
    finally:
        os.umask(before)


@pytest.mark.parametrize("below", ["a.txt", "b/a.txt"])
def test_a_directory_that_cannot_be_made_is_an_output_error(tmp_path, below):
    (tmp_path / "file").write_text("x")
    with helpers.raises_one_line(OutputError, str(tmp_path / "file"), "cannot be written"):
        write_text(tmp_path / "file" / below, "x")
    assert (tmp_path / "file").read_text() == "x"


def test_a_directory_in_the_place_of_the_file_is_an_output_error(tmp_path):
    (tmp_path / "a.txt").mkdir()
    with helpers.raises_one_line(OutputError, "a.txt"):
        write_text(tmp_path / "a.txt", "x")
    assert names(tmp_path) == ["a.txt"]


def test_json_makes_the_round_trip(tmp_path):
    value = {"b": [1, 2.5, None], "a": {"ü": True}}
    write_json(tmp_path / "a.json", value)
    again = json.loads((tmp_path / "a.json").read_text())
    assert again == value
    assert list(again) == ["b", "a"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [-float("inf")]}])
def test_numbers_that_json_does_not_have_are_refused(tmp_path, value):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", value)
    assert names(tmp_path) == []


def test_checking_a_directory_leaves_nothing_in_it(tmp_path):
    check_writable(tmp_path / "new" / "deep")
    assert names(tmp_path) == []
    (tmp_path / "old").mkdir()
    check_writable(tmp_path / "old")
    assert names(tmp_path) == ["old"]


def test_checking_a_directory_below_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    with helpers.raises_one_line(OutputError, "file"):
        check_writable(tmp_path / "file" / "dir")
