"""Failed, stopped, killed and damaged runs: earlier results are kept, and runs can be resumed."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import yaml
from helpers import SMALL_SETTINGS, write_arrays

from spinlock_fast.checkpoints.directory import checkpoint_hash, load_checkpoint, load_torch, save_torch
from spinlock_fast.checkpoints.integrity import MANIFEST, PREVIOUS_RESUME, RESUME, STATES
from spinlock_fast.checkpoints.resumable import write_state
from spinlock_fast.checkpoints.run_directory import (
    BEST,
    CONFIG,
    FILES,
    FINAL,
    LOGS,
    METRICS,
    PARTIAL,
    PREVIOUS,
    VOCABULARY,
)
from spinlock_fast.errors import DataError, TrainingError
from spinlock_fast.evaluate import main as evaluate_main
from spinlock_fast.tokenize import main as tokenize_main
from spinlock_fast.train import main as train_main
from spinlock_fast.training import run as pipeline
from spinlock_fast.training import trainer as trainer_module


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    x = np.random.default_rng(1).standard_normal((200, 2)).repeat(8, axis=1)
    x += 0.3 * np.random.default_rng(2).standard_normal(x.shape)
    return write_arrays(tmp_path_factory.mktemp("data") / "x.h5", {"x": x.astype(np.float32)})


@pytest.fixture(scope="module")
def config(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "run.yaml"
    path.write_text(yaml.safe_dump({"dataset_path": str(data), **SMALL_SETTINGS}))
    return path


def run(command: Callable[[list[str]], None], *arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        command([str(argument) for argument in arguments])
    return int(end.value.code or 0)


def train(config: Path, output: Path, *settings: str, resume: bool = False) -> int:
    changes = [part for setting in settings for part in ("--set", setting)]
    return run(train_main, config, "--quiet", *changes, "--resume" if resume else "--output", output)


def train_process(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "spinlock_fast.train", *map(str, arguments)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen(command, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, **options)


def final_weights(directory: Path) -> dict[str, torch.Tensor]:
    return dict(load_torch(directory / FINAL)["model_state_dict"])


def assert_same_weights(a: Path, b: Path) -> None:
    first, second = final_weights(a), final_weights(b)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture(scope="module")
def finished_run(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    output = tmp_path_factory.mktemp("whole") / "out"
    assert train(config, output) == 0
    return output


def file_contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


# --- what fails leaves what was good ---


@pytest.mark.parametrize(
    "settings",
    [
        ["model.levels=[{latent_dim: 4, num_tokens: 4000}]"],  # more codes than rows
        ["training.learning_rate=1e30"],
        ["families.mine.dataset=y"],
        ["training.mixup_scale=-1"],
    ],
)
def test_failed_run_keeps_the_finished_run(
    config: Path, finished_run: Path, tmp_path: Path, settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert train(config, output) == 0
    before = file_contents(output)
    capsys.readouterr()
    for _ in range(3):
        assert train(config, output, *settings) in (1, 2, 3)
    assert file_contents(output) == before
    assert "Traceback" not in capsys.readouterr().err
    assert sorted(os.listdir(output)) == sorted(before)
    # A directory that held nothing holds nothing again.
    assert train(config, tmp_path / "new", *settings) != 0
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_killed_runs_keep_every_finished_model(config: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert train(config, output) == 0
    before = file_contents(output)
    for seed in (1, 2):
        process = train_process(
            config, "--output", output, "--set", f"random_seed={seed}", "--set", "training.num_epochs=100000"
        )
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            found = output / PARTIAL / CONFIG
            if found.exists() and f"random_seed: {seed}" in found.read_text() and (output / PARTIAL / RESUME).exists():
                break
            time.sleep(0.01)
        process.kill()
        process.communicate()
        assert {key: value for key, value in file_contents(output).items() if not key.startswith(".")} == before
        assert run(evaluate_main, output, data, "--quiet") == 0
    (first,) = (output / PREVIOUS).iterdir()  # the first unfinished run can be gone on with, like the second
    for directory, seed in ((first, 1), (output, 2)):
        changes = ["--set", f"random_seed={seed}", "--set", "training.num_epochs=100000"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer_module.Trainer, "_fit", lambda *_: (_ for _ in ()).throw(TrainingError("reached")))
            assert run(train_main, config, "--quiet", *changes, "--resume", directory) == 1
    assert load_checkpoint(output)


def test_extended_run_archives_the_shorter_run(config: Path, tmp_path: Path) -> None:
    output, long = tmp_path / "out", tmp_path / "long"
    assert train(config, output, "training.num_epochs=2") == 0
    before = file_contents(output)
    assert train(config, output, resume=True) == 0
    assert train(config, long) == 0
    assert_same_weights(output, long)
    assert checkpoint_hash(output) == checkpoint_hash(long)
    (previous,) = (output / PREVIOUS).iterdir()
    assert file_contents(previous) == before


# --- signals and times ---


class SignalOnCall:
    """Sends a signal to this process when a function of the run is called."""

    def __init__(self, number: int, patch: pytest.MonkeyPatch, place: Any, name: str) -> None:
        self.function, self.number = getattr(place, name), number
        patch.setattr(place, name, self)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        os.kill(os.getpid(), self.number)
        return self.function(*arguments, **options)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize(("place", "name"), [(trainer_module, "evaluate_with_counts"), (pipeline, "write_results")])
def test_signal_after_the_last_step_is_handled(
    config: Path,
    finished_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
    place: Any,
    name: str,
) -> None:
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        SignalOnCall(number, patch, place, name)
        assert train(config, output) == 128 + number
    errors = capsys.readouterr().err.strip().splitlines()
    if place is pipeline:
        assert errors[-1].startswith("error: stopped when the run was done")
    else:
        assert errors[-1].startswith("error: stopped after the last epoch")
        assert not (output / BEST).exists()
        assert train(config, output, resume=True) == 0
    assert checkpoint_hash(output) == checkpoint_hash(finished_run)
    assert signal.getsignal(signal.SIGTERM) in (signal.SIG_DFL, signal.default_int_handler)


def test_signal_before_the_first_step_ends_the_run_at_once(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    SignalOnCall(signal.SIGHUP, monkeypatch, pipeline, "prepare")
    assert train(config, tmp_path / "out") == 129
    assert "before the first step" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_ignored_signal_stays_ignored(
    config: Path, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        SignalOnCall(signal.SIGHUP, monkeypatch, pipeline, "prepare")
        assert train(config, tmp_path / "out") == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_resumed_run_adds_up_its_seconds(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        SignalOnCall(signal.SIGTERM, patch, trainer_module, "evaluate_with_counts")
        assert train(config, output) == 143
    state = load_torch(output / PARTIAL / RESUME)
    stages = state["seconds"]
    assert stages.keys() == {"load_encode", "clean", "discover", "total"}
    assert 0 < state["run"]["seconds"] < stages["total"]
    state["seconds"] = dict.fromkeys(stages, 1000.0)
    state["run"]["seconds"] = 900.0
    write_state(output / PARTIAL, state)
    assert train(config, output, resume=True) == 0
    seconds = json.loads((output / METRICS).read_text())["seconds"]
    assert all(1000 < seconds[name] < 1100 for name in stages)
    assert 900 < seconds["train"] < 1000


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_nonfinite_metric_is_written_as_null(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], value: float
) -> None:
    add_model_metrics = trainer_module.add_model_metrics

    def add_nonfinite(metrics: dict[str, Any], *rest: Any) -> None:
        add_model_metrics(metrics, *rest)
        metrics["categories"][0]["partial_mse"] = value

    monkeypatch.setattr(trainer_module, "add_model_metrics", add_nonfinite)
    assert run(train_main, config, "--output", tmp_path / "out") == 0
    assert json.loads((tmp_path / "out" / METRICS).read_text())["categories"][0]["partial_mse"] is None
    assert "categories[0].partial_mse" in capsys.readouterr().err


# --- integrity ---


def flip_bit(path: Path, where: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= 0x10
    path.write_bytes(content)


def test_a_manifest_has_every_file(finished_run: Path) -> None:
    files = json.loads((finished_run / MANIFEST).read_text())["files"]
    assert files.keys() == set(FILES) - {*STATES, MANIFEST, VOCABULARY, *LOGS}


@pytest.mark.parametrize("where", [0.03, 0.4, 0.97])
def test_flipped_bit_of_the_model_is_detected(
    finished_run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], where: float
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, content in file_contents(finished_run).items():
        (copy / name).write_bytes(content)
    flip_bit(copy / BEST, where)
    assert run(evaluate_main, copy, data, "--quiet") == 3
    assert f"{BEST}: is damaged: its SHA-256" in capsys.readouterr().err
    flip_bit(copy / FINAL, where)
    with pytest.raises(DataError, match="SHA-256"):
        pipeline.read_resumable(copy, pipeline.RunConfig())


def test_a_checkpoint_without_a_manifest_loads(finished_run: Path, data: Path, tmp_path: Path) -> None:
    for name, content in file_contents(finished_run).items():
        if name != MANIFEST:
            (tmp_path / name).write_bytes(content)
    assert run(evaluate_main, tmp_path, data, "--quiet") == 0


def test_identical_runs_have_the_same_hash(config: Path, finished_run: Path, tmp_path: Path) -> None:
    assert train(config, tmp_path / "another_name") == 0
    assert checkpoint_hash(tmp_path / "another_name") == checkpoint_hash(finished_run)


def interrupt_after_last_step(config: Path, output: Path) -> None:
    """A run stopped after its last step, with two states."""
    with pytest.MonkeyPatch.context() as patch:
        SignalOnCall(signal.SIGTERM, patch, trainer_module, "evaluate_with_counts")
        assert train(config, output) == 143
    assert (output / PARTIAL / PREVIOUS_RESUME).exists()


@pytest.mark.parametrize("where", [0.1, 0.5, 0.9])
def test_damaged_state_falls_back_to_the_previous_one(
    config: Path, finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], where: float
) -> None:
    output = tmp_path / "out"
    interrupt_after_last_step(config, output)
    flip_bit(output / PARTIAL / RESUME, where)
    assert run(train_main, config, "--resume", output) == 0
    text = " ".join(capsys.readouterr().err.split())
    assert "is damaged: its SHA-256 is not in manifest.json; resuming from the previous state" in text
    assert_same_weights(output, finished_run)


def test_two_damaged_states_are_an_error(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    interrupt_after_last_step(config, output)
    for name in STATES:
        flip_bit(output / PARTIAL / name, 0.5)
    assert train(config, output, resume=True) == 3
    assert PREVIOUS_RESUME in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["gone", "{"])
def test_states_load_without_a_valid_manifest(config: Path, finished_run: Path, tmp_path: Path, damage: str) -> None:
    output = tmp_path / "out"
    interrupt_after_last_step(config, output)
    manifest = output / PARTIAL / MANIFEST
    manifest.unlink() if damage == "gone" else manifest.write_text(damage)
    assert train(config, output, resume=True) == 0
    assert_same_weights(output, finished_run)


def test_kill_while_saving_leaves_a_complete_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each rename and write of a save, a state listed in the manifest exists."""

    class Killed(BaseException):
        pass

    from spinlock_fast.checkpoints import resumable

    base = {"features": {}, "config": pipeline.RunConfig().model_dump(mode="json")}
    for count in range(1, 10):
        directory = tmp_path / str(count) / PARTIAL
        directory.mkdir(parents=True)
        for epoch in (1, 2, 3):
            write_state(directory, {**base, "run": {"values": 0, "epoch": epoch}})
        replace, left = os.replace, count

        def dies(a: Any, b: Any) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise Killed
            replace(a, b)  # noqa: B023

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", dies)
            try:
                write_state(directory, {**base, "run": {"values": 0, "epoch": 4}})
            except Killed:
                done = False
            else:
                done = True
        found = resumable.read_resumable(directory.parent, pipeline.RunConfig())
        assert found["run"]["epoch"] == (4 if done else 3)
        if done:
            break
    assert count == 5


def test_an_unfinished_run_of_an_earlier_version_is_resumed(config: Path, finished_run: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    interrupt_after_last_step(config, output)
    state = load_torch(output / PARTIAL / PREVIOUS_RESUME)
    del state["seconds"]
    for key in ("num_epochs", "reset_left_out", "before_last", "seconds", "epoch_seconds"):
        del state["run"][key]
    old = tmp_path / "old"
    old.mkdir()
    save_torch(old / RESUME, state)
    (old / CONFIG).write_text((output / PARTIAL / CONFIG).read_text())
    assert run(train_main, "--quiet", "--resume", old) == 0
    assert_same_weights(old, finished_run)
    assert not (old / RESUME).exists()


def test_resume_accepts_the_partial_directory(config: Path, finished_run: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    interrupt_after_last_step(config, output)
    assert run(train_main, "--quiet", "--resume", output / PARTIAL) == 0
    assert_same_weights(output, finished_run)
    assert not (output / PARTIAL).exists()


def test_tensorboard_files_move_with_the_run(config: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="an optional extra")
    for _ in range(2):
        arguments = ["--set", "logging.tensorboard=true", "--output", tmp_path / "out"]
        assert run(train_main, config, "--quiet", *arguments) == 0
        assert len(os.listdir(tmp_path / "out" / "tensorboard")) == 1
    assert not (tmp_path / "out" / PARTIAL).exists()


# --- output that nobody reads ---


def test_run_with_a_broken_pipe_is_saved(config: Path, finished_run: Path, tmp_path: Path) -> None:
    """`train ... 2>&1 | head -1`."""
    read, write = os.pipe()
    process = train_process(config, "--output", tmp_path / "out", stdout=write, stderr=write)
    os.close(write)
    with open(read) as text:
        assert text.read(1)
    process.wait(timeout=120)
    assert process.returncode == 141
    assert checkpoint_hash(tmp_path / "out") == checkpoint_hash(finished_run)


@pytest.mark.slow
@pytest.mark.parametrize(("stream", "status"), [("stdout", 0), ("stderr", 0)])
def test_a_run_with_a_closed_stream(
    config: Path, finished_run: Path, data: Path, tmp_path: Path, stream: str, status: int
) -> None:
    number = {"stdout": 1, "stderr": 2}[stream]
    options = {"preexec_fn": lambda: os.close(number), stream: None}
    process = train_process(config, "--output", tmp_path / "out", **options)
    process.communicate(timeout=120)
    assert process.returncode == status
    assert checkpoint_hash(tmp_path / "out") == checkpoint_hash(finished_run)


# --- outputs that are no regular files ---


@pytest.mark.parametrize("kind", ["device", "fifo"])
def test_metrics_and_tokens_can_be_written_to_devices(
    finished_run: Path, data: Path, tmp_path: Path, kind: str
) -> None:
    path, read = tmp_path / "output", []
    if kind == "device":
        try:
            os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        except PermissionError:
            pytest.skip("making a device needs root")
    else:
        os.mkfifo(path)
    for command, option in ((evaluate_main, "--json"), (tokenize_main, "--output")):
        reader = threading.Thread(target=lambda: read.append(path.read_bytes()), daemon=True)
        if kind == "fifo":
            reader.start()
        assert run(command, finished_run, data, "--quiet", option, path) == 0
        if kind == "fifo":
            reader.join(10)
    assert not path.is_file()
    assert os.listdir(tmp_path) == ["output"]
    if kind == "fifo":
        assert json.loads(read[0])["samples"] == 200
        (tmp_path / "tokens.h5").write_bytes(read[1])
        with h5py.File(tmp_path / "tokens.h5") as file:
            assert len(file["tokens"]) == 200
