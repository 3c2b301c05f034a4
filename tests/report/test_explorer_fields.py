"""Pictures of fields in the explorer: initial fields of the data, or states of trajectory files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from browser import PROGRAM, browser_page
from dashboards import explorer_contents, synthetic_checkpoint
from trajectory_files import smooth_fields, write_well

from spinlock_fast.report.__main__ import main
from spinlock_fast.report.explorer.fields import FieldPictures, chosen_rows, picture, shrunk

ROWS = 40


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with checkpoint, data.h5 and plain.h5, which has no fields."""
    directory = tmp_path_factory.mktemp("fields")
    synthetic_checkpoint(directory, [4, 5], rows=ROWS, epochs=1)
    (directory / "plain.h5").write_bytes((directory / "data.h5").read_bytes())
    initial = smooth_fields(ROWS, steps=2, extents=(30, 48))[:, 0]
    with h5py.File(directory / "data.h5", "a") as file:
        file["inputs/fields"] = initial
        file["outputs/fields"] = -initial[:, :1, :8, :8]
    return directory


def report(run: Path, output: Path, *arguments: object, data: str = "plain.h5") -> tuple[int, dict[str, Any], Any]:
    """Exit status, header and columns of the page."""
    given = [run / "checkpoint", "--type", "html", "--data", run / data, "--output", output, *arguments]
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in given])
    if end.value.code:
        return int(end.value.code), {}, {}
    return 0, *explorer_contents((output / "explorer.html").read_text(encoding="utf-8"))


def test_blocks_of_a_field_are_averaged() -> None:
    field = np.arange(48.0 * 30).reshape(48, 30)
    small = shrunk(field)
    assert small.shape == (24, 24)
    np.testing.assert_allclose(small[:, 0], field[:, 0].reshape(24, 2).mean(1))
    np.testing.assert_allclose(small[3, 23], field[6:8, 28:30].mean())
    np.testing.assert_array_equal(shrunk(field[:5, :7]), field[:5, :7])
    volume = np.arange(60.0).reshape(5, 4, 3)
    np.testing.assert_array_equal(picture(volume), volume[2])
    assert picture(np.arange(9.0)).shape == (1, 9)


def test_values_that_are_not_finite_have_a_colour_of_their_own() -> None:
    values = np.array([[[0.0, 1.0], [np.nan, np.inf]], [[0.5, 0.25], [1.0, 0.0]]])
    pictures = FieldPictures(np.array([3, 7]), {"first state": values}, "u")
    columns = pictures.columns()
    assert columns["field/rows"].tolist() == [3, 7]
    assert columns["field/0"][[2, 3]].tolist() == [255, 255]
    np.testing.assert_allclose(columns["field/0"][[0, 1, 4, 5, 6, 7]], [0, 254, 127, 63.5, 254, 0], atol=1.5)
    nothing = FieldPictures(np.array([0]), {"first state": np.full((1, 2, 2), np.nan)}, "u")
    assert nothing.columns()["field/0"].tolist() == [255] * 4


def test_pages_of_many_rows_show_the_examples() -> None:
    examples = [np.array([9, 2, 5]), np.array([2, 7, 1])]
    assert chosen_rows(10, examples, 576, 10 * 576).tolist() == list(range(10))
    assert chosen_rows(10, examples, 576, 5 * 576).tolist() == [1, 2, 5, 7, 9]
    assert chosen_rows(10, examples, 2 * 576, 5 * 576).tolist() == [2, 9]  # the nearest first


def test_initial_fields_of_the_data(run: Path, tmp_path: Path) -> None:
    assert report(run, tmp_path / "plain")[1]["fields"] is None
    status, header, columns = report(run, tmp_path / "initial", data="data.h5")
    assert status == 0
    assert header["fields"] is not None, header["notes"]
    kind, last = header["fields"]["kinds"]
    assert (last["name"], last["height"], last["width"]) == ("last field", 8, 8)
    assert (kind["name"], kind["height"], kind["width"]) == ("initial field", 24, 24)
    initial = smooth_fields(ROWS, steps=2, extents=(30, 48))[:, 0, 0]
    pixels = columns["field/1"].reshape(ROWS, 8, 8)[6]
    assert np.corrcoef(pixels.ravel(), -initial[6, :8, :8].ravel())[0, 1] > 0.99
    expected = np.stack([shrunk(field) for field in initial])
    pixels = columns["field/0"].reshape(ROWS, 24, 24).astype(float)
    values = kind["low"] + pixels / 254 * (kind["high"] - kind["low"])
    inside = (expected > kind["low"]) & (expected < kind["high"])
    assert inside.mean() > 0.97
    np.testing.assert_allclose(values[inside], expected[inside], atol=(kind["high"] - kind["low"]) / 250)


def test_states_of_trajectories(run: Path, tmp_path: Path) -> None:
    states = smooth_fields(ROWS, steps=3, extents=(8, 12))
    states[1, -1] = np.nan  # a diverged one
    well = write_well(tmp_path / "w.h5", states)
    np.save(tmp_path / "states.npy", states)
    np.save(tmp_path / "line.npy", states[:, :, 0, 0])
    pages = [
        report(run, tmp_path / "well", "--trajectories", well),
        report(run, tmp_path / "array", "--trajectories", tmp_path / "states.npy", "--axes", "n t c y x"),
    ]
    for status, header, columns in pages:
        assert status == 0
        assert [kind["name"] for kind in header["fields"]["kinds"]] == ["first state", "last state"]
        first, last = (columns[f"field/{i}"].reshape(ROWS, 8, 12) for i in range(2))
        assert (last[1] == 255).all()
        for pixels, own in ((first[5], states[5, 0, 0]), (last[5], states[5, -1, 0])):
            assert np.corrcoef(pixels.ravel(), own.ravel())[0, 1] > 0.99
    few = report(run, tmp_path / "few", "--trajectories", well, "--rows", 20)
    rows = few[2]["rows"][few[2]["field/rows"]]
    assert len(rows) == 20
    pixels = few[2]["field/0"].reshape(20, 8, 12)[7].ravel()
    assert np.corrcoef(pixels, states[rows[7], 0, 0].ravel())[0, 1] > 0.99
    _, header, columns = report(run, tmp_path / "x", "--trajectories", tmp_path / "line.npy", "--axes", "n t x")
    assert header["fields"]["kinds"][0]["name"] == "all states, time downwards"
    assert len(columns["field/0"]) == ROWS * 3 * 12


def test_trajectories_that_do_not_fit_are_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "states.npy", smooth_fields(9, steps=3))
    given = ("--trajectories", tmp_path / "states.npy")
    for arguments, status, text in [
        ((*given, "--axes", "n t c y x"), 3, "states.npy: 9 trajectories, but the features have 40 rows"),
        (given, 2, "--axes: required for plain arrays"),
        (("--axes", "n t x"), 2, "--dataset and --axes: used with --trajectories only"),
        (("--trajectories", tmp_path / "none.npy"), 3, "none.npy"),
    ]:
        assert report(run, tmp_path / "out", *arguments)[0] == status
        assert text in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with h5py.File(tmp_path / "other.h5", "w") as file, h5py.File(run / "plain.h5") as plain:
        plain.copy("features", file)
        file["inputs/fields"] = np.zeros((ROWS - 1, 1, 4, 4))
    status, header, _ = report(run, tmp_path / "note", data=str(tmp_path / "other.h5"))
    assert status == 0
    assert header["fields"] is None
    assert "inputs/fields is [39, 1, 4, 4], expected [N, C, *space] with N = 40" in header["notes"][-1]


@pytest.mark.skipif(PROGRAM is None, reason="no Chromium on this machine")
def test_the_page_draws_them(run: Path, tmp_path: Path) -> None:
    _, header, columns = report(run, tmp_path, data="data.h5")
    with browser_page() as page:
        page.open(tmp_path / "explorer.html")
        page.click("#examples td button")
        assert page.evaluate("document.querySelectorAll('#examples canvas').length") == 2 * len(
            page.texts("#examples tbody tr")
        )
        row = int(page.texts("#row-heading")[0].removeprefix("Row "))
        label = page.evaluate("document.querySelector('#row-fields canvas').getAttribute('aria-label')")
        assert label == f"Row {row}: initial field of channel 0"
        drawn = page.evaluate(
            "[...document.querySelector('#row-fields canvas').getContext('2d').getImageData(0, 0, 24, 24).data]"
        )
        image = np.array(drawn).reshape(24, 24, 4)
        pixels = columns["field/0"].reshape(ROWS, 24, 24)[row]
        assert np.corrcoef(image[..., 1].ravel(), pixels.ravel())[0, 1] > 0.99  # green increases along the scale
        assert (image[..., 3] == 255).all()
        assert not [e for e in page.events if e["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")]
    assert header["rows"] == ROWS
