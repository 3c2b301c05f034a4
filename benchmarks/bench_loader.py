"""Reading rows: the loader beside h5py, a DataLoader of h5py workers, and hidefix.

`python benchmarks/bench_loader.py` prints a table; `pytest benchmarks/bench_loader.py --benchmark-only` records it.
All readers take turns, round after round, so that a busy machine is busy for all of them; files are in the page cache.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from spinlock_fast import _native
from spinlock_fast.data import HDF5Loader

ROW = (256, 63)
BATCH = 512
FANCY_BATCHES = 1  # h5py reads random rows so slowly that one batch tells enough
LAYOUTS: dict[str, dict[str, Any]] = {
    "gzip": {"chunks": (8, *ROW), "compression": "gzip", "compression_opts": 4},
    "gzip+shuffle": {"chunks": (8, *ROW), "compression": "gzip", "compression_opts": 4, "shuffle": True},
    "raw": {"chunks": (8, *ROW)},
    "contiguous": {},
}
Reader = Callable[[], Iterator[Any]]


def write(path: Path, rows: int) -> None:
    """Noise whose last bits are zero: gzip takes off a sixth, as it does from real features."""
    bits = np.random.default_rng(0).standard_normal((rows, *ROW), dtype=np.float32).view(np.uint32)
    values = (bits & np.uint32(0xFFFFFFE0)).view(np.float32)
    with h5py.File(path, "w") as file:
        for name, options in LAYOUTS.items():
            file.create_dataset(name, data=values, **options)


class H5pyBatches(torch.utils.data.Dataset[torch.Tensor]):
    """What people write: a file opened in each worker, an item for a batch of rows."""

    def __init__(self, path: Path, name: str, batches: list[NDArray[np.int64]]) -> None:
        self.path, self.name, self.batches = path, name, batches
        self.file: h5py.File | None = None

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, i: int) -> torch.Tensor:
        self.file = self.file or h5py.File(self.path)
        rows = self.batches[i]
        run = rows[-1] - rows[0] == len(rows) - 1
        return torch.from_numpy(self.file[self.name][rows[0] : rows[-1] + 1] if run else self.file[self.name][rows])


def readers(path: Path, name: str, rows: int) -> dict[str, Reader]:
    """Ways to read the dataset, each giving arrays or tensors of rows."""
    runs = np.split(np.arange(rows), range(BATCH, rows, BATCH))
    shuffled = np.split(np.random.default_rng(1).permutation(rows), range(BATCH, rows, BATCH))[:FANCY_BATCHES]
    shuffled = [np.sort(batch) for batch in shuffled]  # h5py takes increasing rows only

    def ours(threads: int, shuffle: bool) -> Reader:
        loader = HDF5Loader(path, name, BATCH, shuffle=shuffle, num_threads=threads)
        for _ in loader:  # later epochs count: this one pays for fresh memory
            pass
        return lambda: (batch[name] for batch in loader)

    def plain(batches: list[NDArray[np.int64]]) -> Reader:
        dataset = H5pyBatches(path, name, batches)
        return lambda: (dataset[i] for i in range(len(dataset)))

    def workers(batches: list[NDArray[np.int64]]) -> Reader:
        return lambda: iter(DataLoader(H5pyBatches(path, name, batches), batch_size=None, num_workers=2))

    def pread() -> Iterator[NDArray[np.uint8]]:
        with h5py.File(path) as file:
            offset = file[name].id.get_offset()
        size = int(np.prod(ROW)) * 4
        file_descriptor = os.open(path, os.O_RDONLY)
        try:
            for batch in runs:
                out = np.empty(len(batch) * size, np.uint8)
                assert os.preadv(file_descriptor, [out], offset + int(batch[0]) * size) == len(out)
                yield out
        finally:
            os.close(file_descriptor)

    found: dict[str, Reader] = {
        "h5py": plain(runs),
        "h5py, 2 workers": workers(runs),
        "ours, 1 thread": ours(1, False),
        "ours, 2 threads": ours(2, False),
        "h5py, random rows": plain(shuffled),
        "h5py, random rows, 2 workers": workers(shuffled * 2),
        "ours, shuffled, 1 thread": ours(1, True),
        "ours, shuffled, 2 threads": ours(2, True),
    }
    if LAYOUTS[name].get("compression"):
        found["inflate alone, 1 thread"] = lambda: inflate_alone(path, name)
    if name == "contiguous":
        found["pread loop"] = pread
    try:
        import hidefix
    except ImportError:
        return found

    def concurrent() -> Iterator[NDArray[np.float32]]:
        dataset = hidefix.Index(str(path)).dataset(name)
        for batch in runs:
            yield dataset[slice(int(batch[0]), int(batch[-1]) + 1), slice(0, ROW[0]), slice(0, ROW[1])]

    found["hidefix"] = concurrent
    return found


def inflate_alone(path: Path, name: str) -> Iterator[NDArray[np.uint8]]:
    """The bound: stored chunks that are in memory already, inflated into one buffer that stays in the cache."""
    out = np.empty(8 * int(np.prod(ROW)) * 4, np.uint8)
    for stored in _stored_chunks(path, name):
        _native.inflate(stored, out)
        yield out


_in_memory: dict[tuple[Path, str], list[bytes]] = {}


def _stored_chunks(path: Path, name: str) -> list[bytes]:
    if (path, name) not in _in_memory:
        with h5py.File(path) as file:
            dataset = file[name].id
            places = [dataset.get_chunk_info(i).chunk_offset for i in range(dataset.get_num_chunks())]
            _in_memory[path, name] = [dataset.read_direct_chunk(place)[1] for place in places]
    return _in_memory[path, name]


def cpu_seconds() -> float:
    """Of this process and of children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def measure(read: Reader) -> tuple[float, float]:
    """(MB per second, MB per CPU second) of decoded data."""
    wall, cpu, size = time.perf_counter(), cpu_seconds(), 0
    for part in read():
        size += part.nbytes
    return size / 1e6 / (time.perf_counter() - wall), size / 1e6 / max(cpu_seconds() - cpu, 1e-9)


def compare(path: Path, name: str, rows: int, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Measurements of every reader, in turn; asserts first that all read the same."""
    ways = readers(path, name, rows)
    with h5py.File(path) as file:
        total = float(file[name][:].sum(dtype=np.float64))
    for way in ("ours, 1 thread", "ours, shuffled, 2 threads", "hidefix"):
        if way in ways:
            assert sum(float(np.asarray(part).sum(dtype=np.float64)) for part in ways[way]()) == pytest.approx(total)
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, read in ways.items():
            found[way].append(measure(read))
    return found


def summary(found: dict[str, list[tuple[float, float]]]) -> dict[str, dict[str, float]]:
    """Medians by reader, and the median of the ratios to h5py taken round by round."""
    rows = {}
    for way, values in found.items():
        slow = found["h5py, random rows" if "random" in way or "shuffled" in way else "h5py"]
        rows[way] = {
            "mb_per_second": statistics.median(wall for wall, _ in values),
            "mb_per_cpu_second": statistics.median(cpu for _, cpu in values),
            "times_h5py": statistics.median(a[0] / b[0] for a, b in zip(values, slow, strict=True)),
            "times_h5py_per_cpu_second": statistics.median(a[1] / b[1] for a, b in zip(values, slow, strict=True)),
        }
    return rows


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("loader") / "bench.h5"
    write(path, 2048)
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
def bench_readers(benchmark: Any, file: Path, layout: str) -> None:
    found = benchmark.pedantic(compare, args=(file, layout, 2048, 3), rounds=1)
    benchmark.extra_info |= {"inflate": _native.inflate_library(), "h5py": h5py.__version__, **summary(found)}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--rows", type=int, default=4096, help="rows of 64.5 KB")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--layouts", nargs="*", default=list(LAYOUTS), choices=list(LAYOUTS))
    chosen = options.parse_args()
    out = sys.stdout.write
    out(f"{_native.inflate_library()}, h5py {h5py.__version__}, load average {os.getloadavg()[0]:.1f}\n")
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "bench.h5"
        write(path, chosen.rows)
        for name in chosen.layouts:
            out(f"\n{name:32}{'MB/s':>8}{'MB/CPU s':>10}{'x h5py':>9}{'per CPU s':>11}\n")
            for way, row in summary(compare(path, name, chosen.rows, chosen.rounds)).items():
                a, b, c, d = row.values()
                out(f"{way:32}{a:8.0f}{b:10.0f}{c:9.2f}{d:11.2f}\n")


if __name__ == "__main__":
    main()
