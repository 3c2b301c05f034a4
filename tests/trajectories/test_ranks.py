"""Features extracted by several ranks are those of one process, also after interruptions."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from processes import Ranks, run_on_ranks
from trajectory_files import smooth_fields

from spinlock_fast.trajectories.extraction import extract
from spinlock_fast.trajectories.options import Options

ARRAY = ("--axes", "n t c y x", "--device", "cpu")


def assert_same(a: Path, b: Path) -> None:
    assert a.read_bytes() == b.read_bytes()


def one_process(array: Path, output: Path) -> Path:
    return extract(str(array), output, options=Options(axes="n t c y x"))


def test_the_file_is_that_of_one_process(tmp_path: Path) -> None:
    """Also with fewer trajectories than ranks; nothing else is left."""
    for samples, count in ((11, 2), (2, 3)):
        directory = tmp_path / str(samples)
        directory.mkdir()
        np.save(directory / "fields.npy", smooth_fields(samples=samples))
        arguments = [directory / "fields.npy", *ARRAY, "--output", directory / "together.h5"]
        ended = run_on_ranks([("extract", arguments)], count, tmp_path)
        assert ended.statuses == [0] * count, ended.stderr
        assert ended.stdout == f"features: {directory / 'together.h5'}\n"
        assert ended.stderr.count(f"{samples} of {samples} samples") == 1
        assert_same(one_process(directory / "fields.npy", directory / "alone.h5"), directory / "together.h5")
        assert sorted(path.name for path in directory.iterdir()) == ["alone.h5", "fields.npy", "together.h5"]


@pytest.mark.slow
def test_a_stopped_run_is_resumed_by_another_number_of_ranks(tmp_path: Path) -> None:
    np.save(tmp_path / "fields.npy", smooth_fields(samples=300, extents=(24, 24)))
    output = tmp_path / "f.h5"
    arguments = [tmp_path / "fields.npy", *ARRAY, "--output", output]
    partial = tmp_path / "f.h5.partial"

    def stop_the_last(ranks: Ranks) -> None:
        while not len(list(partial.glob("*.npz"))):
            time.sleep(0.005)
        ranks.signal(1, signal.SIGTERM)

    ended = run_on_ranks([("extract", arguments)], 2, tmp_path, stop_the_last)
    # Rank 0 gets a signal when rank 1 has ended, unless it has described its share before and waits for rank 1.
    assert ended.statuses in ([143, 143], [1, 143]), ended.stderr
    assert re.search(r"error: (rank 1: )?stopped; ", ended.stderr), ended.stderr
    kept = set(partial.glob("*.npz"))
    assert kept
    ended = run_on_ranks([("extract", [*arguments, "--resume"])], 3, tmp_path)
    assert ended.statuses == [0, 0, 0], ended.stderr
    assert not partial.exists()
    assert_same(one_process(tmp_path / "fields.npy", tmp_path / "alone.h5"), output)
