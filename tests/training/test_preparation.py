"""Features that are kept in a file, and prepared by several ranks, are those of one process in memory."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from helpers import synthetic_arrays, write_shards
from processes import forkserver, run_ranks

from spinlock_fast.checkpoints.directory import load_checkpoint, load_torch
from spinlock_fast.checkpoints.run_directory import BEST, METRICS
from spinlock_fast.config.loading import load_config
from spinlock_fast.config.schema import RunConfig
from spinlock_fast.data.feature_matrix import FeatureMatrix
from spinlock_fast.distributed import current_ranks
from spinlock_fast.evaluate import main as evaluate_main
from spinlock_fast.features import blocks, order_statistics, statistics
from spinlock_fast.tokenize import main as tokenize_main
from spinlock_fast.train import main as train_main
from spinlock_fast.training import evaluation
from spinlock_fast.training.observer import SilentObserver
from spinlock_fast.training.preparation import PreparedFeatures, open_source, prepare

CONFIG: dict[str, Any] = {
    "device": "cpu",
    "families": {
        "summary": {"encoder": "MLPEncoder", "standardize": True},
        "temporal": {"encoder": "TemporalCNNEncoder"},
        "architecture": {"encoder": "IdentityEncoder"},
    },
    "model": {"group_embedding_dim": 16, "group_hidden_dim": 16},
    "training": {"batch_size": 64, "topo_samples": 32, "num_epochs": 2, "orthogonality_target": 10.0},
    "logging": {"tensorboard": False},
}


class Silent(SilentObserver):
    def stage(self, text: str) -> None: ...

    def encoded(self, family: str, done: int, total: int) -> None: ...


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    write_shards(directory, [400, 200], seed=0)
    (directory / "run.yaml").write_text(yaml.safe_dump({"dataset_path": str(directory / "*.h5"), **CONFIG}))
    return directory / "run.yaml"


@pytest.fixture(scope="module")
def in_memory(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a run whose features are in memory."""
    directory = tmp_path_factory.mktemp("memory") / "run"
    assert train(config, directory, "data.feature_matrix=memory") == 0
    return directory


def run(command: Any, *arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        command([str(argument) for argument in arguments])
    return int(end.value.code or 0)


def train(config: Path, output: Path, *settings: str, option: str = "--output") -> int:
    changes = [part for setting in settings for part in ("--set", setting)]
    return run(train_main, config, "--quiet", *changes, option, output)


def same_weights(first: Path, second: Path) -> bool:
    one, other = (load_checkpoint(directory).state_dict() for directory in (first, second))
    return all(torch.equal(value, other[name]) for name, value in one.items())


def tokens_of(checkpoint: Path, config: Path) -> np.ndarray:
    output = checkpoint.with_suffix(".h5")
    assert run(tokenize_main, checkpoint, config.parent / "*.h5", "--output", output, "--quiet") == 0
    with h5py.File(output) as file:
        return file["tokens"][:]


def test_a_run_on_disk_has_the_bits_of_a_run_in_memory(config, in_memory, tmp_path):
    on_disk = tmp_path / "disk"
    assert train(config, on_disk, "data.feature_matrix=disk") == 0
    assert same_weights(in_memory, on_disk)
    assert set(os.listdir(in_memory)) == set(os.listdir(on_disk))
    one, other = (load_torch(directory / BEST) for directory in (in_memory, on_disk))
    assert str(one["known_rows"]) == str(other["known_rows"])
    assert str(one["training_range"]) == str(other["training_range"])
    np.testing.assert_array_equal(tokens_of(in_memory, config), tokens_of(on_disk, config))


def test_a_run_on_disk_is_resumed(config, in_memory, tmp_path):
    disk, output = "data.feature_matrix=disk", tmp_path / "parts"
    assert train(config, output, disk, "training.num_epochs=1") == 0
    assert train(config, output, disk, "training.num_epochs=2", option="--resume") == 0
    assert same_weights(in_memory, output)


def test_evaluation_on_disk_has_the_metrics_of_one_in_memory(config, in_memory, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "scratch").mkdir()
    texts = []
    for on_disk in (False, True):
        monkeypatch.setattr(evaluation, "is_kept_on_disk", lambda *arguments, on_disk=on_disk: on_disk)
        command = [in_memory, config.parent / "*.h5", "--quiet", "--json", tmp_path / METRICS]
        assert run(evaluate_main, *command) == 0
        texts.append((tmp_path / METRICS).read_text())
    assert texts[0] == texts[1]
    assert not os.listdir(tmp_path / "scratch")


def end_while_encoding(config: str, output: str, number: int) -> None:
    write = FeatureMatrix.write

    def last(self: FeatureMatrix, start: int, *arguments: Any) -> None:
        if start:
            os.kill(os.getpid(), number)
        write(self, start, *arguments)

    FeatureMatrix.write = last  # type: ignore[method-assign]
    train(Path(config), Path(output), "data.feature_matrix=disk")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_file_is_left_when_the_command_ends_while_encoding(config, tmp_path, number):
    process = forkserver().Process(target=end_while_encoding, args=(str(config), str(tmp_path / "out"), int(number)))
    process.start()
    process.join(120)
    assert not process.is_alive()
    assert process.exitcode in (0, -number)  # 0: `train` has exited with 143 and the test goes on
    left = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"]
    assert not left


def prepared(config: RunConfig, scratch: Path) -> PreparedFeatures:
    with open_source(config) as source:
        return prepare(source, config, torch.device("cpu"), Silent(), scratch, current_ranks())


def result_of(features: PreparedFeatures) -> dict[str, Any]:
    entries = features.checkpoint_entries()
    ranges = {name: torch.from_numpy(getattr(features, name)) for name in ("low", "high")}
    extra = {"outside": list(features.outside), "missing": features.missing, **ranges}
    return {"x": torch.from_numpy(features.x.copy()), **entries, **features.fingerprint(current_ranks()), **extra}


def small_blocks() -> None:
    """Many blocks of few rows, and statistics as of a large matrix."""
    torch.set_num_threads(1)
    blocks.ROWS_AT_ONCE = 100
    statistics._SORTED_BYTES = 0
    order_statistics._BLOCK_BYTES = 1


def prepare_on_rank(rank: int, count: int, config: str, directory: str) -> None:
    small_blocks()
    dist.init_process_group("gloo", init_method=f"file://{directory}/group{count}", rank=rank, world_size=count)
    features = prepared(load_config(config), Path(directory))
    assert features.on_disk
    torch.save(result_of(features), f"{directory}/{count}.{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def differences(one: Any, other: Any, name: str = "") -> list[str]:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        return [found for key in one for found in differences(one[key], other[key], f"{name}.{key}")]
    if isinstance(one, torch.Tensor):
        return [] if torch.equal(torch.nan_to_num(one, nan=7.7), torch.nan_to_num(other, nan=7.7)) else [name]
    return [] if one == other else [name]


@pytest.mark.dist
def test_ranks_prepare_the_features_of_one_process(config, tmp_path):
    run_ranks(prepare_on_rank, (3, str(config), str(tmp_path)), 3)
    process = forkserver().Process(target=prepare_alone, args=(str(config), str(tmp_path)))
    process.start()
    process.join()
    alone = torch.load(tmp_path / "1.0.pt", weights_only=True)
    assert alone["missing"]["summary"] > 0
    for rank in range(3):
        found = torch.load(tmp_path / f"3.{rank}.pt", weights_only=True)
        assert differences(alone, found) == []
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def prepare_alone(config: str, directory: str) -> None:
    small_blocks()
    torch.save(result_of(prepared(load_config(config), Path(directory))), f"{directory}/1.0.pt")


def test_a_budget_far_below_the_features(tmp_path):
    arrays = synthetic_arrays(3000, seed=1, architecture_width=200)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        for path in ("features/architecture/aggregated/features",):
            file.create_dataset(path, data=arrays[path], chunks=(8, arrays[path].shape[1]))
    settings = {"families": {"architecture": {"encoder": "IdentityEncoder"}}, "dataset_path": str(tmp_path / "x.h5")}
    wide = RunConfig.model_validate({**settings, "memory_budget": "1GB"})
    tiny = RunConfig.model_validate({**settings, "memory_budget": "50kB"})
    expected, found = (prepared(config, tmp_path) for config in (wide, tiny))
    assert (expected.on_disk, found.on_disk) == (False, True)
    np.testing.assert_array_equal(expected.x, found.x)
    assert expected.groups == found.groups
