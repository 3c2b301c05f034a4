"""Values stored in other files: links, virtual datasets and external raw files."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import helpers
import numpy as np
import pytest
import torch
from hdf5_layouts import NOT_NATIVE

from spinlock_fast.data import HDF5Loader
from spinlock_fast.data.feature_source import FeatureSource
from spinlock_fast.errors import DataError

X = np.arange(60, dtype=np.float32).reshape(20, 3)
LAYOUTS = [{}, {"chunks": (4, 3), "compression": "gzip"}, {"chunks": (4, 3), **NOT_NATIVE}]


def rows(file: Path, path: str, **options: Any) -> np.ndarray[Any, Any]:
    loader = HDF5Loader(str(file), path, batch_size=7, shuffle=False, num_threads=1, **options)
    return torch.cat([batch[path] for batch in loader]).numpy()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """a.h5 links to sub/b.h5, which links to sub/c.h5; the linking files hold other values under the same path."""
    (tmp_path / "sub").mkdir()
    for name in ("a.h5", "sub/b.h5"):
        with h5py.File(tmp_path / name, "w") as file:
            for i, layout in enumerate(LAYOUTS):
                file.create_dataset(f"decoy/x{i}", data=-X, **layout)
                file.create_dataset(f"x{i}", data=-X, **layout)
    with h5py.File(tmp_path / "sub" / "c.h5", "w") as file:
        for i, layout in enumerate(LAYOUTS):
            file.create_dataset(f"x{i}", data=X, **layout)
            file[f"group/hard{i}"] = file[f"x{i}"]
    with h5py.File(tmp_path / "sub" / "b.h5", "a") as file:
        for i in range(len(LAYOUTS)):
            file[f"link{i}"] = h5py.ExternalLink("c.h5", f"/x{i}")
        file["group"] = h5py.ExternalLink("c.h5", "/group")
    with h5py.File(tmp_path / "a.h5", "a") as file:
        for i in range(len(LAYOUTS)):
            file[f"one{i}"] = h5py.ExternalLink("sub/c.h5", f"/x{i}")
            file[f"two{i}"] = h5py.ExternalLink("sub/b.h5", f"link{i}")
            file[f"soft{i}"] = h5py.SoftLink(f"/two{i}")
            file[f"deep/soft{i}"] = h5py.SoftLink(f"../deep/other{i}" if i > 9 else f"/soft{i}")
            file[f"own{i}"] = h5py.SoftLink(f"/decoy/x{i}")
        file["group"] = h5py.ExternalLink("sub/b.h5", "/group")
        file["through"] = h5py.SoftLink("group")
    return tmp_path


@pytest.mark.parametrize("layout", range(len(LAYOUTS)))
@pytest.mark.parametrize(
    "path", ["one{}", "two{}", "soft{}", "deep/soft{}", "group/hard{}", "through/hard{}", "/./one{}"]
)
def test_links_resolve_to_the_stored_data(directory: Path, path: str, layout: int) -> None:
    np.testing.assert_array_equal(rows(directory / "a.h5", path.format(layout)), X)
    np.testing.assert_array_equal(rows(directory / "a.h5", f"own{layout}"), -X)


def test_link_search_order_matches_libhdf5(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (directory / "elsewhere").mkdir()
    with h5py.File(directory / "elsewhere" / "c.h5", "w") as file:
        file["x0"] = 2 * X
    with h5py.File(directory / "sub" / "d.h5", "w") as file:
        file["x"] = h5py.ExternalLink("c.h5", "x0")
        file["absolute"] = h5py.ExternalLink(str(directory / "sub" / "c.h5"), "x0")
    np.testing.assert_array_equal(rows(directory / "sub" / "d.h5", "x"), X)
    os.symlink(directory / "sub" / "d.h5", directory / "d.h5")
    np.testing.assert_array_equal(rows(directory / "d.h5", "x"), X)
    monkeypatch.setenv("HDF5_EXT_PREFIX", str(directory / "elsewhere"))
    with h5py.File(directory / "sub" / "d.h5") as file:
        expected = file["x"][...]
    os.utime(directory / "sub" / "d.h5")
    np.testing.assert_array_equal(rows(directory / "sub" / "d.h5", "x"), expected)
    np.testing.assert_array_equal(rows(directory / "sub" / "d.h5", "absolute"), X)


@pytest.mark.parametrize("layout", range(len(LAYOUTS)))
def test_changed_linked_file_is_an_error(directory: Path, layout: int) -> None:
    loader = HDF5Loader(str(directory / "a.h5"), f"two{layout}", batch_size=4, shuffle=False, memory_budget=4000)
    os.utime(directory / "sub" / "c.h5", ns=(1, 1))
    with helpers.raises_one_line(DataError, "c.h5", "has changed"):
        list(loader)


def test_all_files_include_linked_files(directory: Path) -> None:
    with FeatureSource(str(directory / "a.h5"), {"family": "two0"}) as source:
        assert directory / "sub" / "c.h5" in source.all_files
        os.utime(directory / "sub" / "c.h5", ns=(1, 1))
        with helpers.raises_one_line(DataError, "has changed"):
            next(source.batches(["family"], 2, 10**6, torch.device("cpu")))
    with h5py.File(directory / "sub" / "c.h5", "a") as file:
        file["x0"][...] = 3 * X
    np.testing.assert_array_equal(rows(directory / "a.h5", "two0"), 3 * X)


def test_uncompressed_copy_holds_the_linked_data(directory: Path) -> None:
    for factor in (1, 3):
        with h5py.File(directory / "sub" / "c.h5", "a") as file:
            file["x1"][...] = factor * X
        found = rows(directory / "a.h5", "two1", cache_dir=directory / "cache")
        np.testing.assert_array_equal(found, factor * X)


@pytest.mark.parametrize(
    ("link", "words"),
    [
        (h5py.SoftLink("/nowhere"), ["e: is a link to /nowhere", "no such object"]),
        (h5py.ExternalLink("none.h5", "/x"), ["e: is a link to /x in none.h5", "no such HDF5 file"]),
        (h5py.ExternalLink("sub/c.h5", "/nowhere"), ["e: is a link to /nowhere in sub/c.h5", "no such object"]),
        (h5py.ExternalLink("text.h5", "/x"), ["e: is a link to /x in text.h5", "no such HDF5 file"]),
        (h5py.SoftLink("/e"), ["e: its links form a cycle"]),
        (h5py.ExternalLink("a.h5", "/e"), ["e: its links form a cycle"]),
        (h5py.ExternalLink("fifo", "/x"), ["fifo: is a FIFO"]),
        (h5py.ExternalLink("sub/c.h5", "/group"), ["e is a group"]),
    ],
    ids=["soft", "file", "object", "text", "circle", "external-circle", "fifo", "group"],
)
def test_broken_link_is_an_error(directory: Path, link: Any, words: list[str]) -> None:
    (directory / "text.h5").write_text("no HDF5")
    os.mkfifo(directory / "fifo")
    with h5py.File(directory / "a.h5", "a") as file:
        file["e"] = link
    with helpers.raises_one_line(DataError, "a.h5" if "fifo" not in words[0] else "fifo", *words):
        HDF5Loader(str(directory / "a.h5"), "e")


def write_virtual(directory: Path, sources: int = 4, **options: Any) -> Path:
    layout = h5py.VirtualLayout((5 * sources, 3), "<f4")
    for i in range(sources):
        with h5py.File(directory / f"part_{i}.h5", "w") as file:
            file["x"] = np.full((5, 3), i + 1, np.float32)
        layout[5 * i : 5 * i + 5] = h5py.VirtualSource(f"part_{i}.h5", "x", (5, 3))
    with h5py.File(directory / "v.h5", "w") as file:
        file.create_virtual_dataset("x", layout, fillvalue=-9, **options)
    return directory / "v.h5"


@pytest.mark.parametrize("damage", ["file", "dataset", "smaller", "fifo"])
def test_missing_virtual_source_is_an_error(tmp_path: Path, damage: str) -> None:
    file = write_virtual(tmp_path)
    part = tmp_path / "part_2.h5"
    part.unlink()
    if damage == "fifo":
        os.mkfifo(part)
    elif damage != "file":
        with h5py.File(part, "w") as opened:
            opened["y" if damage == "dataset" else "x"] = np.zeros((2, 3), np.float32)
    with helpers.raises_one_line(DataError, "part_2.h5", "x" if damage != "fifo" else "is a FIFO"):
        HDF5Loader(str(file), "x")


@pytest.mark.parametrize("change", ["vanishes", "changes"])
def test_virtual_source_removed_during_a_pass_is_an_error(tmp_path: Path, change: str) -> None:
    file = write_virtual(tmp_path, 30)
    batches = iter(HDF5Loader(str(file), "x", batch_size=5, shuffle=False, window_rows=5, memory_budget=4000))
    assert next(batches)["x"][0, 0] == 1
    part = tmp_path / "part_29.h5"
    part.unlink() if change == "vanishes" else os.utime(part, ns=(1, 1))
    with helpers.raises_one_line(DataError, "v.h5", "part_29.h5"):
        list(batches)


def test_nested_virtual_sources_are_found(tmp_path: Path) -> None:
    inner = write_virtual(tmp_path)
    layout = h5py.VirtualLayout((20, 3), "<f4")
    layout[...] = h5py.VirtualSource(inner.name, "link", (20, 3))
    with h5py.File(inner, "a") as file:
        file["link"] = h5py.SoftLink("x")
    with h5py.File(tmp_path / "outer.h5", "w") as file:
        file.create_virtual_dataset("x", layout)
    assert rows(tmp_path / "outer.h5", "x")[:, 0].tolist() == np.repeat([1, 2, 3, 4], 5).tolist()
    (tmp_path / "part_1.h5").unlink()
    with helpers.raises_one_line(DataError, "part_1.h5"):
        HDF5Loader(str(tmp_path / "outer.h5"), "x")


def test_series_of_virtual_sources_is_found(tmp_path: Path) -> None:
    write_virtual(tmp_path)
    space = h5py.h5s.create_simple((0, 3), (h5py.h5s.UNLIMITED, 3))
    space.select_hyperslab((0, 0), (h5py.h5s.UNLIMITED, 1), (5, 1), (5, 3))
    source = h5py.h5s.create_simple((5, 3))
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_virtual(space, b"part_%b.h5", b"x", source)
    with h5py.File(tmp_path / "series.h5", "w") as file:
        h5py.h5d.create(file.id, b"x", h5py.h5t.IEEE_F32LE, space, plist)
    assert rows(tmp_path / "series.h5", "x")[:, 0].tolist() == np.repeat([1, 2, 3, 4], 5).tolist()
    (tmp_path / "part_0.h5").unlink()
    with helpers.raises_one_line(DataError, "part_0.h5"):
        HDF5Loader(str(tmp_path / "series.h5"), "x")


@pytest.fixture
def few_descriptors() -> Iterator[None]:
    """Limits open files to 30 more than now."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.usefixtures("few_descriptors")
def test_more_virtual_sources_than_descriptors_are_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """libhdf5 returns fill values for a source that it cannot open."""
    file = write_virtual(tmp_path, 60)
    assert rows(file, "x")[:, 0].tolist() == np.repeat(np.arange(1, 61), 5).tolist()
    assert "takes values from 60 files" in caplog.text


@pytest.mark.usefixtures("few_descriptors")
def test_row_with_too_many_files_is_an_error(tmp_path: Path) -> None:
    layout = h5py.VirtualLayout((5, 60), "<f4")
    for i in range(60):
        with h5py.File(tmp_path / f"part_{i}.h5", "w") as file:
            file["x"] = np.full(5, i, np.float32)
        layout[:, i] = h5py.VirtualSource(f"part_{i}.h5", "x", (5,))
    with h5py.File(tmp_path / "v.h5", "w") as file:
        file.create_virtual_dataset("x", layout)
    with helpers.raises_one_line(DataError, "v.h5", "x", "files must be open at a time", "ulimit -n"):
        rows(tmp_path / "v.h5", "x")


@pytest.mark.usefixtures("few_descriptors")
@pytest.mark.parametrize("layout", range(len(LAYOUTS)))
def test_exhausted_descriptors_close_least_recently_used_files(tmp_path: Path, layout: int) -> None:
    """The least recently used files are closed, and the pass continues."""
    for i in range(12):
        with h5py.File(tmp_path / f"{i}.h5", "w") as file:
            file.create_dataset("x", data=X + i, **LAYOUTS[layout])
    loader = HDF5Loader(f"{tmp_path}/*.h5", "x", batch_size=20, shuffle=False, num_threads=1, memory_budget=20_000)
    batches = iter(loader)
    for _ in range(6):
        next(batches)
    held = []
    try:
        while True:
            held.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        os.close(held.pop())
        os.close(held.pop())
    try:
        for i in range(6, 12):
            np.testing.assert_array_equal(next(batches)["x"].numpy(), X + i)
    finally:
        for descriptor in held:
            os.close(descriptor)


@pytest.mark.parametrize("change", ["missing", "short", "vanishes"])
def test_external_raw_file_is_checked(tmp_path: Path, change: str) -> None:
    raw = tmp_path / "x.bin"
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", (20, 3), "<f4", external=[(str(raw), 0, h5py.h5f.UNLIMITED)])[...] = X
    np.testing.assert_array_equal(rows(tmp_path / "a.h5", "x"), X)
    if change == "vanishes":
        loader = HDF5Loader(str(tmp_path / "a.h5"), "x", batch_size=4)
        raw.unlink()
        with helpers.raises_one_line(DataError, "x.bin"):
            list(loader)
        return
    raw.write_bytes(b"abc") if change == "short" else raw.unlink()
    words = "is missing" if change == "missing" else "holds 3 bytes, but 240 are needed"
    with helpers.raises_one_line(DataError, "a.h5", "x: its external file", "x.bin", words):
        HDF5Loader(str(tmp_path / "a.h5"), "x")


@pytest.mark.parametrize("prefix", [pytest.param("", marks=pytest.mark.slow), "${ORIGIN}"])  # a process each
def test_relative_raw_file_is_resolved_like_libhdf5(tmp_path: Path, prefix: str) -> None:
    """Relative to the working directory, or to HDF5_EXTFILE_PREFIX, which libhdf5 reads when it is loaded."""
    code = """
import h5py, os, sys
from spinlock_fast.data import HDF5Loader
os.mkdir("sub")
with h5py.File("sub/a.h5", "w") as file:
    file.create_dataset("x", (20, 3), "<f4", external=[("x.bin", 0, h5py.h5f.UNLIMITED)])[...] = 7
assert all((batch["x"] == 7).all() for batch in HDF5Loader("sub/a.h5", "x"))
print(os.path.exists("sub/x.bin"))
"""
    environment = {**os.environ, "HDF5_EXTFILE_PREFIX": prefix}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == str(bool(prefix)), done.stderr


@pytest.mark.parametrize("kind", ["link", "virtual", "raw", "nested"])
def test_allow_external_false_rejects_outside_files(tmp_path: Path, kind: str) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.mkdir()
    for directory in (inside, outside):
        write_virtual(directory)
        with h5py.File(directory / "v.h5", "a") as file:
            file["link"] = h5py.ExternalLink("part_0.h5", "x")
            file.create_dataset("raw", (20, 3), "<f4", external=[(str(directory / "x.bin"), 0, h5py.h5f.UNLIMITED)])[
                ...
            ] = X
    for path in ("x", "link", "raw"):
        assert len(rows(inside / "v.h5", path, allow_external=False))
    with h5py.File(inside / "a.h5", "w") as file:
        if kind == "link":
            file["x"] = h5py.ExternalLink(str(outside / "v.h5"), "/x")
        elif kind == "raw":
            file.create_dataset("x", (20, 3), "<f4", external=[(str(outside / "x.bin"), 0, h5py.h5f.UNLIMITED)])
        else:
            layout = h5py.VirtualLayout((20, 3), "<f4")
            name = "../out/v.h5" if kind == "virtual" else "v.h5"
            layout[...] = h5py.VirtualSource(name, "x" if kind == "virtual" else "far", (20, 3))
            file.create_virtual_dataset("x", layout)
    if kind == "nested":
        with h5py.File(inside / "v.h5", "a") as file:
            file["far"] = h5py.ExternalLink("../out/v.h5", "x")
    assert len(rows(inside / "a.h5", "x")) == 20
    with helpers.raises_one_line(DataError, "takes values from", "out", "allow_external"):
        HDF5Loader(str(inside / "a.h5"), "x", allow_external=False)
    with helpers.raises_one_line(DataError, "takes values from", "out", "allow_external"):
        FeatureSource(str(inside / "a.h5"), {"family": "x"}, allow_external=False)


@pytest.mark.parametrize("kind", ["a FIFO", "a socket", "a character device"])
def test_special_files_are_rejected(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # socket paths are limited in length
    path = Path("a.h5")
    if kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a socket":
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind("a.h5")
    else:
        path = Path("/dev/null")
    with helpers.raises_one_line(DataError, str(path), f"is {kind}"):
        HDF5Loader(str(path), "x")
