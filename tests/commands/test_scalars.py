"""Training curves as CSV, TensorBoard and Weights & Biases: every epoch once, also in a run that was resumed."""

from __future__ import annotations

import csv
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml
from helpers import SMALL_RUN, largest_file, planted_matrix, raises_one_line, write_arrays

from spinlock_fast.checkpoints.run_directory import PARTIAL
from spinlock_fast.commands.scalars import CsvScalars, check_writers
from spinlock_fast.commands.tensorboard import ScalarFile
from spinlock_fast.config.schema import LoggingConfig
from spinlock_fast.errors import ConfigError, OutputError
from spinlock_fast.train import main


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("scalars")
    write_arrays(directory / "data.h5", {"features/summary": planted_matrix(120, [4, 4], seed=0)})
    settings = {
        "dataset_path": str(directory / "data.h5"),
        "families": {"summary": {"encoder": "IdentityEncoder", "dataset": "features/summary"}},
        "logging": {"tensorboard": False, "csv": True},
    }
    (directory / "run.yaml").write_text(yaml.safe_dump(settings))
    return directory / "run.yaml"


def train(*arguments: object, epochs: int = 2) -> int:
    small = {**SMALL_RUN, "training.num_epochs": epochs, "training.val_every_n_epochs": 2}
    settings = [text for key, value in small.items() for text in ("--set", f"{key}={value}")]
    with pytest.raises(SystemExit) as end:
        main(["--quiet", *map(str, arguments), *settings])
    return int(end.value.code or 0)


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_epochs_after_the_resumed_state_are_replaced(tmp_path: Path) -> None:
    first = CsvScalars(tmp_path, 0)
    for epoch in range(1, 5):
        first.add({"train/loss": epoch / 3} | ({"validation/quality": 0.5} if epoch == 2 else {}), epoch)
    first.close()
    second = CsvScalars(tmp_path, 3)
    second.add({"train/loss": 9.0}, 4)
    second.close()
    path = tmp_path / PARTIAL / "scalars.csv"
    assert [(row["epoch"], row["train/loss"]) for row in read(path)] == [
        *((str(epoch), repr(epoch / 3)) for epoch in (1, 2, 3)),
        ("4", "9.0"),
    ]
    assert [row["validation/quality"] for row in read(path)] == ["", "0.5", "", ""]
    path.write_bytes(b"epoch,x\n1,2\n2")  # half a line, of a process that was killed
    CsvScalars(tmp_path, 3).close()
    assert read(path) == [{"epoch": "1", "x": "2"}]
    for damage in (b"\xff\xfe\n", b"a,b\n1,2\n", b"epoch,x\n1,2,3\n", b"epoch,x\n1,2\n1,3\n"):
        path.write_bytes(damage)
        with raises_one_line(OutputError, "scalars.csv", "logging.csv=false"):
            CsvScalars(tmp_path, 3)
        assert path.read_bytes() == damage
    CsvScalars(tmp_path, 0).close()
    assert read(path) == []


def test_a_full_disk_names_the_setting(tmp_path: Path) -> None:
    scalars = CsvScalars(tmp_path, 0)
    scalars.add({"train/loss": 1.0}, 1)
    with largest_file(60), raises_one_line(OutputError, "scalars.csv", "File too large", "logging.csv=false"):
        for epoch in range(2, 20):
            scalars.add({"train/loss": 1.0}, epoch)
    scalars.close()


def test_tensorboard_drops_later_steps_of_an_earlier_file(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for first_epoch, steps in ((0, (1, 2, 3)), (1, (2, 3, 4))):
        scalars = ScalarFile(tmp_path, first_epoch)
        scalars.path.rename(tmp_path / f"events.out.tfevents.{first_epoch}")  # in their order, as an hour later
        for step in steps:
            scalars.add({"train/loss": first_epoch + 0.5}, step)
        scalars.close()
    found = accumulator.EventAccumulator(str(tmp_path))
    found.Reload()
    values = [(event.step, event.value) for event in found.Scalars("train/loss")]
    assert values == [(1, 0.5), (2, 1.5), (3, 1.5), (4, 1.5)]


class FakeRun:
    """A run of wandb that keeps what is logged, and drops steps below its last one as wandb does."""

    def __init__(self, identifier: str | None, arguments: dict[str, Any]) -> None:
        self.id = identifier or "abc123"
        self.arguments = arguments
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished = False

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def fake_runs(monkeypatch: pytest.MonkeyPatch) -> list[FakeRun]:
    runs: list[FakeRun] = []

    def init(**arguments: Any) -> FakeRun:
        if arguments["project"] == "refused":
            raise module.errors.Error("no account\n")
        runs.append(FakeRun(arguments["id"], arguments))
        return runs[-1]

    module: Any = ModuleType("wandb")
    module.__spec__ = importlib.util.spec_from_loader("wandb", None)
    module.errors = SimpleNamespace(Error=type("Error", (Exception,), {}))
    module.Settings = lambda **values: values
    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return runs


def test_a_run_and_its_continuation_have_every_epoch_once(
    config: Path, tmp_path: Path, fake_runs: list[FakeRun]
) -> None:
    out = tmp_path / "out"
    wandb = ("--set", "logging.wandb=true", "--set", "logging.wandb_mode=offline")
    assert train(config, "--output", out, *wandb) == 0
    assert train(config, "--output", out, "--resume", out, *wandb, epochs=4) == 0
    rows = read(out / "scalars.csv")
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]
    history = json.loads((out / "training_history.json").read_text())["epochs"]
    for row, record in zip(rows, history, strict=True):
        assert float(row["train/loss"]) == record["train_loss"]
        assert float(row["train/learning_rate"]) == record["learning_rate"]
        validation = record["validation"]
        assert (row["validation/quality"] != "") == (validation is not None)
        if validation:
            assert float(row["validation/quality"]) == validation["quality"]
    assert not (out / PARTIAL).exists()
    assert not (out / "tensorboard").exists()

    first, second = fake_runs
    assert [[step for step, _ in run.logged] for run in fake_runs] == [[1, 2], [3, 4]]
    assert first.logged[1][1]["train/loss"] == history[1]["train_loss"]
    assert "validation/quality" in first.logged[1][1]
    assert first.finished
    assert (first.arguments["id"], first.arguments["resume"]) == (None, None)
    assert (second.arguments["id"], second.arguments["resume"]) == ("abc123", "allow")
    assert (first.arguments["mode"], first.arguments["project"]) == ("offline", "spinlock-fast")
    assert first.arguments["config"]["training"]["num_epochs"] == 2


def test_a_refused_run_and_a_missing_package_are_one_line(
    config: Path, tmp_path: Path, fake_runs: list[FakeRun], capsys: pytest.CaptureFixture[str]
) -> None:
    out = ("--output", tmp_path / "out")
    assert train(config, *out, "--set", "logging.wandb=true", "--set", "logging.wandb_project=refused") == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert "logging.wandb: no account; logging.wandb_mode=offline needs no account" in err
    sys.modules["wandb"].__spec__ = None
    del sys.modules["wandb"]
    if importlib.util.find_spec("wandb") is None:
        assert train(config, *out, "--set", "logging.wandb=true") == 2
        assert capsys.readouterr().err.endswith("wandb is not installed: pip install 'spinlock-fast[wandb]'\n")
        with raises_one_line(ConfigError, "pip install 'spinlock-fast[wandb]'"):
            check_writers(LoggingConfig(wandb=True))
    assert train(config, *out, "--set", "logging.mlflow=true") == 2
    assert "logging.mlflow" in capsys.readouterr().err


def offline_records(path: Path) -> Iterator[bytes]:
    """Records of a file of wandb: after 7 bytes the log format of LevelDB, in blocks of 32 KiB."""
    data, place, parts = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield parts
            parts = b""


@pytest.mark.slow
def test_the_real_package_writes_an_offline_run(config: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="the extra wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    out = tmp_path / "out"
    wandb = ("--set", "logging.wandb=true", "--set", "logging.wandb_mode=offline")
    assert train(config, "--output", out, *wandb) == 0
    assert train(config, "--output", out, "--resume", out, *wandb, epochs=3) == 0
    steps, identifiers = [], set()
    for path in sorted(out.rglob("*.wandb"), key=lambda path: path.stat().st_mtime):
        identifiers.add(path.stem)
        for data in offline_records(path):
            record = Record.FromString(data)
            if record.WhichOneof("record_type") == "history":
                names = {item.key or "/".join(item.nested_key) for item in record.history.item}
                assert "train/loss" in names
                steps.append(record.history.step.num)
    assert steps == [1, 2, 3]
    assert len(identifiers) == 1
