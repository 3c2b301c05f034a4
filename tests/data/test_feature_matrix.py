import os
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from helpers import largest_file
from processes import run_ranks

from spinlock_fast import _native
from spinlock_fast.data import checksums, feature_matrix
from spinlock_fast.data.checksums import fletcher32_of_rows
from spinlock_fast.data.feature_matrix import FeatureMatrix, is_kept_on_disk
from spinlock_fast.data.mapped_pages import MappedPages
from spinlock_fast.data.row_view import RowView
from spinlock_fast.distributed import current_ranks
from spinlock_fast.errors import ConfigError, OutputError

ROWS, COLUMNS, KEPT = 5000, 7, 3


def values(rows=ROWS, columns=COLUMNS):
    return np.random.default_rng(0).standard_normal((rows, columns)).astype(np.float32)


def halved(block):
    return np.ascontiguousarray(block[:, [0, 4, 6]]) / 2


@pytest.mark.parametrize("on_disk", [False, True])
def test_rows_are_replaced_in_place_by_narrower_ones(tmp_path, monkeypatch, on_disk):
    monkeypatch.setattr(feature_matrix, "_REWRITTEN_ROWS", 1024)
    matrix = FeatureMatrix(ROWS, COLUMNS, tmp_path if on_disk else None)
    for start in range(0, ROWS, 999):
        matrix.write(start, values()[start : start + 999, :2], slice(0, 2))
        matrix.write(start, values()[start : start + 999, 2:], slice(2, None))
    np.testing.assert_array_equal(matrix.x, values())
    matrix.rewrite(halved, KEPT)
    np.testing.assert_array_equal(matrix.x, halved(values()))
    assert matrix.x.flags.c_contiguous
    assert not os.listdir(tmp_path)  # the file has no name
    matrix.to_memory()
    np.testing.assert_array_equal(matrix.x, halved(values()))


def test_rows_outlive_the_matrix(tmp_path):
    matrix = FeatureMatrix(ROWS, COLUMNS, tmp_path)
    matrix.write(0, values())
    x = matrix.x
    del matrix
    np.testing.assert_array_equal(x, values())


def test_a_full_disk_is_one_line_before_anything_is_written(tmp_path):
    expected = pytest.raises(OutputError, match=r"the encoded features need 140 kB of disk: File too large")
    with largest_file(100_000), expected:
        FeatureMatrix(ROWS, COLUMNS, tmp_path)
    assert not os.listdir(tmp_path)


def test_a_file_left_by_a_killed_process_is_removed(tmp_path):
    name = feature_matrix.create_temporary(tmp_path / "features")
    process = os.getpid()
    dead = next(number for number in range(2**22, 2**22 + 9) if number != process)
    name.rename(tmp_path / name.name.replace(f"-{process}-", f"-{dead}-"))
    FeatureMatrix(ROWS, COLUMNS, tmp_path)
    assert not os.listdir(tmp_path)


def test_where_the_matrix_is_kept():
    assert is_kept_on_disk(1000, 10, "auto", 79_999)
    assert not is_kept_on_disk(1000, 10, "auto", 80_000)
    assert is_kept_on_disk(1, 1, "disk", 10**9)
    assert not is_kept_on_disk(10**9, 10, "memory", 1)


def resident_file_bytes():
    with open("/proc/self/status") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith("RssFile"))


def test_read_pages_of_a_map_are_released(tmp_path):
    x = np.memmap(tmp_path / "x", np.float32, "w+", shape=(1_500_000, 64))  # 384 MB, sparse
    x[-1] = 7.0
    before, most = resident_file_bytes(), 0
    view = RowView(x)
    for start in range(0, len(x), 50_000):
        block = view[start : start + 50_000]
        most = max(most, resident_file_bytes() - before)
    assert (block[-1] == 7.0).all()
    assert most < 160e6
    assert view.is_mapped
    private = np.memmap(tmp_path / "x", np.float32, "c", shape=x.shape)
    private[0] = 5.0
    MappedPages(private).release()
    assert (private[0] == 5.0).all()  # would be lost with its page
    assert not MappedPages(private).is_mapped


@pytest.mark.parametrize("rows", [1, 1000, 1001])
@pytest.mark.parametrize("fill", [None, 0.0, -np.nan])
def test_checksum_of_blocks(monkeypatch, rows, fill):
    monkeypatch.setattr(checksums, "_BLOCK_BYTES", 4000)
    x = values(rows) if fill is None else np.full((rows, COLUMNS), fill, np.float32)
    assert fletcher32_of_rows(RowView(x)) == _native.fletcher32(x)


def share(rank, directory):
    os.chdir(directory)
    dist.init_process_group("gloo", init_method=f"file://{directory}/group", rank=rank, world_size=2)
    ranks = current_ranks()
    feature_matrix._REWRITTEN_ROWS = 1024
    checksums._BLOCK_BYTES = 4000
    matrix = FeatureMatrix(ROWS, COLUMNS, Path("."), ranks)
    part = ranks.share(ROWS)
    matrix.write(part.start, values()[part])
    matrix.synchronize()
    np.testing.assert_array_equal(matrix.x, values())
    matrix.rewrite(halved, KEPT)
    np.testing.assert_array_equal(matrix.x, halved(values()))
    assert fletcher32_of_rows(RowView(matrix.x), ranks) == _native.fletcher32(halved(values()))
    os.mkdir(str(rank))
    os.chdir(str(rank))  # the same relative path, on each rank another directory
    with pytest.raises(ConfigError, match=r"rank 1 on .* cannot open .*: all ranks must share"):
        FeatureMatrix(ROWS, COLUMNS, Path("."), ranks)
    with pytest.raises(OutputError, match=r"missing: the encoded features need"):  # on both ranks
        FeatureMatrix(ROWS, COLUMNS, Path("missing"), ranks)
    assert not os.listdir(".")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.dist
def test_ranks_share_the_file(tmp_path):
    run_ranks(share, (str(tmp_path),), 2)
    assert sorted(os.listdir(tmp_path)) in (["0", "1"], ["0", "1", "group"])
