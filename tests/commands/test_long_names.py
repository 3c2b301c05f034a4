"""Names that the file system does not allow, in every option that takes a path: one line and the documented status."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from helpers import planted_matrix, write_arrays

from spinlock_fast.commands.main import command_of

NAMES = {"name": "n" * 300, "path": "d/" * 2500 + "f"}  # limits: 255 and 4096 bytes
GENERATOR = {"operators": 1, "grid_size": 32, "num_timesteps": 64, "num_realizations": 1, "workers": 1}
# Command, arguments and exit status. LONG is the name; "checkpoint", "data.h5" and "run.yaml" exist.
INPUTS = [
    ("train", "LONG.yaml --output out", 2),
    ("train", "run.yaml --set dataset_path=LONG.h5 --output out", 3),
    ("train", "run.yaml --resume LONG", 4),
    ("generate", "--config LONG.yaml --output out.h5", 2),
    ("evaluate", "LONG data.h5", 3),
    ("evaluate", "checkpoint LONG.h5", 3),
    ("tokenize", "LONG data.h5 --output out.h5", 3),
    ("tokenize", "checkpoint LONG.h5 --output out.h5", 3),
    ("analyze", "LONG data.h5 --output out", 3),
    ("analyze", "checkpoint LONG.h5 --quiet --output out", 3),
    ("report", "LONG --output out", 3),
    ("report", "checkpoint --data LONG.h5 --output out", 3),
    ("convert", "LONG --output out", 3),
    ("convert", "checkpoint --data LONG.h5 --output out", 3),
]
OUTPUTS = [
    ("train", "run.yaml --output LONG", 4),
    ("train", "run.yaml --set output_dir=LONG", 4),
    ("generate", "--config generate.yaml --output LONG.h5", 4),
    ("evaluate", "checkpoint data.h5 --json LONG.json", 4),
    ("tokenize", "checkpoint data.h5 --output LONG.h5", 4),
    ("analyze", "checkpoint data.h5 --output LONG", 4),
    ("report", "checkpoint --output LONG", 4),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data file, settings and a checkpoint."""
    place = tmp_path_factory.mktemp("long")
    write_arrays(place / "data.h5", {"x": planted_matrix(150, [6, 6], seed=4)})
    settings = {
        "dataset_path": str(place / "data.h5"),
        "device": "cpu",
        "families": {"mine": {"encoder": "IdentityEncoder", "dataset": "x"}},
        "training": {"batch_size": 64, "topo_samples": 64, "num_epochs": 1, "orthogonality_target": 10.0},
        "logging": {"tensorboard": False},
    }
    (place / "run.yaml").write_text(yaml.safe_dump(settings))
    (place / "generate.yaml").write_text(yaml.safe_dump(GENERATOR))
    with pytest.raises(SystemExit) as end:
        command_of("train")([str(place / "run.yaml"), "--quiet", "--output", str(place / "checkpoint")])
    assert not end.value.code
    return place


@pytest.mark.parametrize("long", NAMES)
@pytest.mark.parametrize(("verb", "arguments", "status"), INPUTS + OUTPUTS)
def test_long_name_is_one_line_and_the_documented_status(
    verb: str,
    arguments: str,
    status: int,
    long: str,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(place)
    before = sorted(place.rglob("*"))
    with pytest.raises(SystemExit) as end:
        command_of(verb)(arguments.replace("LONG", NAMES[long]).split())
    error = capsys.readouterr().err
    assert end.value.code == status, error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert len(error) < 1100
    assert sorted(place.rglob("*")) == before
