"""`torchrun -m spinlock_fast.train`: real processes, signals, a killed rank, resumption by other numbers of ranks."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from helpers import SMALL_SETTINGS, write_arrays
from processes import Ranks

from spinlock_fast.checkpoints.directory import load_torch
from spinlock_fast.checkpoints.run_directory import FINAL, METRICS, PARTIAL, unfinished
from spinlock_fast.distributed import process_group
from spinlock_fast.train import main as train_main

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("torchrun")
    x = np.random.default_rng(1).standard_normal((203, 2)).repeat(8, axis=1)
    x += 0.3 * np.random.default_rng(2).standard_normal(x.shape)
    data = write_arrays(directory / "x.h5", {"x": x.astype(np.float32)})
    path = directory / "run.yaml"
    logging = {"tensorboard": False, "csv": True}
    path.write_text(yaml.safe_dump({**SMALL_SETTINGS, "dataset_path": str(data), "logging": logging}))
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


def final_weights(directory: Path) -> dict[str, torch.Tensor]:
    return dict(load_torch(directory / FINAL)["model_state_dict"])


def assert_every_epoch_once(directory: Path) -> None:
    rows = (directory / "scalars.csv").read_text().splitlines()[1:]
    assert [row.split(",")[0] for row in rows] == ["1", "2", "3", "4"]


def assert_same_weights(one: Path, other: Path) -> None:
    """Equal within rounding, relative to the norm.

    Where a gradient nearly vanishes, Adam turns its rounding into a part of a step of size `lr`: biases differ by up to
    2e-5, depending on the processor. One of the twelve steps left out changes each tensor by 2.6e-4 to 0.12.
    """
    weights, others = final_weights(one), final_weights(other)
    for name, value in weights.items():
        difference = float((others[name].double() - value.double()).norm() / value.double().norm().clamp(min=1e-3))
        assert difference <= 1e-4, f"{name}: {difference:.2g}"


@pytest.fixture(scope="module")
def alone(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    directory = tmp_path_factory.mktemp("alone") / "run"
    train_alone(config, "--output", directory)
    return directory


def train_alone(*arguments: object) -> None:
    with pytest.raises(SystemExit) as ended:
        train_main(["--quiet", *map(str, arguments)])
    assert ended.value.code == 0


def test_two_ranks_write_one_result(config: Path, alone: Path, tmp_path: Path) -> None:
    ranks = Ranks([("train", (config, "--output", tmp_path / "run"))], 2, tmp_path / "outputs")
    assert ranks.join() == [0, 0], ranks.stderr(0) + ranks.stderr(1)
    assert ranks.stdout(0).endswith(f"checkpoint: {tmp_path / 'run'}\n")
    assert ranks.stdout(1) == ""
    assert ranks.stderr(1) == ""
    assert json.loads((tmp_path / "run" / METRICS).read_text())["ranks"] == 2
    assert_same_weights(alone, tmp_path / "run")
    assert_every_epoch_once(tmp_path / "run")


def test_rank_0_prints_the_plan_of_a_dry_run(config: Path, tmp_path: Path) -> None:
    arguments = (config, "--dry-run", "--output", tmp_path / "run")
    ranks = Ranks([("train", arguments)], 2, tmp_path / "outputs")
    assert ranks.join() == [0, 0], ranks.stderr(0) + ranks.stderr(1)
    assert ", by 2 ranks\n" in ranks.stdout(0)
    assert ranks.stdout(1) == ""
    assert not (tmp_path / "run").exists()


SAVE_OFTEN = ("--set", "training.save_minutes=0.0005")


def test_signal_on_one_rank_stops_all_at_the_same_step(config: Path, alone: Path, tmp_path: Path) -> None:
    """The state of two ranks is continued by one process, and equals its uninterrupted run."""
    output = tmp_path / "run"
    ranks = Ranks([("train", (config, "--output", output, *SAVE_OFTEN))], 2, tmp_path / "outputs")
    wait_for(lambda: unfinished(output), ranks)
    ranks.signal(1, signal.SIGTERM)
    assert ranks.join() == [143, 143], ranks.stderr(0) + ranks.stderr(1)
    assert f"--resume {output}" in ranks.stderr(0)
    train_alone("--resume", output)
    assert_same_weights(alone, output)
    assert_every_epoch_once(output)


def test_killed_rank_ends_the_others_and_the_run_resumes_on_more_ranks(
    config: Path, alone: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    ranks = Ranks([("train", (config, "--output", output, *SAVE_OFTEN))], 2, tmp_path / "outputs")
    wait_for(lambda: unfinished(output), ranks)
    ranks.signal(1, signal.SIGKILL)
    assert ranks.join() == [1, -9]
    last = ranks.stderr(0).splitlines()[-1]
    assert last.startswith("error: rank 0 of 2 lost contact with another rank")
    ranks = Ranks([("train", (config, "--output", output, "--resume", "auto"))], 3, tmp_path / "outputs")
    assert ranks.join() == [0, 0, 0], ranks.stderr(0)
    assert_same_weights(alone, output)
    assert_every_epoch_once(output)


def test_rank_that_does_not_answer_ends_the_job(config: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    arguments = (config, "--output", output, *SAVE_OFTEN)
    ranks = Ranks([("train", arguments)], 2, tmp_path / "outputs", SPINLOCK_FAST_DISTRIBUTED_TIMEOUT="2")
    wait_for(lambda: unfinished(output), ranks)
    ranks.signal(1, signal.SIGSTOP)
    ranks.processes[0].join(30)
    assert ranks.processes[0].exitcode == 1
    assert "did not answer within 2 s (SPINLOCK_FAST_DISTRIBUTED_TIMEOUT)" in ranks.stderr(0)
    ranks.join(0.0)
    assert unfinished(output)


def test_error_of_all_ranks_is_printed_once(tmp_path: Path) -> None:
    ranks = Ranks([("train", (tmp_path / "missing.yaml",))], 2, tmp_path / "outputs")
    assert ranks.join() == [2, 2]
    assert ranks.stderr(0) == f"error: {tmp_path / 'missing.yaml'}: no such configuration file\n"
    assert ranks.stderr(1) == ""


def wait_for(condition: Callable[[], bool], ranks: Ranks) -> None:
    deadline = time.monotonic() + 60.0
    while not condition():
        assert all(process.is_alive() for process in ranks.processes), ranks.stderr(0) + ranks.stderr(1)
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_each_attempt_of_torchrun_has_keys_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The store of torchrun outlives a restart, with the addresses of the ranks that have ended."""
    shared, used = dist.HashStore(), []
    module = importlib.import_module("torch.distributed.rendezvous")  # the attribute of this name is a function
    monkeypatch.setattr(module, "rendezvous", lambda *_, **__: iter([(shared, 0, 2)]))
    monkeypatch.setattr(dist, "init_process_group", lambda *_, store, **__: used.append(store))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    for name, value in {"WORLD_SIZE": 2, "RANK": 0, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    for attempt in range(2):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
        with process_group():
            assert not used[-1].check(["address"])
            used[-1].set("address", "127.0.0.1")


@pytest.mark.slow
def test_torchrun_restarts_after_a_killed_rank(config: Path, alone: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    arguments = config, "--output", output, "--resume", "auto", *SAVE_OFTEN
    with torchrun(2, *arguments, options=("--max-restarts", "1")) as process:
        while not unfinished(output):
            assert process.poll() is None, process.communicate()[1][-2000:]
            time.sleep(0.02)
        os.kill(rank_process(process.pid, 1), signal.SIGKILL)
        stdout, stderr = process.communicate(timeout=90)
    assert process.returncode == 0, stderr
    assert "exitcode: -9" in stderr
    assert f"checkpoint: {output}" in stdout
    assert not (output / PARTIAL).exists()
    assert_same_weights(alone, output)


@pytest.mark.slow
def test_torchrun_reports_one_line_of_our_own(tmp_path: Path) -> None:
    with torchrun(2, tmp_path / "missing.yaml") as process:
        _, stderr = process.communicate(timeout=120)
    assert process.returncode != 0
    assert stderr.count("missing.yaml") == 1
    assert "/spinlock_fast/" not in stderr  # a traceback of torchrun itself is expected
