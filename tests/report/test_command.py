"""`python -m spinlock_fast.report`: files, notes, errors."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from dashboards import synthetic_checkpoint
from helpers import raises_one_line, write_dataset

from spinlock_fast.commands.main import main as spinlock_fast_main
from spinlock_fast.errors import ConfigError
from spinlock_fast.report import KINDS, write_report
from spinlock_fast.report.__main__ import main
from spinlock_fast.report.checkpoint_summary import read_checkpoint_summary
from spinlock_fast.report.data_statistics import measure_data

FILES = {f"{kind}.{suffix}" for kind in KINDS for suffix in ("png", "svg")}
ALL = FILES | {"explorer.html"}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic_checkpoint(tmp_path_factory.mktemp("small"), [4, 5], rows=120, epochs=1)


@pytest.fixture
def copy(small: Path, tmp_path: Path) -> Path:
    """A copy of a checkpoint that a test may modify."""
    return Path(shutil.copytree(small, tmp_path / "copy"))


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


def test_all_dashboards_are_written_from_the_data_of_the_run_alike_each_time(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(capsys, small, "--output", tmp_path / "new" / "pictures")
    assert (status, err) == (0, "")
    assert {path.name for path in (tmp_path / "new" / "pictures").iterdir()} == ALL
    assert {Path(line).name for line in out.splitlines()} == ALL
    files, notes = write_report(small, tmp_path / "again", small.parent / "data.h5", ["topological"])
    assert not notes
    for file in files:
        assert file.read_bytes() == (tmp_path / "new" / "pictures" / file.name).read_bytes(), file.name
    assert b"<dc:date>" not in (tmp_path / "again" / "topological.svg").read_bytes()


def test_an_unknown_dashboard_is_refused(small: Path, tmp_path: Path) -> None:
    with raises_one_line(ConfigError, "kinds: expected some of engineering, topological, semantic, got 'semantics'"):
        write_report(small, tmp_path / "out", kinds=["engineering", "semantics"])
    assert not (tmp_path / "out").exists()


def test_one_dashboard_by_type(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        spinlock_fast_main(["report", str(small), "--output", str(tmp_path), "--type", "engineering"])
    assert end.value.code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"engineering.png", "engineering.svg"}
    assert "engineering.png" in capsys.readouterr().out


def test_without_data_one_line_names_the_omitted_parts(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / "config.yaml").write_text((copy / "config.yaml").read_text().replace("data.h5", "gone.h5"))
    status, out, err = run(capsys, copy, "--output", tmp_path / "out", "--type", "semantic")
    assert status == 0
    assert len(err.splitlines()) == 1
    assert "gone.h5" in err
    assert "panels that need data are omitted" in err
    assert len(out.splitlines()) == 2


def test_an_old_checkpoint_reports_what_it_has(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("metrics.json", "training_history.json", "config.yaml"):
        (copy / name).unlink()
    status, _, err = run(capsys, copy, "--output", tmp_path / "out")
    assert status == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    assert len(err.splitlines()) == 4
    assert "explorer.html is omitted: the data of the run are unknown: name them with --data" in err


def test_missing_metrics_are_measured_on_the_data(copy: Path, small: Path) -> None:
    (copy / "metrics.json").unlink()
    summary = read_checkpoint_summary(copy)
    statistics = measure_data(summary, str(small.parent / "data.h5"))
    assert summary.measured_on == f"{statistics.rows} rows of data.h5"
    assert summary.metrics["val_rows"] == 120
    assert summary.metrics["active_codes"] == int(statistics.used.sum())


def test_panel_of_a_missing_metric_is_omitted(copy: Path, tmp_path: Path) -> None:
    metrics = json.loads((copy / "metrics.json").read_text())
    del metrics["active_codes"], metrics["topo_pre"]
    for category in metrics["categories"]:
        del category["perplexity"]
    (copy / "metrics.json").write_text(json.dumps(metrics))
    files, _ = write_report(copy, tmp_path / "out", kinds=["engineering"])
    assert [path.name for path in files] == ["engineering.png", "engineering.svg"]


def without_manifest(copy: Path) -> Path:
    """The same directory as earlier versions wrote it."""
    (copy / "manifest.json").unlink()
    return copy


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda copy: shutil.rmtree(copy), "no best_model.pt there"),
        (lambda copy: (copy / "metrics.json").write_text("{"), "metrics.json: not JSON"),
        (lambda copy: (copy / "best_model.pt").write_bytes(b"x"), "best_model.pt: is damaged"),
        (lambda copy: (without_manifest(copy) / "best_model.pt").write_bytes(b"x"), "not a checkpoint"),
    ],
)
def test_unusable_checkpoint_is_one_line(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: object, text: str
) -> None:
    assert callable(spoil)
    spoil(copy)
    status, out, err = run(capsys, copy, "--output", tmp_path / "out")
    assert (status, out) == (3, "")
    assert len(err.splitlines()) == 1
    assert text in err
    assert not (tmp_path / "out").exists()


def test_metrics_of_another_model_are_refused(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = json.loads((copy / "metrics.json").read_text())
    metrics["categories"].pop()
    (copy / "metrics.json").write_text(json.dumps(metrics))
    status, _, err = run(capsys, copy, "--output", tmp_path / "out")
    assert status == 3
    assert "describes other categories" in err


def test_data_that_do_not_match_are_refused(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_dataset(tmp_path / "other.h5", 20, seed=1)
    status, out, err = run(capsys, small, "--data", other, "--output", tmp_path / "out")
    assert (status, out) == (3, "")
    assert len(err.splitlines()) == 1
    assert "other.h5" in err
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written_is_refused(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    status, _, err = run(capsys, small, "--output", tmp_path / "file")
    assert status == 4
    assert len(err.splitlines()) == 1


def test_an_unknown_type_is_refused(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, small, "--output", tmp_path, "--type", "poetic")
    assert status == 2
    assert "poetic" in err


def test_without_matplotlib_one_line_says_what_to_install(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    status, _, err = run(capsys, small, "--output", tmp_path)
    assert status == 1
    assert "pip install 'spinlock-fast[report]'" in err


def test_the_command_imports_no_matplotlib_before_it_draws() -> None:
    code = "import sys, spinlock_fast.report; sys.exit(bool({'matplotlib', 'torch', 'sklearn'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow  # a process that imports and draws
def test_the_module_runs(small: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "spinlock_fast.report", str(small), "--output", str(tmp_path)]
    done = subprocess.run([*command, "--type", "engineering", "--quiet"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "engineering.svg").read_text().startswith("<?xml")


def test_no_pickle_is_loaded(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model_state_dict": Path("x")}, without_manifest(copy) / "best_model.pt")
    status, _, err = run(capsys, copy, "--output", tmp_path / "out")
    assert status == 3
    assert "objects other than tensors" in err


def test_names_of_the_data_are_drawn_as_they_stand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "$\\bad$ <script> \\frac{ \x1b[31m é" + "x" * 300
    checkpoint = synthetic_checkpoint(tmp_path / "run", [4, 5], rows=120, epochs=1, stem=name, category=name)
    status, _, err = run(capsys, checkpoint, "--output", tmp_path / "out")
    assert (status, err) == (0, "")
    for kind in KINDS:
        texts = ElementTree.parse(tmp_path / "out" / f"{kind}.svg")
        assert "\x1b" not in ElementTree.tostring(texts.getroot(), encoding="unicode")


@pytest.mark.parametrize(
    ("file", "change", "expected"),
    [
        ("metrics.json", {"quality": float("inf")}, "not JSON: Infinity"),
        ("metrics.json", {"quality": "good"}, "quality"),
        ("metrics.json", {"categories": 3}, "categories"),
        ("metrics.json", {"categories": [{"name": "cluster_1", "utilization": [None]}]}, "categories.0.utilization.0"),
        ("metrics.json", {"seconds": [1]}, "seconds"),
        ("metrics.json", {"active_codes": "many"}, "active_codes"),
        ("training_history.json", {"epochs": {"a": 1}}, "epochs"),
        ("training_history.json", {"epochs": [{"epoch": "first", "train_loss": 1.0}]}, "epochs.0.epoch"),
        ("training_history.json", {"epochs": [{"epoch": 1, "train_loss": float("nan")}]}, "not JSON: NaN"),
    ],
)
def test_invalid_run_file_is_one_line(
    copy: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    file: str,
    change: dict[str, object],
    expected: str,
) -> None:
    summary = json.loads((copy / file).read_text())
    (copy / file).write_text(json.dumps({**summary, **change}))
    status, _, err = run(capsys, copy, "--output", tmp_path / "out")
    assert status == 3
    assert len(err.splitlines()) == 1
    assert file in err
    assert expected in err
    assert not (tmp_path / "out").exists()
