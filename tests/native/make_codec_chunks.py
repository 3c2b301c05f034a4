"""Writes codec_chunks.txt: chunks as HDF5 stores them with each filter, for the C++ tests, which have no compressors.

    python tests/native/make_codec_chunks.py

A line: content (ramp, noise, constant or zero, see test_codecs.cpp), the size of the decoded chunk, the number of
filters, for each its registered number, the number of its client data and these, then the stored bytes in hexadecimal.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin
import numpy as np

SHAPE = (5, 7, 5)  # not a multiple of any block shape of blosc2
CODECS = ("blosclz", "lz4", "lz4hc", "zlib", "zstd")


def contents() -> dict[str, np.ndarray[Any, Any]]:
    size = 4 * int(np.prod(SHAPE))
    i = np.arange(size, dtype=np.uint64)
    return {
        "ramp": (i // 12 * (i % 4 < 2)).astype(np.uint8),
        "noise": ((i * 2654435761 % 2**32) >> 13).astype(np.uint8),
        "constant": np.full(size, 63, np.uint8),
        "zero": np.zeros(size, np.uint8),
    }


def filters() -> Iterator[dict[str, Any]]:
    for shuffle in (False, True):
        yield {"compression": "lzf", "shuffle": shuffle}
        yield {**hdf5plugin.LZ4(nbytes=300), "shuffle": shuffle}
        yield {**hdf5plugin.Zstd(), "shuffle": shuffle, "fletcher32": shuffle}
    for codec in ("none", "lz4", "zstd"):
        yield dict(hdf5plugin.Bitshuffle(nelems=64, cname=codec))
    for codec in CODECS:
        for shuffle in (0, 1, 2):
            yield dict(hdf5plugin.Blosc(cname=codec, clevel=9, shuffle=shuffle))
            yield dict(hdf5plugin.Blosc2(cname=codec, clevel=9, filters=shuffle))
    yield {"compression": 32026, "compression_opts": (0, 256, 0, 0, 1, 1, 5)}  # blosc2, blocks of 256 bytes


def main() -> None:
    lines = []
    for options in filters():
        for name, content in contents().items():
            if name != "ramp" and options["compression"] in (32001, 32026) and options["compression_opts"][6] != 1:
                continue  # one codec of blosc suffices for the other contents
            with h5py.File("chunk.h5", "w", driver="core", backing_store=False) as file:
                data = content.view("<u4").reshape(SHAPE)
                dataset = file.create_dataset("x", data=data, chunks=SHAPE, **options)
                plist = dataset.id.get_create_plist()
                pipeline = [plist.get_filter(i) for i in range(plist.get_nfilters())]
                file.flush()
                mask, stored = dataset.id.read_direct_chunk((0, 0, 0))
            if mask == 0:
                numbers = [len(pipeline)] + [n for code, _, values, _ in pipeline for n in (code, len(values), *values)]
                lines.append(f"{name} {content.size} {' '.join(map(str, numbers))} {stored.hex()}\n")
    Path(__file__).with_name("codec_chunks.txt").write_text("".join(sorted(set(lines))))


if __name__ == "__main__":
    main()
