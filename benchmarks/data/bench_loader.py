"""Reading rows of HDF5 files: `HDF5Loader` beside h5py, a DataLoader with h5py workers, and hidefix.

    python -m benchmarks.data.bench_loader                          # prints a table
    python -m benchmarks.data.bench_loader --filters                # compression filters beside h5py
    pytest benchmarks/data/bench_loader.py --benchmark-only

The readers alternate in each round, so that other load on the machine affects all of them. Files are in the page cache.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
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
FANCY_BATCHES = 1  # h5py reads random rows slowly: one batch suffices
LAYOUTS: dict[str, dict[str, Any]] = {
    "gzip": {"chunks": (8, *ROW), "compression": "gzip", "compression_opts": 4},
    "gzip+shuffle": {"chunks": (8, *ROW), "compression": "gzip", "compression_opts": 4, "shuffle": True},
    "raw": {"chunks": (8, *ROW)},
    "contiguous": {},
}
Reader = Callable[[], Iterator[Any]]


def write(path: Path, rows: int) -> None:
    """Noise with the last 5 bits set to 0: gzip compresses it by a sixth, as it does real features."""
    bits = np.random.default_rng(0).standard_normal((rows, *ROW), dtype=np.float32).view(np.uint32)
    values = (bits & np.uint32(0xFFFFFFE0)).view(np.float32)
    with h5py.File(path, "w") as file:
        for name, options in LAYOUTS.items():
            file.create_dataset(name, data=values, **options)


class H5pyBatches(torch.utils.data.Dataset[torch.Tensor]):
    """A common h5py data set: opens the file in each worker; an item is a batch of rows."""

    def __init__(self, path: Path, name: str, batches: list[NDArray[np.int64]]) -> None:
        self.path, self.name, self.batches = path, name, batches
        self.file: h5py.File | None = None

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, i: int) -> torch.Tensor:
        self.file = self.file or h5py.File(self.path)
        rows = self.batches[i]
        dataset = self.file[self.name]
        contiguous = rows[-1] - rows[0] == len(rows) - 1
        return torch.from_numpy(dataset[rows[0] : rows[-1] + 1] if contiguous else dataset[rows])


def readers(path: Path, name: str, rows: int) -> dict[str, Reader]:
    """Readers of the dataset by name; each yields arrays or tensors of rows."""
    runs = np.split(np.arange(rows), range(BATCH, rows, BATCH))
    shuffled = np.split(np.random.default_rng(1).permutation(rows), range(BATCH, rows, BATCH))[:FANCY_BATCHES]
    shuffled = [np.sort(batch) for batch in shuffled]  # h5py takes increasing rows only

    def ours(threads: int, shuffle: bool) -> Reader:
        loader = HDF5Loader(path, name, BATCH, shuffle=shuffle, num_threads=threads)
        for _ in loader:  # the first epoch allocates memory; later ones are timed
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

    by_name: dict[str, Reader] = {
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
        by_name["inflate alone, 1 thread"] = lambda: inflate_alone(path, name)
    if name == "contiguous":
        by_name["pread loop"] = pread
    try:
        import hidefix
    except ImportError:
        return by_name

    def concurrent() -> Iterator[NDArray[np.float32]]:
        dataset = hidefix.Index(str(path)).dataset(name)
        for batch in runs:
            yield dataset[slice(int(batch[0]), int(batch[-1]) + 1), slice(0, ROW[0]), slice(0, ROW[1])]

    by_name["hidefix"] = concurrent
    return by_name


def inflate_alone(path: Path, name: str) -> Iterator[NDArray[np.uint8]]:
    """Upper bound: inflates chunks that are already in memory into one cached buffer."""
    out = np.empty(8 * int(np.prod(ROW)) * 4, np.uint8)
    for stored in _stored_chunks(path, name):
        _native.inflate(stored, out)
        yield out


_in_memory: dict[tuple[Path, str], list[bytes]] = {}


def _stored_chunks(path: Path, name: str) -> list[bytes]:
    if (path, name) not in _in_memory:
        with h5py.File(path) as file:
            dataset = file[name].id
            offsets = [dataset.get_chunk_info(i).chunk_offset for i in range(dataset.get_num_chunks())]
            _in_memory[path, name] = [dataset.read_direct_chunk(offset)[1] for offset in offsets]
    return _in_memory[path, name]


def cpu_seconds() -> float:
    """CPU seconds of this process and of its finished children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def measure(read: Reader) -> tuple[float, float]:
    """Decoded MB per second, and per CPU second."""
    wall, cpu, size = time.perf_counter(), cpu_seconds(), 0
    for part in read():
        size += part.nbytes
    return size / 1e6 / (time.perf_counter() - wall), size / 1e6 / max(cpu_seconds() - cpu, 1e-9)


def compare(path: Path, name: str, rows: int, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Measurements of all readers, alternating, after checking that they read the same values."""
    by_name = readers(path, name, rows)
    with h5py.File(path) as file:
        total = float(file[name][:].sum(dtype=np.float64))
    for reader in ("ours, 1 thread", "ours, shuffled, 2 threads", "hidefix"):
        if reader in by_name:
            sums = (float(np.asarray(part).sum(dtype=np.float64)) for part in by_name[reader]())
            assert sum(sums) == pytest.approx(total)
    speeds: dict[str, list[tuple[float, float]]] = {reader: [] for reader in by_name}
    for _ in range(rounds):
        for reader, read in by_name.items():
            speeds[reader].append(measure(read))
    return speeds


def summary(speeds: dict[str, list[tuple[float, float]]]) -> dict[str, dict[str, float]]:
    """Medians per reader, and the median over rounds of the ratio to h5py."""
    rows = {}
    for reader, values in speeds.items():
        baseline = speeds["h5py, random rows" if "random" in reader or "shuffled" in reader else "h5py"]
        rows[reader] = {
            "mb_per_second": statistics.median(wall for wall, _ in values),
            "mb_per_cpu_second": statistics.median(cpu for _, cpu in values),
            "times_h5py": statistics.median(a[0] / b[0] for a, b in zip(values, baseline, strict=True)),
            "times_h5py_per_cpu_second": statistics.median(a[1] / b[1] for a, b in zip(values, baseline, strict=True)),
        }
    return rows


def filter_options() -> dict[str, dict[str, Any]]:
    """Storage with each compression filter that people use."""
    import hdf5plugin

    return {
        "gzip-4 + shuffle": {"compression": "gzip", "compression_opts": 4, "shuffle": True},
        "lzf": {"compression": "lzf"},
        "lzf + shuffle": {"compression": "lzf", "shuffle": True},
        "lz4": dict(hdf5plugin.LZ4()),
        "zstd": dict(hdf5plugin.Zstd()),
        "zstd + shuffle": {**hdf5plugin.Zstd(), "shuffle": True},
        "bitshuffle": dict(hdf5plugin.Bitshuffle(cname="none")),
        "bitshuffle-lz4": dict(hdf5plugin.Bitshuffle(cname="lz4")),
        "bitshuffle-zstd": dict(hdf5plugin.Bitshuffle(cname="zstd")),
        **{f"blosc-{name}": dict(hdf5plugin.Blosc(cname=name)) for name in ("blosclz", "lz4", "zlib", "zstd")},
        "blosc-lz4, bits": dict(hdf5plugin.Blosc(cname="lz4", shuffle=2)),
        **{f"blosc2-{name}": dict(hdf5plugin.Blosc2(cname=name)) for name in ("blosclz", "lz4", "zlib", "zstd")},
        "blosc2-lz4, bits": dict(hdf5plugin.Blosc2(cname="lz4", filters=2)),
    }


def write_filters(path: Path, rows: int, names: list[str]) -> None:
    """Rows of 16 KB in chunks of 8: a smooth field with noise in the last bits."""
    field = np.cumsum(np.random.default_rng(0).standard_normal((rows, 64, 64), dtype=np.float32), 2)
    field = (field.view(np.uint32) & np.uint32(0xFFFFF000)).view(np.float32)
    with h5py.File(path, "w") as file:
        for name in names:
            file.create_dataset(name, data=field, chunks=(8, 64, 64), **filter_options()[name])


def compare_filter(path: Path, name: str, rows: int, rounds: int) -> list[float]:
    """Ratio of stored to decoded bytes; decoded MB per CPU second of h5py and of the loader, in order and shuffled."""
    runs = np.split(np.arange(rows), range(BATCH, rows, BATCH))
    random = [np.sort(batch) for batch in np.split(np.random.default_rng(1).permutation(rows), range(64, rows, 64))]
    with h5py.File(path) as file:
        dataset = file[name]
        stored, values = dataset.id.get_storage_size() / dataset.nbytes, dataset[()]
    loaders = [HDF5Loader(path, name, BATCH, shuffle=shuffle, num_threads=1) for shuffle in (False, True)]
    for loader in loaders:
        assert loader.stats()["paths"][name] == "native"
        for batch in loader:  # also allocates the memory of later epochs
            assert batch[name].numpy().tobytes() == values[batch["index"].numpy()].tobytes()
    by_reader: list[Reader] = [
        lambda: iter(H5pyBatches(path, name, runs)[i] for i in range(len(runs))),
        lambda: (batch[name] for batch in loaders[0]),
        lambda: iter(H5pyBatches(path, name, random)[i] for i in range(min(4, len(random)))),
        lambda: (batch[name] for batch in loaders[1]),
    ]
    speeds = [[measure(read)[1] for read in by_reader] for _ in range(rounds)]
    return [stored, *(statistics.median(column) for column in zip(*speeds, strict=True))]


def print_filters(path: Path, rows: int, rounds: int, names: list[str]) -> None:
    write_filters(path, rows, names)
    print(f"{_native.codec_libraries()}; decoded MB per CPU second, one thread")
    print(f"{'filter':18}{'stored':>8}{'h5py':>8}{'ours':>8}{'x':>7}{'h5py random':>13}{'ours shuffled':>15}{'x':>7}")
    for name in names:
        stored, a, b, c, d = compare_filter(path, name, rows, rounds)
        print(f"{name:18}{stored:8.2f}{a:8.0f}{b:8.0f}{b / a:7.2f}{c:13.0f}{d:15.0f}{d / c:7.1f}", flush=True)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("loader") / "bench.h5"
    write(path, 2048)
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
def bench_readers(benchmark: Any, file: Path, layout: str) -> None:
    speeds = benchmark.pedantic(compare, args=(file, layout, 2048, 3), rounds=1)
    benchmark.extra_info |= {"inflate": _native.inflate_library(), "h5py": h5py.__version__, **summary(speeds)}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--rows", type=int, default=4096, help="rows of 64.5 KB")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--layouts", nargs="*", default=list(LAYOUTS), choices=list(LAYOUTS))
    options.add_argument("--filters", nargs="*", help="compare these compression filters, or all; rows of 16 KB")
    chosen = options.parse_args()
    print(f"{_native.inflate_library()}, h5py {h5py.__version__}, load average {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "bench.h5"
        if chosen.filters is not None:
            print_filters(path, chosen.rows, chosen.rounds, chosen.filters or list(filter_options()))
            return
        write(path, chosen.rows)
        for name in chosen.layouts:
            print(f"\n{name:32}{'MB/s':>8}{'MB/CPU s':>10}{'x h5py':>9}{'per CPU s':>11}")
            for reader, row in summary(compare(path, name, chosen.rows, chosen.rounds)).items():
                a, b, c, d = row.values()
                print(f"{reader:32}{a:8.0f}{b:10.0f}{c:9.2f}{d:11.2f}")


if __name__ == "__main__":
    main()
