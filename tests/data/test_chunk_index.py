"""The chunk index of large datasets: memory, time, and chunks listed in several blocks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hdf5_layouts import check
from processes import run_code

from spinlock_fast.data import native_layout

CHUNKS = 2_000_000
INDEX_BYTES = 200e6
LISTINGS = 2.5  # CPU time of the index, by that of h5py's listing of the chunks alone; measured: 1.5 to 1.9


@pytest.mark.parametrize("version", ["earliest", "latest"])
def test_chunks_are_listed_in_blocks(tmp_path: Path, version: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_layout, "_LISTED_CHUNKS", 7)
    with h5py.File(tmp_path / "a.h5", "w", libver=version) as file:
        x = file.create_dataset("x", (50, 3, 5), "f4", chunks=(4, 2, 3), compression="gzip", fillvalue=-1.0)
        x[:30] = np.random.default_rng(0).normal(size=(30, 3, 5))
        file["y"] = np.arange(50)
    check([str(tmp_path / "a.h5")], ["x", "y"], "native")


# The kernel counts the peak anew after a write to clear_refs.
CODE = """
import json, sys, time
from pathlib import Path
import h5py
from spinlock_fast.data.shard_index import index_file

def peak():
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024

with h5py.File(sys.argv[1]) as file:
    started = time.process_time()
    file["x"].id.chunk_iter(lambda chunk: None)
    listing = time.process_time() - started
index_file(Path(sys.argv[1]), ["small"])
Path("/proc/self/clear_refs").write_text("5")
memory, seconds = peak(), time.process_time()
index = index_file(Path(sys.argv[1]), ["x"])["x"]
print(json.dumps([peak() - memory, time.process_time() - seconds, listing, len(index.native_layout["offsets"])]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("version", ["earliest", "latest"])
def test_index_of_two_million_chunks(tmp_path: Path, version: Any) -> None:
    rows = CHUNKS // 20
    with h5py.File(tmp_path / "a.h5", "w", libver=version) as file:
        file.create_dataset("small", data=np.zeros((10, 1)), chunks=(1, 1))
        x = file.create_dataset("x", (CHUNKS, 1), "u1", chunks=(1, 1))
        for first in range(0, CHUNKS, rows):
            x[first : first + rows] = np.ones((rows, 1), "u1")
    memory, seconds, listing, chunks = json.loads(run_code(CODE, [str(tmp_path / "a.h5")], tmp_path, seconds=300.0))
    assert chunks == CHUNKS
    assert memory < INDEX_BYTES
    assert seconds < LISTINGS * listing
