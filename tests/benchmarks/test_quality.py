"""The study of tokens, small."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import planted_matrix, write_dataset

from benchmarks.studies import quality
from benchmarks.studies.quality import choose, load_split, main, probe_scores, rows_of
from benchmarks.studies.sweep import append, lines_of
from benchmarks.studies.variants import COMBINATIONS, COMMON, VARIANTS
from spinlock_fast.config.loading import apply_overrides
from spinlock_fast.config.schema import RunConfig

ROWS = 100
LEVELS = [{"num_tokens": 6, "latent_dim": 4}, {"num_tokens": 4, "latent_dim": 4}]
META = {
    "group_indices": {"a": list(range(6)), "b": list(range(6, 12))},
    "levels": {"a": LEVELS, "b": LEVELS},
    "feature_names": [f"f{i}" for i in range(12)],
    "original": {"error_final": 0.5},
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "operators_real.h5", ROWS, seed=0)
    (tmp_path / "original_frames").mkdir()
    np.savez(
        tmp_path / "original_frames" / "seed42.npz",
        x=planted_matrix(ROWS, [6, 6], seed=0),
        tokens=np.random.default_rng(0).integers(0, 4, (ROWS, 4)),
        val_rows=np.arange(0, ROWS, 10),
        meta=json.dumps(META),
    )
    return tmp_path


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_a_valid_setting(name: str) -> None:
    apply_overrides(RunConfig(), {**COMMON, **VARIANTS[name]})


def test_settings_are_chosen_without_the_reported_rows(data: Path) -> None:
    frame = load_split(data, 42)
    rows, scored = rows_of(frame, "select")
    assert not set(rows) & set(frame.val_rows)
    assert len(rows) == 90
    assert len(scored) == 9
    assert scored.max() < 90
    rows, scored = rows_of(frame, "report")
    assert len(rows) == ROWS
    np.testing.assert_array_equal(scored, frame.val_rows)


def test_a_study_goes_on_where_it_was_stopped(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = data / "out" / "study.jsonl"
    command = [str(data), "--output", str(output), "--frames", "42", "--epochs", "2", "--variants", "baseline"]
    assert main([*command, "--seeds", "0"]) == 0
    (row,) = lines_of(output)
    assert row["error"] > 0.0
    assert row["error_over_original"] == pytest.approx(row["error"] / 0.5)
    assert row["epochs"] == 2
    assert set(row["category_error"]) == {"a", "b"}
    assert row["rows"] == [81, 9]
    with open(output, "a", encoding="utf-8") as file:
        file.write('{"mode": "sel')  # killed while it wrote
    capsys.readouterr()
    assert main([*command, "--seeds", "0", "1", "--list"]) == 0
    assert capsys.readouterr().out.split() == ["select/baseline/42/1"]
    append(output, {**row, "seed": 1})
    assert len(lines_of(output)) == 2
    monkeypatch.setattr(quality, "perform", lambda *_: pytest.fail("nothing is left to do"))
    assert main([*command, "--seeds", "0", "1", "--list"]) == 0
    append(output, {**row, "variant": "settled", "error": row["error"] + 0.25})
    assert main([*command, "--table"]) == 0
    table = capsys.readouterr().out
    assert "select, frame 42\n" in table
    assert "| `baseline` | 2 |" in table
    assert "| `settled` | 1 | +0.250 |" in table  # paired with the same seed of the baseline


def row(variant: str, frame: int, seed: int, error: float, **more: Any) -> dict[str, Any]:
    good = {"utilization": 0.9, "perplexity_over_k": 0.6, "topo_post": 0.99}
    return {"mode": "select", "variant": variant, "frame": frame, "seed": seed, "error": error, **good, **more}


def test_the_choice_weighs_error_in_every_frame_and_use_of_codes() -> None:
    first, second, third, fourth, *_ = COMBINATIONS
    rows = []
    for seed in range(2):
        for frame, base in ((42, 0.1), (43, 0.3)):
            rows += [row("baseline", frame, seed, base), row(first, frame, seed, 0.5 * base)]
            rows += [row(second, frame, seed, 0.45 * base, utilization=0.8)]
            rows += [row(third, frame, seed, base * (0.2 if frame == 42 else 1.0))]
    rows += [row(fourth, 42, 0, 0.0001), row(fourth, 43, 0, 0.0001)]  # one seed is not enough
    chosen, scores = choose([*rows, row(first, 42, 9, 9.0, mode="report")])
    assert set(scores) == {first, second, third}
    assert scores[first] == pytest.approx(math.log(0.5))
    assert scores[second] == pytest.approx(math.log(0.45) + 3.0 * 0.06)
    assert chosen == third
    with pytest.raises(SystemExit, match="two seeds"):
        choose(rows[:3])


def test_the_choice_is_made_and_then_reported(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    two = dict(list(COMBINATIONS.items())[:2])
    monkeypatch.setattr(quality, "COMBINATIONS", two)
    monkeypatch.setattr(quality, "SELECT_SEEDS", 2)
    output = data / "study.jsonl"
    assert (
        main([str(data), "--output", str(output), "--frames", "42", "--epochs", "1", "--seeds", "0", "1", "--choose"])
        == 0
    )
    said = capsys.readouterr().out
    chosen = said.split("chosen: ")[1].split()[0]
    assert chosen in two
    runs = [(r["mode"], r["variant"], r["seed"]) for r in lines_of(output)]
    assert sorted(r for r in runs if r[0] == "report") == [
        ("report", name, seed) for name in sorted(["baseline", chosen]) for seed in (0, 1)
    ]
    assert len([r for r in runs if r[0] == "select"]) == 6


def test_a_failing_run_says_so_and_leaves_no_line(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = data / "study.jsonl"
    command = [str(data), "--output", str(output), "--frames", "42", "--epochs", "1", "--variants", "baseline"]
    assert main([*command, "--device", "cuda:99", "--seeds", "0"]) == 1
    assert "select/baseline/42/0: failed: " in (said := capsys.readouterr().out)
    assert "cuda:99" in said
    assert not output.exists()


def test_probes_tell_useful_tokens_from_useless_ones() -> None:
    random = np.random.default_rng(0)
    useful = random.integers(0, 5, (400, 2))
    targets: dict[str, np.ndarray[Any, Any]] = {
        "label": np.array(list("abcde"))[useful[:, 0]],
        "columns": np.stack([useful[:, 1] + 0.0, np.sin(useful[:, 0])], 1),
    }
    trained, scored = np.arange(300), np.arange(300, 400)
    good = probe_scores(useful, trained, scored, targets)
    bad = probe_scores(random.integers(0, 5, (400, 2)), trained, scored, targets)
    assert good["probe_label"] == 1.0
    assert good["probe_columns"] > 0.95
    assert bad["probe_label"] < 0.4
    assert bad["probe_columns"] < 0.1
