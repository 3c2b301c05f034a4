"""`configs/fast.yaml`: a shorter schedule of `configs/10k.yaml`."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import write_dataset

from spinlock_fast.commands.main import command_of
from spinlock_fast.config.loading import load_config

CONFIGS = Path(__file__).parents[2] / "configs"


def test_only_the_schedule_differs() -> None:
    fast, full = load_config(CONFIGS / "fast.yaml"), load_config(CONFIGS / "10k.yaml")
    assert 4 * fast.training.num_epochs <= full.training.num_epochs
    assert 2 * fast.training.warmup_epochs <= fast.training.num_epochs
    schedule = {"num_epochs": 1, "warmup_epochs": 0}
    assert fast.training.model_copy(update=schedule) == full.training.model_copy(update=schedule)
    assert fast.model_copy(update={"training": full.training, "output_dir": full.output_dir}) == full


def test_it_plans(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_dataset(tmp_path / "data.h5", 120, seed=0)
    command = [str(CONFIGS / "fast.yaml"), "--set", f"dataset_path={path}", "--dry-run", "--device", "cpu"]
    with pytest.raises(SystemExit) as ended:
        command_of("train")([*command, "--output", str(tmp_path / "run")])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "120 samples" in text
    assert "token decoder: fitted in 60 epochs after training" in text
    assert not (tmp_path / "run").exists()
