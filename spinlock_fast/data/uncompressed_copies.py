"""Cache of uncompressed copies of datasets, which later passes and runs read instead of the originals."""

from __future__ import annotations

import hashlib
import logging
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from spinlock_fast.data.loader_pass import LoaderPass
from spinlock_fast.data.row_order import RowOrder
from spinlock_fast.data.shard_index import ShardIndex, index_file
from spinlock_fast.data.sharded_dataset import ShardedDataset, ShardedDatasets
from spinlock_fast.errors import DataError
from spinlock_fast.output.hdf5_files import replacing_hdf5

log = logging.getLogger(__name__)

_BLOCK_BYTES = 32 << 20
_NAME = "rows"


def uncompressed_copies(
    sharded: ShardedDatasets, directory: Path, threads: int, verify_checksums: bool
) -> ShardedDatasets:
    """Replaces compressed and chunked shards by uncompressed copies in `directory`; writes missing copies.

    The file name of a copy contains a hash of the identities (device, inode, size, modification time) of all files that
    hold its values, so a changed file gets a new copy. Copies are written atomically. Contiguous shards are read in
    place.

    Raises:
        DataError: rows cannot be read.
        OutputError: a copy cannot be written.
    """
    copies = []
    for dataset in sharded.datasets:
        shards = []
        for i, shard in enumerate(dataset.shards):
            if shard.native_layout is not None and "offset" in shard.native_layout:
                shards.append(shard)
                continue
            single = ShardedDatasets(
                (sharded.files[i],),
                (sharded.identities[i],),
                (sharded.shard_rows[i],),
                (replace(dataset, shards=(shard,)),),
            )
            copy = _copy(single, directory, threads, verify_checksums)
            shards.append(replace(copy, packing=shard.packing))
        copies.append(replace(dataset, shards=tuple(shards)))
    return replace(sharded, datasets=tuple(copies))


def _copy(sharded: ShardedDatasets, directory: Path, threads: int, verify_checksums: bool) -> ShardIndex:
    (dataset,) = sharded.datasets
    (shard,) = dataset.shards
    identities = shard.identities if shard.backing_files else shard.identity
    key = "\0".join(map(str, (shard.file.name, identities, shard.path, dataset.dtype.str, shard.shape)))
    path = directory / f"{shard.file.stem}.{hashlib.sha256(key.encode(errors='replace')).hexdigest()[:16]}.h5"
    if path.exists():
        try:
            copy = index_file(path, [_NAME])[_NAME]
            if copy.native_layout is not None and (copy.shape, copy.dtype) == (shard.shape, dataset.dtype):
                return copy
        except DataError:
            pass
        log.warning("%s: incomplete copy of %s, rewriting it", path, shard.path)
    log.info("%s: writing an uncompressed copy of %s to %s", shard.file, shard.path, path)
    _write(sharded, dataset, path, threads, verify_checksums)
    return index_file(path, [_NAME])[_NAME]


def _write(sharded: ShardedDatasets, dataset: ShardedDataset, path: Path, threads: int, verify_checksums: bool) -> None:
    block = max(dataset.chunk_rows, _BLOCK_BYTES // dataset.row_bytes)
    block -= block % dataset.chunk_rows
    order = RowOrder(sharded.shard_rows, dataset.chunk_rows, block, block, shuffle=False, seed=0)
    batches = LoaderPass(sharded, order, windows_ahead=2, threads=threads, verify_checksums=verify_checksums)
    with replacing_hdf5(path) as writer, closing(batches):
        rows = writer.file.create_dataset(_NAME, (sharded.rows, *dataset.row_shape), dataset.dtype)
        first = 0
        for batch in batches:
            values = batch[dataset.path].numpy()
            writer.write(rows, first, values)
            first += len(values)
