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

torch.set_num_threads(1)
path, what, budget = sys.argv[1], sys.argv[2], int(sys.argv[3])
before = status("VmRSS")
rows = 0
if what == "encode":
    families = {"x": FamilyConfig(encoder="IdentityEncoder", dataset="x")}
    with FeatureSource(path, {"x": "x"}) as source:
        (family,) = make_encoders(source, families, 0, budget)
        training = np.arange(0, source.rows, 2)
        for block in encode_blocks(source, family, budget, torch.device("cpu"), training):
            rows += len(block.columns)
        column_medians(source, family.name, training, budget)
else:
    for batch in HDF5Loader(path, "x", shuffle=what == "shuffled", window_rows=1024, memory_budget=budget):
        rows += len(batch["index"])
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
    return path


# Memory besides the rows: index, threads and their scratch memory, libraries that torch loads on first use; for an
# encoder also the columns and masks of a block. Far less than the data in every case.
@pytest.mark.parametrize(("what", "beside"), [("encode", 100e6), ("sequential", 40e6), ("shuffled", 40e6)])
def test_memory_stays_within_the_budget(path: Path, tmp_path: Path, what: str, beside: float) -> None:
    rows, added = map(int, run_code(_PEAK, [str(path), what, str(BUDGET)], tmp_path).split())
    assert rows == ROWS
    assert added < BUDGET + beside
