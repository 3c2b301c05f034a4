"""SIGKILL at random moments of `train`, `generate` and `tokenize`: results stay complete, runs can be resumed."""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import yaml
from helpers import planted_matrix, write_arrays
from processes import forkserver

from spinlock_fast.checkpoints.directory import load_checkpoint, load_torch
from spinlock_fast.checkpoints.run_directory import FINAL, unfinished
from spinlock_fast.commands.main import command_of

MANY, SOME = 50, 20
CONFIG: dict[str, Any] = {
    "device": "cpu",
    "families": {"mine": {"encoder": "IdentityEncoder", "dataset": "x"}},
    "training": {
        "batch_size": 32,
        "topo_samples": 32,
        "num_epochs": 12,
        "val_every_n_epochs": 3,
        "save_every": 1,
        "orthogonality_target": 10.0,
    },
    "logging": {"tensorboard": False},
}
GENERATOR = {"grid_size": 32, "num_timesteps": 64, "num_realizations": 1, "workers": 1}


def command(verb: str, arguments: list[str]) -> None:
    """Runs a command in a process of its own, without its messages."""
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    command_of(verb)(arguments)


class Killer:
    """Runs commands, and kills some after a random part of the time that a complete run takes."""

    def __init__(self, seed: int) -> None:
        self._context = forkserver()
        server = self._context.Process(target=time.sleep, args=(0.0,))  # so the first command's time excludes its start
        server.start()
        server.join()
        self._random = random.Random(seed)
        self._seconds: dict[str, float] = {}
        self.kills = 0

    def complete(self, verb: str, *arguments: object) -> int | None:
        """Runs a command to its end and returns the exit status."""
        start = time.perf_counter()
        process = self._started(verb, arguments)
        process.join(300)
        self._seconds[verb] = time.perf_counter() - start
        return process.exitcode

    def kill(self, verb: str, *arguments: object) -> None:
        """Runs a command and kills it."""
        process = self._started(verb, arguments)
        process.join(self._random.uniform(0.0, 1.1 * self._seconds[verb]))
        process.kill()
        process.join(60)
        assert process.exitcode in (0, -9), process.exitcode
        self.kills += process.exitcode == -9

    def _started(self, verb: str, arguments: tuple[object, ...]) -> Any:
        process = self._context.Process(target=command, args=(verb, [str(argument) for argument in arguments]))
        process.start()
        return process


def until(kills: int, killer: Killer, attempt: Callable[[], None]) -> None:
    """Repeats `attempt` until so many processes were killed before their end."""
    for _ in range(4 * kills):
        if killer.kills >= kills:
            return
        attempt()
    raise AssertionError(f"{killer.kills} of {kills} kills; the other processes had ended")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    x = planted_matrix(400, [6, 6], seed=5)
    return write_arrays(tmp_path_factory.mktemp("data") / "x.h5", {"x": x})


@pytest.fixture(scope="module")
def config(data: Path) -> Path:
    path = data.with_name("run.yaml")
    path.write_text(yaml.safe_dump({"dataset_path": str(data), **CONFIG}))
    return path


@pytest.fixture(scope="module")
def trained(config: Path) -> Path:
    """An uninterrupted run with seed 1."""
    output = config.with_name("trained")
    assert Killer(0).complete("train", config, "--quiet", "--set", "random_seed=1", "--output", output) == 0
    return output


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return dict(load_torch(directory / FINAL)["model_state_dict"])


def equal_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def kill_training(config: Path, trained: Path, place: Path, kills: int) -> None:
    """A run is killed and resumed many times: each result is complete and equal to that of an uninterrupted run."""
    killer, output, alone = Killer(1), place / "out", place / "alone"
    assert killer.complete("train", config, "--quiet", "--set", "random_seed=2", "--output", alone) == 0
    old, new = weights(trained), weights(alone)
    shutil.copytree(trained, output)

    def attempt() -> None:
        where = ["--resume", output] if unfinished(output) else ["--output", output]
        killer.kill("train", config, "--quiet", "--set", "random_seed=2", *where)
        load_checkpoint(output)
        current = weights(output)
        assert equal_weights(current, old) or equal_weights(current, new)

    until(kills, killer, attempt)
    where = ["--resume", output] if unfinished(output) else ["--output", output]
    assert killer.complete("train", config, "--quiet", "--set", "random_seed=2", *where) == 0
    assert equal_weights(weights(output), new)


def read_datasets(path: Path) -> dict[str, Any]:
    datasets: dict[str, Any] = {}
    with h5py.File(path) as file:
        file.visititems(lambda name, part: datasets.update({name: part[:]}) if isinstance(part, h5py.Dataset) else None)
    return datasets


def assert_equal_datasets(a: Path, b: Path) -> None:
    first, second = read_datasets(a), read_datasets(b)
    assert first.keys() == second.keys()
    for name, values in first.items():
        np.testing.assert_array_equal(values, second[name], err_msg=name)


def kill_simulation(place: Path, kills: int, operators: int) -> None:
    killer, config, output = Killer(2), place / "generate.yaml", place / "killed.h5"
    config.write_text(yaml.safe_dump({**GENERATOR, "operators": operators}))
    assert killer.complete("generate", "--config", config, "--output", place / "complete.h5", "--quiet") == 0

    def attempt() -> None:
        killer.kill("generate", "--config", config, "--output", output, "--quiet", "--resume")
        if output.exists():
            assert_equal_datasets(output, place / "complete.h5")
            output.unlink()

    until(kills, killer, attempt)
    assert killer.complete("generate", "--config", config, "--output", output, "--quiet", "--resume") == 0
    assert_equal_datasets(output, place / "complete.h5")
    assert not [path.name for path in place.iterdir() if ".partial" in path.name]


def kill_tokenization(run: Path, data: Path, place: Path, kills: int) -> None:
    killer = Killer(3)
    many = write_arrays(place / "many.h5", {"x": planted_matrix(30_000, [6, 6], seed=6)}, chunk_rows=1000)
    output = place / "tokens" / "t.h5"
    arguments = ["--memory-budget", "1MB", "--quiet", "--output", output]
    assert killer.complete("tokenize", run, data, *arguments) == 0
    old = output.read_bytes()
    assert killer.complete("tokenize", run, many, *arguments) == 0
    new = output.read_bytes()

    def attempt() -> None:
        output.write_bytes(old)
        killer.kill("tokenize", run, many, *arguments)
        assert output.read_bytes() in (old, new)

    until(kills, killer, attempt)
    assert killer.complete("tokenize", run, many, *arguments) == 0
    assert output.read_bytes() == new
    assert os.listdir(output.parent) == [output.name]


def test_one_kill_keeps_results_complete(config: Path, data: Path, trained: Path, tmp_path: Path) -> None:
    kill_tokenization(trained, data, tmp_path, 1)
    kill_simulation(tmp_path, 1, operators=6)
    kill_training(config, trained, tmp_path, 1)


@pytest.mark.slow
def test_many_kills_of_train_keep_results_complete(config: Path, trained: Path, tmp_path: Path) -> None:
    kill_training(config, trained, tmp_path, MANY)


@pytest.mark.slow
def test_many_kills_of_generate_keep_results_complete(tmp_path: Path) -> None:
    kill_simulation(tmp_path, SOME, operators=16)


@pytest.mark.slow
def test_many_kills_of_tokenize_keep_results_complete(data: Path, trained: Path, tmp_path: Path) -> None:
    kill_tokenization(trained, data, tmp_path, SOME)
