"""Full disks: status 4, a one-line error, and existing files are kept."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from helpers import largest_file, raises_one_line

from spinlock_fast.checkpoints.directory import save_torch
from spinlock_fast.commands.tensorboard import ScalarFile
from spinlock_fast.errors import OutputError
from spinlock_fast.output.hdf5_files import replacing_hdf5

ROWS = np.arange(40_000, dtype=np.uint16).reshape(-1, 4)


def write(path: Path, **options: Any) -> None:
    with replacing_hdf5(path) as writer:
        out = writer.file.create_dataset("tokens", ROWS.shape, ROWS.dtype, **options)
        for start in range(0, len(ROWS), 1500):
            writer.write(out, start, ROWS[start : start + 1500])


@pytest.mark.parametrize("options", [{"chunks": (1000, 4), "compression": "gzip"}, {"chunks": (1000, 4)}, {}])
def test_hdf5_file_is_written_into_reserved_space(tmp_path: Path, options: dict[str, Any]) -> None:
    path = tmp_path / "t.h5"
    path.write_text("old")
    for size in (100, 50_000, 90_000, 120_000):
        with largest_file(size), raises_one_line(OutputError, "t.h5: cannot be written: File too large"):
            write(path, **options)
        assert path.read_text() == "old"
        assert os.listdir(tmp_path) == [path.name]
    write(path, **options)
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file["tokens"][:], ROWS)
    assert path.stat().st_size < ROWS.nbytes + 20_000, "what was reserved is given back"


def test_disk_full_at_any_block_keeps_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = 0

    def reserve(descriptor: int, start: int, size: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", reserve)
    for blocks in range(7):
        left = blocks
        with raises_one_line(OutputError, "t.h5: cannot be written: No space left on device"):
            write(tmp_path / "t.h5", chunks=(1000, 4))
    assert os.listdir(tmp_path) == []


def test_full_disk_names_the_model_file(tmp_path: Path) -> None:
    for size in (0, 1000, 70_000):
        with largest_file(size), raises_one_line(OutputError, "model.pt: cannot be written: File too large"):
            save_torch(tmp_path / "model.pt", {"weights": torch.zeros(100_000)})
    assert os.listdir(tmp_path) == []


def test_full_disk_while_writing_scalars_is_an_output_error(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="an optional extra")
    with largest_file(10), raises_one_line(OutputError, "tfevents", "File too large"):
        ScalarFile(tmp_path)
    scalars = ScalarFile(tmp_path)
    with largest_file(200), raises_one_line(OutputError, "tfevents", "File too large"):
        for step in range(100):
            scalars.add({"loss": 1.0}, step)
    scalars.close()


def test_tensorboard_reads_the_scalars(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    scalars = ScalarFile(tmp_path)
    for step in range(3):
        scalars.add({"train/loss": 0.5 * step, "train/utilization": 1.0}, step)
    scalars.close()
    read = accumulator.EventAccumulator(str(tmp_path))
    read.Reload()
    assert [(event.step, event.value) for event in read.Scalars("train/loss")] == [(0, 0.0), (1, 0.5), (2, 1.0)]
