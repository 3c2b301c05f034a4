"""Peak memory of reading, measured in a separate process."""

from __future__ import annotations

import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
from processes import run_code

ROWS, ROW, CHUNK = 20_000, (64, 63), 8
BUDGET = 64_000_000  # the data are 323 MB

_PEAK = """
import sys
import numpy as np
import torch
from spinlock_fast.config.schema import FamilyConfig, IdentityEncoderParams
from spinlock_fast.data import HDF5Loader
from spinlock_fast.data.feature_source import FeatureSource
from spinlock_fast.features.encode import encode_blocks, make_encoders
from spinlock_fast.features.missing import column_medians

def status(key):
    with open("/proc/self/status") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith(key))

def read(dataset, budget):
    if what == "encode":
        families = {dataset: FamilyConfig(encoder="IdentityEncoder", dataset=dataset)}
        with FeatureSource(path, {dataset: dataset}) as source:
            (family,) = make_encoders(source, families, 0, budget)
            training = np.arange(0, source.rows, 2)
            blocks = encode_blocks(source, family, budget, torch.device("cpu"), training)
            rows = sum(len(block.columns) for block in blocks)
            column_medians(source, family.name, training, budget)
        return rows
    batches = HDF5Loader(path, dataset, shuffle=what == "shuffled", window_rows=1024, memory_budget=budget)
    return sum(len(batch["index"]) for batch in batches)

torch.set_num_threads(1)
path, what, budget = sys.argv[1], sys.argv[2], int(sys.argv[3])
read("few", budget)  # the pages of the libraries are counted when they are first used
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # resets VmHWM
before = status("VmRSS")
rows = read("x", budget)
print(rows, status("VmHWM") - before)
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20,000 generated rows; a few compressed chunks are reused, because writing would take minutes."""
    path = tmp_path_factory.mktemp("memory") / "large.h5"
    random = np.random.default_rng(0)
    chunks = [zlib.compress(random.integers(0, 9, (CHUNK, *ROW)).astype(np.float32).tobytes(), 1) for _ in range(8)]
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset("x", (ROWS, *ROW), np.float32, chunks=(CHUNK, *ROW), compression="gzip")
        for i in range(ROWS // CHUNK):
            dataset.id.write_direct_chunk((i * CHUNK, 0, 0), chunks[i % 8])
        file.create_dataset("few", data=dataset[: 2 * CHUNK], chunks=(CHUNK, *ROW), compression="gzip")
    return path


BESIDE = 40e6  # index, threads and their scratch memory; for an encoder also the columns and masks of a block


@pytest.mark.parametrize("what", ["encode", "sequential", "shuffled"])
def test_memory_stays_within_the_budget(path: Path, tmp_path: Path, what: str) -> None:
    rows, added = map(int, run_code(_PEAK, [str(path), what, str(BUDGET)], tmp_path).split())
    assert rows == ROWS
    assert added < BUDGET + BESIDE
