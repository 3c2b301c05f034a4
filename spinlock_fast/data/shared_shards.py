"""Shards that rank 0 of a distributed run opens for all ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch.utils.data import get_worker_info

from spinlock_fast.data.input_files import FileIdentity, identify
from spinlock_fast.data.remote_files import RemoteFile, register, remote_files
from spinlock_fast.data.shard_index import ShardIndex
from spinlock_fast.data.sharded_dataset import ShardedDatasets
from spinlock_fast.distributed import SINGLE, Ranks, current_ranks
from spinlock_fast.errors import DataError


def ranks_of_share(rank: int, world_size: int) -> Ranks:
    """The ranks of this distributed run if they read parts `rank` of `world_size`; else this process alone.

    Worker processes of a DataLoader take no part in collective operations.
    """
    ranks = current_ranks()
    return ranks if (ranks.rank, ranks.size) == (rank, world_size) and get_worker_info() is None else SINGLE


def open_once(ranks: Ranks, open_shards: Callable[[], ShardedDatasets]) -> ShardedDatasets:
    """Calls `open_shards` on rank 0 and gives its result to all ranks, or raises its error on all ranks.

    The files of other hosts are compared by one file per file system: if it is another one there, such as a copy on a
    local disk, this rank opens its own files.
    """
    if ranks.size == 1:
        return open_shards()

    def open_on_main() -> tuple[ShardedDatasets, dict[Path, RemoteFile]]:
        sharded = open_shards()
        return sharded, remote_files(sharded.files)

    sharded, remote = ranks.on_main(open_on_main)
    if ranks.is_main:
        return sharded
    register(remote)
    return _on_this_host(sharded) or open_shards()


def _on_this_host(sharded: ShardedDatasets) -> ShardedDatasets | None:
    """The same shards with the device numbers of this host; None if the files differ here."""
    devices: dict[int, int] = {0: 0}  # 0: copies of remote files
    for dataset in sharded.datasets:
        for shard in dataset.shards:
            places = [(shard.file, shard.identity), (shard.storage_file, shard.storage_identity)]
            places += [(backing.path, backing.identity) for backing in shard.backing_files]
            places += [(segment.file, segment.identity) for segment in shard.virtual_segments]
            for path, identity in places:
                if identity.device in devices:
                    continue
                try:
                    here = identify(path)
                except DataError:
                    return None
                if replace(here, device=identity.device) != identity:
                    return None
                devices[identity.device] = here.device
    if all(there == here for there, here in devices.items()):
        return sharded

    def moved(identity: FileIdentity) -> FileIdentity:
        return replace(identity, device=devices[identity.device])

    def moved_shard(shard: ShardIndex) -> ShardIndex:
        backing = tuple(replace(file, identity=moved(file.identity)) for file in shard.backing_files)
        return replace(
            shard,
            identity=moved(shard.identity),
            storage_identity=moved(shard.storage_identity),
            backing_files=backing,
            virtual_segments=tuple(
                replace(segment, identity=moved(segment.identity)) for segment in shard.virtual_segments
            ),
        )

    datasets = tuple(replace(dataset, shards=tuple(map(moved_shard, dataset.shards))) for dataset in sharded.datasets)
    return replace(sharded, identities=tuple(map(moved, sharded.identities)), datasets=datasets)
