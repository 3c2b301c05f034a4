"""Prints a SHA-256 checksum of each features dataset of a data set, to compare sets that were made on two machines.

    python -m benchmarks.data.feature_checksums data/10k_0.h5 data/10k_1.h5 ...

The bytes are those of the stored values (little-endian, NaN as stored) in row order, files in the order given, so the
checksum depends neither on compression and chunks nor on the number of shards.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence

import h5py
import numpy as np

_BLOCK_ROWS = 512


def dataset_names(path: str) -> list[str]:
    """Datasets below `features`, and `parameters/params`, sorted."""
    names: list[str] = []
    with h5py.File(path) as file:
        file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
    return sorted(name for name in names if name.startswith("features/") or name == "parameters/params")


def checksum(paths: Sequence[str], name: str) -> tuple[str, tuple[int, ...]]:
    """SHA-256 of a dataset over all files, and its shape."""
    digest, rows = hashlib.sha256(), 0
    for path in paths:
        with h5py.File(path) as file:
            dataset = file[name]
            for start in range(0, len(dataset), _BLOCK_ROWS):
                values = dataset[start : start + _BLOCK_ROWS]
                digest.update(np.ascontiguousarray(values, values.dtype.newbyteorder("<")).tobytes())
            rows += len(dataset)
            shape = dataset.shape[1:]
    return digest.hexdigest(), (rows, *shape)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE.h5")
    paths = parser.parse_args(argv).files
    for name in dataset_names(paths[0]):
        digest, shape = checksum(paths, name)
        print(f"{digest}  {name}  {list(shape)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
