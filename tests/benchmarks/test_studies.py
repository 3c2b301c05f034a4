"""The studies of encoders, searches and transfer, small. `test_sweep.py` tests the worker processes."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import planted_matrix, write_dataset

from benchmarks.studies import encoders, joint_search, sweep, transfer
from benchmarks.studies.sweep import lines_of

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def sweep_here(
    runs: Mapping[str, Any],
    measure: Callable[..., Sequence[dict[str, Any]]],
    keep: Callable[..., object],
    shown: Sequence[str],
    *,
    prepare: Callable[[Any], Any] | None = None,
    alike: Callable[[Any], Any] | None = None,
    jobs: int = 1,
) -> int:
    """`sweep` without worker processes."""
    prepared: dict[Any, Any] = {}
    for run in runs.values():
        if prepare is not None and alike is not None and alike(run) not in prepared:
            prepared[alike(run)] = prepare(run)
        rows = measure(run) if alike is None else measure(run, prepared[alike(run)])
        assert all(name in row for row in rows for name in shown)
        keep(*rows)
    return 0


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "sweep", sweep_here)
    monkeypatch.setattr(transfer, "sweep", sweep_here)


def test_encoders_are_compared_with_paired_seeds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoders, "TEMPORAL", ("StatisticsEncoder",))
    settings = (encoders.ROOT / "configs" / "quickstart.yaml").read_text(encoding="utf-8")
    (tmp_path / "configs").mkdir()
    brief = settings.replace("joint_search_epochs: auto", "joint_search_epochs: 0")
    (tmp_path / "configs" / "quickstart.yaml").write_text(brief, encoding="utf-8")
    monkeypatch.setattr(encoders, "ROOT", tmp_path)
    train, unseen = (str(write_dataset(tmp_path / name, rows, seed=0)) for name, rows in (("a.h5", 60), ("b.h5", 40)))
    output = tmp_path / "study.jsonl"
    command = [train, unseen, "--output", str(output), "--seeds", "1", "--epochs", "1"]
    assert encoders.main(command) == 0
    first, last = rows = lines_of(output)
    assert (first["summary"], last["summary"]) == ("MLPEncoder", "IdentityEncoder")
    assert all(row["seed"] == 42 and 0.0 <= row["probe_evolution_policy"] <= 1.0 for row in rows)
    assert first.keys() == lines_of(RESULTS / "study" / "encoders_cpu.jsonl")[0].keys()
    said = capsys.readouterr().out
    assert "over seeds, on half of the unseen operators.\n" in said
    assert "| `IdentityEncoder, StatisticsEncoder` | 1 | " in said
    assert f" {last['utilization'] - first['utilization']:+.3f} |" in said
    monkeypatch.setattr(encoders, "Tokenizer", None)  # nothing is left to do
    assert encoders.main(command) == 0
    assert lines_of(output) == rows


def test_the_searches_of_a_model_have_a_line_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [{"num_tokens": 6, "latent_dim": 4}, {"num_tokens": 4, "latent_dim": 4}]
    meta = {
        "group_indices": {"a": list(range(6)), "b": list(range(6, 12))},
        "levels": {"a": sizes, "b": sizes},
        "feature_names": [f"f{i}" for i in range(12)],
    }
    frame, output = tmp_path / "tiny.npz", tmp_path / "study.jsonl"
    np.savez(frame, x=planted_matrix(100, [6, 6], seed=0), val_rows=np.arange(0, 100, 10), meta=json.dumps(meta))
    monkeypatch.setattr(joint_search, "COMMON", {**joint_search.COMMON, "training.num_epochs": 2})
    config = tmp_path / "100k.yaml"
    config.write_text("training: {joint_search_epochs: 1}\n", encoding="utf-8")
    command = [str(frame), "--output", str(output), "--config", str(config)]
    assert joint_search.main([*command, "--brief"]) == 0
    nearest, joint, perturbed = brief = lines_of(output)
    assert [tuple(row[name] for name in ("sweeps", "search_weight", "perturbations")) for row in brief] == [
        (0, 0, 0),
        (2, 0, 0),
        (2, 0, 8),
    ]
    assert nearest["error"] >= joint["error"] >= perturbed["error"] > 0.0
    assert nearest["changed"] == 0.0 < joint["changed"]
    assert set(nearest["categories"]) == {"a", "b"}
    assert nearest["topo_post"] == joint["topo_post"]
    committed = lines_of(RESULTS / "study" / "token_decoder_report_cpu.jsonl")[0]
    assert committed.keys() == nearest.keys()
    # Lines of earlier versions, without mode and configuration, are those of `report` and 100k.yaml.
    earlier = [{name: row[name] for name in committed if name not in ("mode", "config")} for row in brief]
    output.write_text("".join(f"{json.dumps(row)}\n" for row in earlier), encoding="utf-8")
    assert joint_search.main([*command, "--brief"]) == 0
    assert lines_of(output) == earlier
    monkeypatch.setattr(joint_search, "SEARCHES", [*joint_search.BRIEF, (1, 0.3, 0)])
    assert joint_search.main(command) == 0
    assert [row["search_weight"] for row in lines_of(output)] == [0, 0, 0, 0.3]
    assert joint_search.main([*command, "--select", "--brief"]) == 0
    assert [row["mode"] for row in lines_of(output)[4:]] == ["select"] * 3


def test_transfer_measures_every_start_on_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "epochs_of", lambda _: 2)
    source, target = (str(write_dataset(tmp_path / f"{seed}.h5", 80, seed=seed)) for seed in range(2))
    output = tmp_path / "transfer.csv"
    command = ["--source", source, "--target", target, "--test-rows", "20", "--output", str(output)]
    shares = ["--shares", "0.0501", "1"]
    assert transfer.main([*command, *shares, "--seeds", "1"]) == 0
    text = output.read_text()
    rows = list(csv.DictReader(text.splitlines()))
    starts = [f"freeze {name}" for name in transfer.FREEZE]
    assert [(row["method"], row["rows"]) for row in rows] == [
        ("checkpoint alone", "0"),
        *((name, "3") for name in starts),  # too few rows to train from scratch
        *((name, "60") for name in ["from scratch", *starts]),
    ]
    assert all(float(row["error"]) > 0.0 for row in rows)
    kept = [row["equal_tokens_source"] for row in rows if row["method"] in ("checkpoint alone", "freeze tokens")]
    assert kept == ["1"] * 3
    committed = (RESULTS / "transfer_operators_cpu.csv").read_text().splitlines()[0]
    assert text.splitlines()[0] == ",".join(transfer.COLUMNS) == committed
    with pytest.raises(SystemExit, match=r"has shares \['0.0501', '1'\], not \[1.0\]: choose another --output"):
        transfer.main([*command, "--shares", "1"])
    other = tmp_path / "other.csv"
    other.write_text("variant,seed\n")
    with pytest.raises(SystemExit, match=r"other.csv: has other columns than method, share"):
        transfer.main([*command, "--output", str(other)])
    monkeypatch.setattr(transfer, "study", lambda *_: [{**rows[0], "seed": 41}])
    assert transfer.main([*command, *shares, "--first-seed", "41", "--seeds", "2"]) == 0
    lines = text.splitlines(keepends=True)
    assert output.read_text() == "".join([lines[0], lines[1].replace(",42,", ",41,"), *lines[1:]])
