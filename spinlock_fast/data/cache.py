"""Datasets decoded once: uncompressed copies of them, which later passes and later runs read instead."""

from __future__ import annotations

import hashlib
import logging
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from spinlock_fast.data.index import ShardIndex, index_file
from spinlock_fast.data.order import RowOrder
from spinlock_fast.data.reading import LoaderPass, PassStats, batch_memory
from spinlock_fast.data.table import Table, Tables
from spinlock_fast.errors import DataError
from spinlock_fast.output.hdf5_files import replacing_hdf5

log = logging.getLogger(__name__)

_BLOCK_BYTES = 32 << 20
_NAME = "rows"


def decoded_once(tables: Tables, directory: Path, threads: int, verify_checksums: bool) -> Tables:
    """The same rows from uncompressed files in `directory`, which are written first where they are missing.

    A copy belongs to one dataset of one file as it is now (device, inode, size, time of change; those of linked
    and virtual sources as well); it is written under another name and renamed when it is whole. What is stored
    uncompressed already is read where it is.

    Raises:
        DataError: rows cannot be read.
        OutputError: a copy cannot be written.
    """
    copies = []
    for table in tables.tables:
        shards = []
        for i, shard in enumerate(table.shards):
            if shard.native is not None and "offset" in shard.native:
                shards.append(shard)
                continue
            one = Tables(
                (tables.files[i],), (tables.identities[i],), (tables.shard_rows[i],), (replace(table, shards=(shard,)),)
            )
            copy = _copy(one, directory, threads, verify_checksums)
            shards.append(replace(copy, packing=shard.packing))
        copies.append(replace(table, shards=tuple(shards)))
    return replace(tables, tables=tuple(copies))


def _copy(tables: Tables, directory: Path, threads: int, verify_checksums: bool) -> ShardIndex:
    (table,) = tables.tables
    (shard,) = table.shards
    of_files = shard.identities if shard.backing else shard.identity
    key = "\0".join(map(str, (shard.file.name, of_files, shard.path, table.dtype.str, shard.shape)))
    path = directory / f"{shard.file.stem}.{hashlib.sha256(key.encode(errors='replace')).hexdigest()[:16]}.h5"
    if path.exists():
        try:
            found = index_file(path, [_NAME])[_NAME]
            if found.native is not None and (found.shape, found.dtype) == (shard.shape, table.dtype):
                return found
        except DataError:
            pass
        log.warning("%s: not a whole copy of %s, written anew", path, shard.path)
    log.info("%s: writing an uncompressed copy of %s: %s", shard.file, shard.path, path)
    _write(tables, table, path, threads, verify_checksums)
    return index_file(path, [_NAME])[_NAME]


def _write(tables: Tables, table: Table, path: Path, threads: int, verify_checksums: bool) -> None:
    block = max(table.chunk_rows, _BLOCK_BYTES // table.row_bytes)
    block -= block % table.chunk_rows
    order = RowOrder(tables.shard_rows, table.chunk_rows, block, block, shuffle=False, seed=0)
    batches = LoaderPass(
        tables,
        order,
        epoch=0,
        first_batch=0,
        ahead=2,
        threads=threads,
        verify_checksums=verify_checksums,
        memory=batch_memory(tables, order, 2, pin=False),
        stats=PassStats(),
    )
    with replacing_hdf5(path) as writer, closing(batches):
        rows = writer.file.create_dataset(_NAME, (tables.rows, *table.row_shape), table.dtype)
        first = 0
        for batch in batches:
            values = batch[table.path].numpy()
            writer.write(rows, first, values)
            first += len(values)
