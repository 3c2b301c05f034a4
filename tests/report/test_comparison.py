"""`report --type compare`: values, picture, page, errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from dashboards import assert_readable, synthetic_checkpoint

from spinlock_fast.errors import ConfigError, DataError
from spinlock_fast.features.mutual_information import adjusted_mutual_information, contingency
from spinlock_fast.plot_style import figure_style
from spinlock_fast.report.__main__ import main
from spinlock_fast.report.checkpoint_summary import read_checkpoint_summary
from spinlock_fast.report.comparison import compare_runs, run_labels
from spinlock_fast.report.comparison_figure import draw_comparison
from spinlock_fast.report.comparison_write import write_comparison
from spinlock_fast.report.semantic_figure import draw_semantic
from spinlock_fast.tokenizer import Tokenizer

FILES = ["comparison.md", "comparison.png", "comparison.svg"]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic_checkpoint(tmp_path_factory.mktemp("runs") / "first", [5, 4, 6, 3], epochs=2)


@pytest.fixture(scope="module")
def second(first: Path) -> Path:
    """Other categories of the same 18 features, and one epoch."""
    return synthetic_checkpoint(first.parent.parent / "second", [4, 5, 9], epochs=1, category="group")


@pytest.fixture
def copy(first: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(first, tmp_path / "copy"))


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_runs_are_compared_on_the_same_data(
    first: Path, second: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = first.parent / "data.h5"
    arguments = [first, second, "--type", "compare", "--data", data, "--output", tmp_path / "out"]
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    assert end.value.code == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert [Path(line).name for line in out.splitlines()] == [*FILES[1:], FILES[0]]
    comparison = compare_runs([first, second], str(data))
    assert comparison.labels == ["first", "second"]

    tokens = [Tokenizer.from_checkpoint(path).encode(str(data)) for path in (first, second)]
    sizes = [[book.codes for book in run.codebooks] for run in comparison.runs]
    assert comparison.agreement is not None
    expected = []
    for c, match in enumerate(comparison.matches[1]):
        for level in range(3 if match else 0):
            assert match is not None
            g, h = 3 * c + level, 3 * match.category + level
            table = contingency(tokens[0][:, g], tokens[1][:, h], (sizes[0][g], sizes[1][h]))
            expected.append(adjusted_mutual_information(table))
            assert comparison.agreement.codebooks[1, c, level] == pytest.approx(expected[-1])
    assert comparison.agreement.mean[0, 1] == pytest.approx(np.mean(expected))
    page = (tmp_path / "out" / "comparison.md").read_text()
    assert f"| first | 1.00 | {np.mean(expected):.2f} |" in page
    assert "| rows measured | 200 | 200 |" in page
    assert "| training.num_epochs | 2 | 1 |" in page
    quality = {run.metrics["quality"]: f"{run.metrics['quality']:.4f}" for run in comparison.runs}
    assert f"{quality[max(quality)]} (best)" in page
    assert f"{quality[min(quality)]} (best)" not in page


def test_categories_are_matched_by_shared_features(first: Path, second: Path) -> None:
    comparison = compare_runs([first, second])
    # cluster_1: 0-4, cluster_2: 5-8, cluster_3: 9-14, cluster_4: 15-17; group_1: 0-3, group_2: 4-8, group_3: 9-17.
    assert comparison.matches[1] == [(0, 4 / 5), (1, 4 / 5), (2, 6 / 9), None]
    assert comparison.unmatched(0) == comparison.unmatched(1) == []
    assert compare_runs([second, first]).unmatched(1) == ["cluster_4"]
    shares = comparison.utilization()
    assert shares.shape == (2, 4, 3)
    assert np.isnan(shares[1, 3]).all()
    assert shares[1, 1].tolist() == comparison.runs[1].metrics["categories"][1]["utilization"]


def test_nothing_is_called_best_on_other_rows_or_features(first: Path, second: Path, tmp_path: Path) -> None:
    comparison = compare_runs([first, second])  # each on the validation rows of its own file
    assert not any(any(row.best) for row in comparison.metrics)
    assert any("measured on different rows" in note for note in comparison.notes)
    other = synthetic_checkpoint(tmp_path / "other", [5, 4], epochs=1, stem="another")
    comparison = compare_runs([first, other])
    assert any("different features" in note for note in comparison.notes)
    assert comparison.matches[1] == [None] * 4
    assert_readable(draw_comparison(comparison))
    with pytest.raises(DataError, match=r"^first: "):
        compare_runs([first, other], str(tmp_path / "other" / "gone.h5"))


def test_eight_runs_with_missing_files_are_readable(first: Path, second: Path, tmp_path: Path) -> None:
    runs = [first, second, *(Path(shutil.copytree(first, tmp_path / f"a_run_with_a_name_{i}")) for i in range(6))]
    for name in ("metrics.json", "training_history.json", "config.yaml"):
        (runs[2] / name).unlink()  # as of a converted checkpoint
    comparison = compare_runs(runs)
    assert_readable(draw_comparison(comparison))
    assert dict(comparison.settings)["training.num_epochs"][:3] == ["2", "1", "not recorded"]
    assert any("a_run_with_a_name_0: no training_history.json" in note for note in comparison.notes)


def test_the_vocabulary_of_a_transferred_run_is_shown(first: Path, copy: Path, tmp_path: Path) -> None:
    change = {"equal_tokens": 0.75, "error_before": 0.5, "error_after": 0.25}
    start = {"init_from": {"name": "old|one", "freeze": "codes"}, "codes": {"in_use": 30, "in_use_kept": 28}}
    path = copy / "vocabulary.json"
    path.write_text(json.dumps(start | {"new_data": change, "old_data": {"missing": "remote"}}))
    write_comparison([first, copy], tmp_path / "out")
    page = (tmp_path / "out" / "comparison.md").read_text()
    line = "copy: started from old\\|one, frozen: codes; 28 of 30 codes in use were kept; new data: 75.0% equal tokens"
    assert f"- {line}, error 0.5000 -\\> 0.2500." in page
    edit(path, codes={"in_use": -1, "in_use_kept": 0})
    with pytest.raises(DataError, match=r"vocabulary.json: codes.in_use"):
        compare_runs([first, copy])


def test_changes_of_the_vocabulary_are_shown_by_category(first: Path, copy: Path, tmp_path: Path) -> None:
    names = Tokenizer.from_checkpoint(copy).model.codebook_names
    tokens = {"died": [1], "newly_used": [2, 3], "equal_tokens": 0.5}
    book = {"codes": 4, "shift": [0.0, 0.1, 0.2, 5.0], "replaced": [3], "new_data": tokens}
    books = [{"name": name, **book, "old_data": {**tokens, "equal_tokens": 0.75}} for name in names]
    start = {"init_from": {"name": "old", "freeze": "none"}, "codes": {"in_use": 4, "in_use_kept": 3}}
    path = copy / "vocabulary.json"
    path.write_text(json.dumps({**start, "new_data": {}, "old_data": {}, "codebooks": books}))
    write_comparison([first, copy], tmp_path / "out")
    page = (tmp_path / "out" / "comparison.md").read_text()
    category = names[0].split("/")[0]
    levels = sum(name.startswith(f"{category}/") for name in names)
    counts = " | ".join(str(levels * count) for count in (4, 3, 2, 1, 1, 2))
    assert f"| {category} | {counts} | 50.0 | 75.0 |" in page
    with figure_style():
        figure = draw_semantic(read_checkpoint_summary(copy), None)
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert "Vocabulary, compared with old" in titles
    bars = figure.axes[titles.index("Vocabulary, compared with old")].containers
    assert [round(bar[0].get_width()) for bar in bars] == [levels, 2 * levels, levels]
    assert_readable(figure)
    for wrong in ({"replaced": [4]}, {"shift": [0.0]}, {"new_data": {}}, {"name": None}):
        edit(path, codebooks=[{**books[0], **wrong}])
        with pytest.raises(DataError, match=r"vocabulary.json: codebooks.0"):
            read_checkpoint_summary(copy)
    edit(path, codebooks=[{key: value for key, value in book.items() if key != "old_data"} for book in books])
    write_comparison([first, copy], tmp_path / "out")
    assert "old data, %" not in (tmp_path / "out" / "comparison.md").read_text()


def test_equal_runs_are_drawn_alike_and_none_is_best(first: Path, copy: Path, tmp_path: Path) -> None:
    data = str(first.parent / "data.h5")
    files = [write_comparison([first, copy], tmp_path / name, data)[0] for name in ("one", "two")]
    for one, two in zip(*files, strict=True):
        assert one.read_bytes() == two.read_bytes()
    page = (tmp_path / "one" / "comparison.md").read_text()
    assert "(best)" not in page
    assert "None of those recorded." in page
    assert "| checkpoint | 1.00 | 1.00 |" in page


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["{first}", "--type", "compare"], 2, "expected 2 to 8 checkpoints, got 1"),
        (["{first}", "{first}/../checkpoint", "--type", "compare"], 2, "is given twice"),
        (["{first}", "{second}"], 2, "one checkpoint expected, got 2"),
        (["{first}", "{second}", "--type", "compare", "--conditions", "a"], 2, "--conditions"),
        (["{first}", "{first}/nothing", "--type", "compare"], 3, "nothing"),
        (["{first}", "{second}", "--type", "compare", "--data", "gone.h5"], 3, "gone.h5"),
    ],
)
def test_errors_are_one_line(
    first: Path,
    second: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    status: int,
    message: str,
) -> None:
    given = [text.format(first=first, second=second) for text in arguments]
    with pytest.raises(SystemExit) as end:
        main([*given, "--output", str(tmp_path / "out")])
    err = capsys.readouterr().err
    assert end.value.code == status
    assert message in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_labels_distinguish_directories() -> None:
    assert run_labels([Path("/x/a/checkpoint"), Path("/x/b/checkpoint")]) == ["a", "b"]
    assert run_labels([Path("/x/a/run"), Path("/x/b/run"), Path("/x/b/other")]) == ["a/run", "b/run", "other"]
    assert run_labels([Path("/a/x"), Path("/a/x/x")]) == ["a", "x"]
    with pytest.raises(ConfigError, match="got 9"):
        compare_runs([f"/x/{i}" for i in range(9)])


def test_data_without_a_family_of_one_run_names_the_run(first: Path, second: Path, tmp_path: Path) -> None:
    data = Path(shutil.copy(first.parent / "data.h5", tmp_path / "data.h5"))
    with h5py.File(data, "a") as file:
        del file["features/temporal"]
    with pytest.raises(DataError, match=r"^first: .*temporal"):
        compare_runs([first, second], str(data))
