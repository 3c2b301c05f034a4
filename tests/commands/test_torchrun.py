"""`torchrun -m spinlock_fast.train`: real processes, signals, a killed rank, resumption by other numbers of ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import write_arrays

from spinlock_fast.checkpoints.directory import load_torch
from spinlock_fast.checkpoints.run_directory import FINAL, METRICS, PARTIAL, unfinished

pytestmark = pytest.mark.dist

CONFIGURATION = {
    "device": "cpu",
    "families": {"mine": {"encoder": "IdentityEncoder", "dataset": "x"}},
    "training": {
        "batch_size": 64,
        "topo_samples": 64,
        "num_epochs": 4,
        "val_every_n_epochs": 2,
        "save_every": 1,
        "orthogonality_target": 10.0,
    },
    "logging": {"tensorboard": False},
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("torchrun")
    x = np.random.default_rng(1).standard_normal((203, 2)).repeat(8, axis=1)
    x += 0.3 * np.random.default_rng(2).standard_normal(x.shape)
    data = write_arrays(directory / "x.h5", {"x": x.astype(np.float32)})
    path = directory / "run.yaml"
    path.write_text(yaml.safe_dump({"dataset_path": str(data), **CONFIGURATION}))
    return path


@contextmanager
def torchrun(world: int, *arguments: object, options: tuple[str, ...] = ()) -> Iterator[subprocess.Popen[str]]:
    """`torchrun -m spinlock_fast.train` in a process group of its own, which is killed at the end."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world), *options]
    command += ["-m", "spinlock_fast.train", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SPINLOCK_FAST_DISTRIBUTED_TIMEOUT": "60"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    try:
        yield process
    finally:
        for pid in [process.pid, *descendants(process.pid)]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


def train(world: int, *arguments: object, options: tuple[str, ...] = ()) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of a finished run."""
    with torchrun(world, *arguments, options=options) as process:
        stdout, stderr = process.communicate(timeout=120)
        return process.returncode, stdout, stderr


def descendants(pid: int) -> list[int]:
    """Process numbers of the children of a process, in the order of their start, and of their children."""
    children: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*"):
        with suppress(OSError):
            children += [int(child) for child in (task / "children").read_text().split()]
    return [number for child in sorted(children) for number in (child, *descendants(child))]


def rank_process(launcher: int, rank: int) -> int:
    """The process of a rank."""
    for pid in descendants(launcher):
        try:
            if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                return pid
        except OSError:
            pass
    raise AssertionError(f"rank {rank} does not run")


def wait_for(condition: object, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60.0
    while not condition():  # type: ignore[operator]
        assert process.poll() is None, process.communicate()[1][-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def final_weights(directory: Path) -> dict[str, torch.Tensor]:
    return dict(load_torch(directory / FINAL)["model_state_dict"])


def assert_same_weights(one: Path, other: Path) -> None:
    weights, others = final_weights(one), final_weights(other)
    for name, value in weights.items():
        torch.testing.assert_close(others[name], value, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def alone(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    directory = tmp_path_factory.mktemp("alone") / "run"
    status, _, stderr = train(1, config, "--quiet", "--output", directory)
    assert status == 0, stderr
    return directory


def test_two_ranks_write_one_result(config: Path, alone: Path, tmp_path: Path) -> None:
    status, stdout, stderr = train(2, config, "--output", tmp_path / "run")
    assert status == 0, stderr
    assert stdout.count("checkpoint:") == 1
    assert stdout.endswith(f"checkpoint: {tmp_path / 'run'}\n")
    assert stderr.count("training") <= 2  # one display
    assert json.loads((tmp_path / "run" / METRICS).read_text())["ranks"] == 2
    assert_same_weights(alone, tmp_path / "run")


def test_signal_on_one_rank_stops_all_and_the_run_resumes_elsewhere(config: Path, alone: Path, tmp_path: Path) -> None:
    """The state of two ranks is continued by one process, and equals its uninterrupted run."""
    output = tmp_path / "run"
    with torchrun(2, config, "--output", output, "--set", "training.save_minutes=0.0005") as process:
        wait_for(lambda: unfinished(output), process)
        os.kill(rank_process(process.pid, 1), signal.SIGTERM)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode != 0
    assert f"--resume {output}" in stderr
    assert "Traceback" not in stderr.split("torch.distributed.elastic")[0]
    assert unfinished(output)
    status, _, stderr = train(1, "--quiet", "--resume", output)
    assert status == 0, stderr
    assert_same_weights(alone, output)


def test_killed_rank_ends_the_job_and_a_restart_goes_on(config: Path, alone: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    arguments = config, "--output", output, "--resume", "auto", "--set", "training.save_minutes=0.0005"
    with torchrun(2, *arguments, options=("--max-restarts", "1")) as process:
        wait_for(lambda: unfinished(output), process)
        os.kill(rank_process(process.pid, 1), signal.SIGKILL)
        stdout, stderr = process.communicate(timeout=90)
    assert process.returncode == 0, stderr
    assert "rank: 1" in stderr or "local_rank: 1" in stderr or "exitcode: -9" in stderr
    assert f"checkpoint: {output}" in stdout
    assert not (output / PARTIAL).exists()
    assert_same_weights(alone, output)


def test_error_of_all_ranks_is_printed_once(tmp_path: Path) -> None:
    status, _, stderr = train(2, tmp_path / "missing.yaml")
    assert status != 0
    assert stderr.count("error: ") == 1
    assert "missing.yaml" in stderr
    assert list(tmp_path.iterdir()) == []
