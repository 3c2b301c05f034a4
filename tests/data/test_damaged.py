"""Damaged, manipulated and changing files: one-line errors, and no leaked threads or files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import helpers
import numpy as np
import pytest
from hdf5_layouts import NOT_NATIVE
from processes import run_code

from spinlock_fast import _native
from spinlock_fast.data import HDF5Loader, native_layout, shard_index
from spinlock_fast.errors import DataError

ROWS, CHUNK = 64, 8
VALUES = np.random.default_rng(0).integers(-99, 99, (ROWS, 50)).astype(np.float32)
LAYOUTS = {
    "gzip": {"chunks": (CHUNK, 50), "compression": "gzip"},
    "shuffled": {"chunks": (CHUNK, 50), "compression": "gzip", "shuffle": True},
    "checked": {"chunks": (CHUNK, 50), "fletcher32": True},
    "raw": {"chunks": (CHUNK, 50)},
    "contiguous": {},
    "bzip2": {"chunks": (CHUNK, 50), **NOT_NATIVE, "fletcher32": True},
}


def write(path: Path, layout: str = "gzip") -> str:
    with h5py.File(path, "w") as file:
        file.create_dataset("good", data=VALUES, chunks=(CHUNK, 50), compression="gzip")
        file.create_dataset("x", data=VALUES, **LAYOUTS[layout])
    return str(path)


def chunk_position(path: str, row: int) -> tuple[int, int]:
    """Offset and stored size of the chunk that holds a row."""
    with h5py.File(path) as file:
        info = file["x"].id.get_chunk_info(row // CHUNK)
        return info.byte_offset, info.size


def overwrite(path: str, offset: int, content: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(content)


def load(path: str, **settings: Any) -> HDF5Loader:
    defaults = {"batch_size": 8, "shuffle": False, "num_threads": 2, "window_rows": 16}
    return HDF5Loader(path, ["good", "x"], **{**defaults, **settings})


def good_batches(batches: Iterator[dict[str, Any]]) -> int:
    """Number of batches before the end or an error; checks their values."""
    count = 0
    for batch in batches:
        for name in ("good", "x"):
            np.testing.assert_array_equal(batch[name].numpy(), VALUES[batch["index"].numpy()])
        count += 1
    return count


@pytest.fixture(autouse=True)
def _no_leaks() -> Iterator[None]:
    """No thread and no open file remains after an error."""

    def resources() -> tuple[int, list[str]]:
        names = [
            os.readlink(f"/proc/self/fd/{fd}")
            for fd in os.listdir("/proc/self/fd")
            if fd.isdigit() and os.path.exists(f"/proc/self/fd/{fd}")
        ]
        return len(os.listdir("/proc/self/task")), sorted(name for name in names if name.endswith(".h5"))

    before = resources()
    yield
    deadline = time.monotonic() + 5.0
    while resources() != before and time.monotonic() < deadline:
        time.sleep(0.01)  # /proc lists a joined thread for a moment
    assert resources() == before


def test_undamaged_files_are_read(tmp_path: Path) -> None:
    for layout in LAYOUTS:
        assert good_batches(iter(load(write(tmp_path / "a.h5", layout)))) == 8


@pytest.mark.parametrize("layout", ["gzip", "shuffled", "checked", "bzip2"])
@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_damaged_chunk_raises_at_its_batch(tmp_path: Path, layout: str, where: str) -> None:
    path = write(tmp_path / "a.h5", layout)
    offset, size = chunk_position(path, 40)
    overwrite(path, offset + {"first": 0, "middle": size // 2, "last": size - 3}[where], b"\xa5\x5a\xa5")
    loader = load(path)
    batches = iter(loader)
    for _ in range(5):
        batch = next(batches)
        np.testing.assert_array_equal(batch["x"].numpy(), VALUES[batch["index"].numpy()])
    words = (
        ["rows 40..47", "damaged"]
        if layout == "bzip2"
        else ["chunk [40, 0] (rows 40..47)", f"at byte {offset}", "damaged"]
    )
    with helpers.raises_one_line(DataError, "a.h5: x: ", *words):
        next(batches)
    assert loader.state_dict()["batch"] == 5


def test_first_error_is_raised_independent_of_timing(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5")
    for row in (20, 24, 60):
        overwrite(path, chunk_position(path, row)[0] + 5, b"\xff" * 9)
    messages = set()
    for threads in (1, 2, 4) * 5:
        with pytest.raises(DataError) as caught:
            good_batches(iter(load(path, batch_size=64, num_threads=threads)))
        messages.add(str(caught.value))
    assert len(messages) == 1
    assert "rows 16..23" in messages.pop()


def test_error_detected_late_is_still_raised_first(tmp_path: Path) -> None:
    """The first chunk is damaged at its end, the second at its beginning, which another thread detects earlier."""
    path = str(tmp_path / "a.h5")
    with h5py.File(path, "w") as file:
        values = np.random.default_rng(0).standard_normal((2, 400_000))
        dataset = file.create_dataset("x", data=values, chunks=(1, 400_000), compression="gzip", compression_opts=1)
        first, second = (dataset.id.get_chunk_info(i) for i in range(2))
    overwrite(path, first.byte_offset + first.size - 4, b"\xff" * 4)
    overwrite(path, second.byte_offset, b"\xff" * 4)
    with helpers.raises_one_line(DataError, "rows 0..0"):
        list(HDF5Loader(path, "x", num_threads=2))


@pytest.mark.parametrize("shuffle", [True, "exact"])
def test_batches_before_a_damaged_row_are_delivered(tmp_path: Path, shuffle: Any) -> None:
    path = write(tmp_path / "a.h5")
    overwrite(path, chunk_position(path, 32)[0] + 5, b"\xff" * 9)
    loader = load(path, shuffle=shuffle)
    order = np.concatenate([rows for _, rows in loader._plan()[0].windows(0)])
    first = next(i for i in range(8) if ((order[8 * i : 8 * i + 8] // 8) == 4).any())
    count = 0
    with helpers.raises_one_line(DataError, "rows 32..39"):
        for batch in loader:
            np.testing.assert_array_equal(batch["x"].numpy(), VALUES[batch["index"].numpy()])
            count += 1
    assert count == first


def test_verify_checksums_false_ignores_checksums(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5", "checked")
    offset, size = chunk_position(path, 0)
    overwrite(path, offset + size - 1, b"\x77")
    assert good_batches(iter(load(path, verify_checksums=False))) == 8
    with helpers.raises_one_line(DataError, "checksum"):
        good_batches(iter(load(path)))


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_truncated_file_is_an_error(tmp_path: Path, layout: str) -> None:
    path = write(tmp_path / "a.h5", layout)
    content = Path(path).read_bytes()
    for share in (0.05, 0.5, 0.97):
        Path(path).write_bytes(content[: int(share * len(content))])
        with helpers.raises_one_line(DataError, "a.h5", "truncated"):
            load(path)


@pytest.mark.parametrize("layout", ["gzip", "contiguous", "bzip2"])
@pytest.mark.parametrize("change", ["shorter", "touched", "overwritten", "replaced"])
def test_file_changed_during_reading_is_an_error(tmp_path: Path, layout: str, change: str) -> None:
    path = write(tmp_path / "a.h5", layout)
    loader = HDF5Loader(
        path, "x", 8, shuffle=False, num_threads=1, memory_budget=10_000
    )  # small budget: the end of the file is not read ahead
    batches = iter(loader)
    next(batches)
    if change == "shorter":
        os.truncate(path, 900)
    elif change == "touched":
        os.utime(path, ns=(1, 1))
    elif change == "overwritten":
        overwrite(path, chunk_position(path, 56)[0] if layout != "contiguous" else 3000, b"\xff" * 900)
    else:
        shutil.copy(path, tmp_path / "b.h5")
        os.replace(tmp_path / "b.h5", path)
    if change == "replaced" and layout != "bzip2":
        # The open descriptor still refers to the complete old file; a new pass detects the change.
        assert sum(len(batch["x"]) for batch in batches) == 56
        batches = iter(loader)
    with helpers.raises_one_line(DataError, "a.h5: x", "changed"):
        list(batches)


@pytest.mark.parametrize("layout", ["gzip", "contiguous", "bzip2"])
def test_file_deleted_during_reading_is_read_or_named(tmp_path: Path, layout: str) -> None:
    """Either the whole old file is read, or an error names it."""
    path = write(tmp_path / "a.h5", layout)
    loader = load(path)
    batches = iter(loader)
    next(batches)
    os.unlink(path)
    try:
        assert good_batches(batches) == 7
    except DataError as error:
        assert "a.h5" in str(error)  # noqa: PT017 - both outcomes are correct
    with helpers.raises_one_line(DataError, "a.h5"):
        good_batches(iter(loader))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5")
    os.chmod(path, 0)
    with helpers.raises_one_line(DataError, "a.h5", "Permission denied"):
        load(path)


def test_directory_is_an_error(tmp_path: Path) -> None:
    with helpers.raises_one_line(DataError, str(tmp_path), "directory"):
        load(str(tmp_path))


@pytest.mark.parametrize(
    ("key", "chunk", "value", "words"),
    [
        ("sizes", 3, 2**39, "too many for a chunk"),
        ("sizes", 3, 0, "damaged"),
        ("sizes", 3, 9, "damaged"),
        ("offsets", 3, 2**50, "beyond the end"),
        ("offsets", 3, 2**64 - 7, "beyond the end"),
        ("masks", 3, 1, "damaged"),
        ("masks", 3, 2**32 - 1, "damaged"),
    ],
)
def test_manipulated_chunk_index_is_an_error(tmp_path: Path, key: str, chunk: int, value: int, words: str) -> None:
    """A manipulated B-tree is an error of the affected batch; memory of the stated size is not allocated."""
    loader = load(write(tmp_path / "a.h5"))
    native = loader._sharded.datasets[1].shards[0].native_layout
    assert native is not None
    native[key][chunk] = value
    batches = iter(loader)
    for _ in range(3):
        next(batches)
    with helpers.raises_one_line(DataError, "a.h5: x: chunk [24, 0] (rows 24..31)", words):
        next(batches)
    shard_index._cache.clear()  # other tests must not use the manipulated index


class FakeIndex:
    """A dataset whose chunk index is replaced by `listing(chunk infos, record)`."""

    def __init__(self, dataset: h5py.Dataset, listing: Callable[[list[Any], Any], None]) -> None:
        self.shape, self.chunks, self.id = dataset.shape, dataset.chunks, self
        self.infos = [dataset.id.get_chunk_info(i) for i in range(dataset.id.get_num_chunks())]
        self.listing = listing

    def chunk_iter(self, record: Any) -> None:
        self.listing(self.infos, record)


def cycle(infos: list[Any], record: Any) -> None:
    while record(infos[0]) is None:
        pass


def repeated(infos: list[Any], record: Any) -> None:
    for info in [infos[0], *infos[:-1]]:
        record(info)


@pytest.mark.parametrize(("listing", "words"), [(cycle, "outside"), (repeated, "twice")])
def test_inconsistent_chunk_index_is_an_error(tmp_path: Path, listing: Any, words: str) -> None:
    with h5py.File(write(tmp_path / "a.h5")) as file, pytest.raises(ValueError, match=words):
        native_layout._list_chunks(FakeIndex(file["x"], listing), (8, 1))


def test_file_changed_while_opening_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.h5")
    original = shard_index.open_file

    def open_and_touch(file: Path) -> h5py.File:
        handle = original(file)
        os.utime(file, ns=(1, 1))
        return handle

    monkeypatch.setattr(shard_index, "open_file", open_and_touch)
    with helpers.raises_one_line(DataError, "a.h5", "changed while it was opened"):
        load(path)


def test_inconsistent_layouts_are_rejected() -> None:
    shard = {"file": 0, "rows": 8, "chunk_rows": 1, "swapped": False, "offset": 0}
    dataset = {"name": "x", "item_size": 4, "row_shape": [3], "shards": [shard]}
    with pytest.raises(ValueError, match="names no file"):
        _native.RowReader([], [dataset], 1, True)
    with pytest.raises(ValueError, match="impossibly large"):
        _native.RowReader([], [{**dataset, "row_shape": [2**60, 2**60]}], 1, True)
    with pytest.raises(ValueError, match="threads"):
        _native.RowReader([], [], 0, True)


_READ_DAMAGED = """
import sys, resource
import numpy as np
from spinlock_fast.data import HDF5Loader
from spinlock_fast.errors import DataError, ConfigError
resource.setrlimit(resource.RLIMIT_CPU, (100, 100))
values = np.load(sys.argv[1])
for path in sys.argv[2:]:
    try:
        for batch in HDF5Loader(path, ["good", "x"], batch_size=8, num_threads=2, memory_budget="100MB"):
            pass
    except (DataError, ConfigError) as error:
        assert path in str(error) or isinstance(error, ConfigError), error
        assert "\\n" not in str(error), error
    print(path)
"""


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_random_damage_anywhere_never_crashes(tmp_path: Path, layout: str) -> None:
    """Overwrites bytes of data and metadata; reads the files in a separate process, to detect crashes and hangs."""
    content = bytearray(Path(write(tmp_path / "a.h5", layout)).read_bytes())
    random = np.random.default_rng(len(layout))
    paths = []
    for i in range(40):
        damaged = bytearray(content)
        for at in random.integers(0, len(content) if i % 2 else 4096, 1 + i % 3):
            damaged[at] = random.integers(256)
        paths.append(str(tmp_path / f"damaged_{i}.h5"))
        Path(paths[-1]).write_bytes(damaged)
    np.save(tmp_path / "values.npy", VALUES)
    assert run_code(_READ_DAMAGED, [str(tmp_path / "values.npy"), *paths], tmp_path).split() == paths


_WRITER = """
import sys
import h5py, numpy as np
with h5py.File(sys.argv[1], "w", libver="latest") as file:
    x = file.create_dataset("x", data=np.arange(80.0).reshape(20, 4), chunks=(4, 4), maxshape=(None, 4))
    if sys.argv[2] == "for readers":
        file.swmr_mode = True
    file.flush()
    print("ready", flush=True)
    sys.stdin.readline()
    x.resize(24, axis=0)
    x.flush()
    print("grown", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.parametrize("mode", ["for readers", "alone"])
def test_file_written_by_another_process(tmp_path: Path, mode: str) -> None:
    """Read through libhdf5 if its writer is in SWMR mode; otherwise an error."""
    path = str(tmp_path / "a.h5")
    command = [sys.executable, "-c", _WRITER, path, mode]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdin is not None
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        if mode == "alone":
            with helpers.raises_one_line(DataError, "a.h5", "another program is writing"):
                HDF5Loader(path, "x")
        else:
            loader = HDF5Loader(path, "x", batch_size=8, shuffle=False)
            assert loader.stats()["paths"]["x"].startswith("h5py, because of a writer")
            writer.stdin.write("\n")
            writer.stdin.flush()
            assert writer.stdout.readline() == "grown\n"
            assert [len(batch["x"]) for batch in loader] == [8, 8, 4]
        writer.communicate("\n\n")
    assert writer.returncode == 0
