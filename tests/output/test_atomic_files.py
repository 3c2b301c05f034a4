import json
import os
import resource
import socket
import stat
import subprocess
import sys
import threading

import h5py
import helpers
import numpy as np
import pytest
import torch

from spinlock_fast.errors import OutputError
from spinlock_fast.output.atomic_files import (
    check_regular,
    check_writable,
    create_temporary,
    replacing,
    write_atomically,
    write_json,
    write_text,
)


def names(directory):
    return sorted(entry.name for entry in directory.iterdir())


def test_write_text_leaves_only_the_file(tmp_path):
    write_text(tmp_path / "a.txt", "hällo\n")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "hällo\n"
    assert names(tmp_path) == ["a.txt"]


def test_missing_directories_are_created(tmp_path):
    write_text(tmp_path / "b" / "c" / "a.txt", "x")
    assert (tmp_path / "b" / "c" / "a.txt").exists()


def test_existing_file_is_replaced(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old and longer")
    write_text(path, "new")
    assert path.read_text() == "new"


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt, ValueError])
def test_existing_file_is_kept_if_writing_fails(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write(temporary):
        temporary.write_text("half")
        raise error

    with pytest.raises(error):
        write_atomically(path, write)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_full_disk_is_an_output_error_and_keeps_the_file(tmp_path):
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
def test_file_too_large_is_an_output_error(tmp_path, write):
    with helpers.raises_one_line(OutputError, "a.npz", "cannot be written"):
        write_atomically(tmp_path / "a.npz", write)
    assert names(tmp_path) == []


def test_readers_see_the_old_file_during_writing(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.parent == path.parent
    assert path.read_text() == "new"


def test_temporary_name_keeps_the_suffix(tmp_path):
    with replacing(tmp_path / "a.npz") as temporary:
        assert temporary.suffix == ".npz"


def test_contents_are_flushed_before_the_rename(tmp_path, monkeypatch):
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
def test_directory_that_cannot_be_created_is_an_output_error(tmp_path, below):
    (tmp_path / "file").write_text("x")
    with helpers.raises_one_line(OutputError, str(tmp_path / "file"), "cannot be written"):
        write_text(tmp_path / "file" / below, "x")
    assert (tmp_path / "file").read_text() == "x"


def test_directory_in_place_of_the_file_is_an_output_error(tmp_path):
    (tmp_path / "a.txt").mkdir()
    with helpers.raises_one_line(OutputError, "a.txt"):
        write_text(tmp_path / "a.txt", "x")
    assert names(tmp_path) == ["a.txt"]


def test_json_round_trip(tmp_path):
    value = {"b": [1, 2.5, None], "a": {"ü": True}}
    write_json(tmp_path / "a.json", value)
    again = json.loads((tmp_path / "a.json").read_text())
    assert again == value
    assert list(again) == ["b", "a"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [-float("inf")]}])
def test_nan_and_inf_in_json_are_errors(tmp_path, value):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", value)
    assert names(tmp_path) == []


def test_check_writable_leaves_nothing_behind(tmp_path):
    check_writable(tmp_path / "new" / "deep")
    assert names(tmp_path) == []
    (tmp_path / "old").mkdir()
    check_writable(tmp_path / "old")
    assert names(tmp_path) == ["old"]


def test_check_writable_below_a_file_is_an_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with helpers.raises_one_line(OutputError, "file"):
        check_writable(tmp_path / "file" / "dir")


def test_fifo_is_written_to(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    read = []
    reader = threading.Thread(target=lambda: read.append(path.read_bytes()), daemon=True)
    reader.start()
    write_text(path, "through")
    reader.join(10)
    assert read == [b"through"]
    assert stat.S_ISFIFO(path.stat().st_mode)
    assert names(tmp_path) == ["pipe"]


def test_character_device_is_written_to(tmp_path):
    path = tmp_path / "null"
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("making a device needs root")
    write_json(path, {"a": 1})
    write_atomically(path, write_hdf5)
    assert stat.S_ISCHR(path.stat().st_mode)
    assert names(tmp_path) == ["null"]


def test_socket_is_an_output_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # socket paths are limited in length
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
        with helpers.raises_one_line(OutputError, "socket"):
            write_text(tmp_path / "socket", "x")
        assert stat.S_ISSOCK((tmp_path / "socket").stat().st_mode)


@pytest.mark.parametrize("there", [True, False])
def test_target_of_a_link_is_replaced(tmp_path, there):
    (tmp_path / "elsewhere").mkdir()
    target = tmp_path / "elsewhere" / "b.txt"
    if there:
        target.write_text("old")
    (tmp_path / "a.txt").symlink_to("elsewhere/b.txt")
    (tmp_path / "again.txt").symlink_to(tmp_path / "a.txt")
    write_text(tmp_path / "again.txt", "new")
    assert target.read_text() == "new"
    assert (tmp_path / "a.txt").is_symlink()
    assert names(tmp_path / "elsewhere") == ["b.txt"]


def test_cycle_of_links_is_an_output_error(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with helpers.raises_one_line(OutputError, "cannot be written"):
        write_text(tmp_path / "a", "x")


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "link"])
@pytest.mark.parametrize("kind", ["pipe", "file"])
def test_standard_output_is_written_to(tmp_path, name, kind):
    if name == "link":
        (tmp_path / "link").symlink_to("/dev/stdout")
        name = str(tmp_path / "link")
    script = (
        "from pathlib import Path; from spinlock_fast.output.atomic_files import write_text; "
        f"write_text(Path({name!r}), 'first '); print('second')"
    )
    with open(tmp_path / "out.txt", "w") as file:
        stdout = subprocess.PIPE if kind == "pipe" else file
        done = subprocess.run([sys.executable, "-c", script], stdout=stdout, text=True, check=True)
    assert (done.stdout if kind == "pipe" else (tmp_path / "out.txt").read_text()) == "first second\n"


def test_check_regular_rejects_other_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for name, words in (("pipe", "not a regular file"), ("link", "not a regular file"), (".", "is a directory")):
        with helpers.raises_one_line(OutputError, words):
            check_regular(tmp_path / name)
    check_regular(tmp_path / "new")
    (tmp_path / "file").touch()
    check_regular(tmp_path / "file")


@pytest.mark.parametrize("path", ["a\0b", "x" * 300, "/".join(["y" * 200] * 40)])
def test_invalid_names_are_output_errors(tmp_path, path):
    with helpers.raises_one_line(OutputError, "cannot be written"):
        write_text(tmp_path / path, "x")


def test_longest_file_name_is_accepted(tmp_path):
    for name in ("x" * 255, "é" * 127, "z" * 250 + ".json"):
        write_text(tmp_path / name, "x")
        assert (tmp_path / name).read_text() == "x"


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444, 0o755])
def test_replaced_file_keeps_its_mode(tmp_path, mode):
    path = tmp_path / "a.txt"
    path.write_text("old")
    path.chmod(mode)
    with replacing(path) as temporary:
        assert stat.S_IMODE(temporary.stat().st_mode) & 0o077 == 0  # not readable by others during writing
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_umask_is_not_changed(tmp_path, monkeypatch):
    """The umask is shared by all threads of the process."""

    def refuse(mask):
        raise AssertionError("changes the umask")

    monkeypatch.setattr(os, "umask", refuse)
    write_text(tmp_path / "a.txt", "x")


def test_concurrent_threads_write_files_of_equal_mode(tmp_path):
    before = os.umask(0o027)
    try:

        def work(number):
            for i in range(50):
                write_text(tmp_path / f"{number}-{i}", "x")

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o640}
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)


def test_temporary_files_of_killed_processes_are_removed(tmp_path):
    path = tmp_path / "a.txt"
    script = (
        "import os; from pathlib import Path; from spinlock_fast.output.atomic_files import replacing\n"
        f"with replacing(Path({str(path)!r})) as temporary: temporary.write_text('half'); os._exit(9)"
    )
    for _ in range(2):
        subprocess.run([sys.executable, "-c", script], check=False)
    assert len(names(tmp_path)) == 1  # the second removed the file of the first
    own = create_temporary(path)  # of a running process
    (tmp_path / ".a.txt.backup").write_text("the user's")
    (tmp_path / f".ba.txt.{'0' * 8}-1-{'0' * 8}.txt").write_text("of another file")
    write_text(path, "whole")
    assert names(tmp_path) == sorted(["a.txt", own.name, ".a.txt.backup", f".ba.txt.{'0' * 8}-1-{'0' * 8}.txt"])
