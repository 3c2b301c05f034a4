"""Time series in the explorer: the range of all rows, and the series of examples, against NumPy."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import yaml
from browser import PROGRAM, browser_page
from dashboards import explorer_contents
from planted import operators

from spinlock_fast.data.feature_source import FeatureSource
from spinlock_fast.report.__main__ import main
from spinlock_fast.report.explorer import series as series_module
from spinlock_fast.report.explorer.data import explorer_data
from spinlock_fast.report.explorer.page import build_page
from spinlock_fast.report.explorer.series import evenly_spaced, time_series
from spinlock_fast.train import main as train

OBSERVED = operators(400, seed=3)
NAMES = ["constant", "level", "noise", "missing"]
ABOUT = {"checkpoint": "x", "sha256": "", "data": "d.h5", "quality": 0.5, "measured_on": "1 row"}
EXAMPLES = [np.array([7, 3, 250]), np.array([3, 399])]


def planted_series() -> np.ndarray:
    """[400, 100, 4]; "level" follows the first token, most of all at the end."""
    rng = np.random.default_rng(1)
    values = rng.standard_normal((400, 100, 4))
    values[..., 0] = 2.0
    values[..., 1] += np.linspace(0, 3, 100) * (OBSERVED.tokens[:, :1] - 2.5)
    values[::2, :50, 3] = np.nan
    values[:, 0, 3] = np.nan
    values[5, 40, 2] = 1e6  # a diverged row
    return values.astype(np.float32)


VALUES = planted_series()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two shards of 2,000 rows; every tenth row is observed."""
    directory = tmp_path_factory.mktemp("series")
    everything = np.repeat(VALUES, 10, axis=0)
    everything[np.arange(4000) % 10 > 0] = 7.0
    for i in range(2):
        with h5py.File(directory / f"part_{i}.h5", "w") as file:
            file.create_dataset("features/temporal", data=everything[2000 * i : 2000 * (i + 1)], chunks=(64, 100, 4))
            file["features/temporal"].attrs["feature_names"] = NAMES
            file["features/pair"] = everything[2000 * i : 2000 * (i + 1), :2]
            file["features/flat"] = everything[2000 * i : 2000 * (i + 1), 0]
    return str(directory / "part_*.h5")


def test_bands_and_series_equal_those_of_numpy(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(series_module, "_BYTES_AT_ONCE", 100 * 1600)
    plots = time_series(FeatureSource(data, {"temporal": "features/temporal"}), OBSERVED, EXAMPLES)
    assert plots is not None
    assert plots.rows.tolist() == list(range(400))
    assert plots.band_rows == 400
    assert [s.name for s in plots.series] == NAMES
    for d, series in enumerate(plots.series):
        steps = series.steps
        assert (len(steps), steps[0], steps[-1], series.length) == (32, 0, 99, 100)
        own = VALUES[:, steps, d].astype(np.float64)
        known = ~np.isnan(own).all(0)
        expected = np.full((3, 32), np.nan)
        expected[:, known] = np.nanquantile(own[:, known], [0.1, 0.5, 0.9], axis=0)
        np.testing.assert_allclose(series.band, expected, rtol=1e-6)
        finite = np.isfinite(own)
        assert (series.levels[~finite] == 255).all()
        shown = series.low + series.levels / 254 * (series.high - series.low)
        clipped = np.clip(own, series.low, series.high)
        assert np.abs(shown - clipped)[finite].max() <= (series.high - series.low) / 500
        assert series.low <= np.nanmin(series.band)
        assert series.high >= np.nanmax(series.band)
    noise = plots.series[2]
    assert noise.high < 5.0  # one diverged row does not make all others flat


def test_series_are_ranked_by_the_difference_of_the_code(data: str) -> None:
    plots = time_series(FeatureSource(data, {"temporal": "features/temporal"}), OBSERVED, EXAMPLES)
    assert plots is not None
    level = plots.series[1]
    steps = level.steps
    inside = np.clip(VALUES[:, steps, 1].astype(np.float64), level.low, level.high)
    scaled = (inside - inside.mean(0)) / inside.std(0)
    for code in range(6):
        mean = scaled[OBSERVED.tokens[:, 0] == code].mean(0)
        np.testing.assert_allclose(
            [level.shift[code], level.strength[code]], [mean.mean(), np.abs(mean).mean()], atol=1e-4
        )
    strength = np.stack([s.strength for s in plots.series], 1)
    assert strength[[0, 5]].argmax(1).tolist() == [1, 1]
    assert not strength[:, 0].any()


def test_pages_of_many_rows_keep_examples_and_the_series_that_differ_most(
    data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = FeatureSource(data, {"temporal": "features/temporal"})
    monkeypatch.setattr(series_module, "BAND_ROWS", 100)
    monkeypatch.setattr(series_module, "MAX_BYTES", 32 * 4 * 4)
    plots = time_series(source, OBSERVED, EXAMPLES)
    assert plots is not None
    assert (plots.rows.tolist(), [s.name for s in plots.series]) == ([3, 7, 250, 399], NAMES)
    assert plots.band_rows == 100
    sampled = VALUES[evenly_spaced(400, 100)][:, plots.series[1].steps, 1]
    np.testing.assert_allclose(plots.series[1].band, np.quantile(sampled, [0.1, 0.5, 0.9], axis=0), rtol=1e-5)
    monkeypatch.setattr(series_module, "MAX_BYTES", 32 * 4 * 3)
    plots = time_series(source, OBSERVED, EXAMPLES)
    assert plots is not None
    assert (plots.rows.tolist(), [s.name for s in plots.series]) == ([3, 7, 250], NAMES)  # the nearest first
    monkeypatch.setattr(series_module, "_MIN_SERIES", 1)
    plots = time_series(source, OBSERVED, EXAMPLES)
    assert plots is not None
    assert (plots.rows.tolist(), [s.name for s in plots.series]) == ([3, 7, 250, 399], NAMES[1:])
    monkeypatch.setattr(series_module, "MAX_BYTES", 32 * 4)
    plots = time_series(source, OBSERVED, EXAMPLES)
    assert plots is not None
    assert (plots.rows.tolist(), [s.name for s in plots.series]) == ([3, 7, 250, 399], ["level"])


def test_families_without_steps_have_no_series(data: str) -> None:
    assert (
        time_series(FeatureSource(data, {"pair": "features/pair", "flat": "features/flat"}), OBSERVED, EXAMPLES) is None
    )
    both = FeatureSource(data, {"a": "features/temporal", "b": "features/temporal", "flat": "features/flat"})
    plots = time_series(both, OBSERVED, EXAMPLES)
    assert plots is not None
    assert [s.name for s in plots.series] == [f"{family}: {name}" for family in "ab" for name in NAMES]


def test_the_command_adds_them(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    series = rng.standard_normal((60, 30, 2)).cumsum(1).astype(np.float32)
    with h5py.File(tmp_path / "data.h5", "w") as file:
        file["features/temporal"] = series
        file["features/temporal"].attrs["feature_names"] = ["mean", "variance"]
    settings = {
        "dataset_path": str(tmp_path / "data.h5"),
        "output_dir": str(tmp_path / "run"),
        "device": "cpu",
        "families": {"temporal": {"encoder": "StatisticsEncoder", "dataset": "features/temporal"}},
        "training": {"batch_size": 32, "num_epochs": 1, "num_categories_auto": 2, "orthogonality_target": 10.0},
        "logging": {"tensorboard": False},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(SystemExit) as end:
        train([str(tmp_path / "run.yaml"), "--quiet"])
    assert not end.value.code
    with pytest.raises(SystemExit) as end:
        main([str(tmp_path / "run"), "--type", "html", "--output", str(tmp_path / "page"), "--rows", "40"])
    assert not end.value.code
    header, columns = explorer_contents((tmp_path / "page" / "explorer.html").read_text(encoding="utf-8"))
    assert [each["name"] for each in header["series"]["series"]] == ["mean", "variance"]
    own = series[columns["rows"]][..., 0]
    np.testing.assert_allclose(
        columns["series/0/band"].reshape(3, 30), np.quantile(own, [0.1, 0.5, 0.9], axis=0), rtol=1e-5, atol=1e-6
    )


@pytest.mark.slow
@pytest.mark.skipif(PROGRAM is None, reason="no Chromium on this machine")
def test_the_page_draws_them(data: str, tmp_path: Path) -> None:
    contents = explorer_data(OBSERVED, ABOUT)
    plots = time_series(FeatureSource(data, {"temporal": "features/temporal"}), OBSERVED, contents.examples())
    assert plots is not None
    contents.add_series(plots)
    (tmp_path / "explorer.html").write_text(build_page(contents, "Tokens"), encoding="utf-8")
    with browser_page() as page:
        page.open(tmp_path / "explorer.html", "#s=c1=5")
        assert page.texts("#series figcaption")[0] == "level"
        assert page.evaluate("document.querySelectorAll('#series figure').length") == 4
        first = int(page.texts("#examples td button")[0])
        (text,) = page.texts("#series-help")
        assert text.startswith(
            f"Row {first}, the most typical of c1 L0 = 5; thin: 4 further examples. Grey: the range of all"
        )

        page.evaluate("{ const make = URL.createObjectURL; URL.createObjectURL = b => make(window.saved = b); }")
        page.choose("#one-series", "level")
        page.click("#series-heading button")
        lines = [line.split(",") for line in page.evaluate("window.saved.text()").splitlines()]
        assert lines[0] == ["row", "series", "step", "value", "quantile_10", "median", "quantile_90"]
        level = plots.series[1]
        table = np.array([[float(value) for value in line[2:]] for line in lines[1:]])
        assert table[:, 0].tolist() == level.steps.tolist()
        clipped = np.clip(VALUES[first // 10, level.steps, 1], level.low, level.high)
        np.testing.assert_allclose(table[:, 1], clipped, atol=(level.high - level.low) / 500)
        np.testing.assert_allclose(table[:, 2:].T, level.band, rtol=1e-5)
        drawn = page.evaluate("document.querySelector('#series path.one').getAttribute('d')")
        heights = [float(point.split(" ")[1]) for point in drawn[1:].split("L")]
        assert len(heights) == 32
        assert np.corrcoef(heights, clipped)[0, 1] < -0.999

        # Another row by a click, and a second code. Missing values are gaps.
        page.click("#examples tr:nth-child(2) td button")
        second = int(page.texts("#examples td button")[1])
        assert page.texts("#series-help")[0].startswith(f"Row {second}; thin: 4 further")
        page.write("#search", "c1=5 vs 0")
        assert "; orange: row " in page.texts("#series-help")[0]
        assert page.evaluate("document.querySelectorAll('#series path.two').length") == 1
        page.choose("#one-series", "missing")
        bands = page.evaluate("document.querySelector('#series path.median').getAttribute('d')")
        assert bands.count("M") == 1
        assert bands.count("L") == 30
        page.click("#row-close")
        page.write("#search", "c1=1")
        assert page.evaluate("document.getElementById('series-heading').getBoundingClientRect().height") > 0
        page.write("#search", "c1=*/3")  # no row has both
        assert page.texts("#matches") == ["0 of 400 rows"]
        for part in ("series-heading", "series-controls", "series", "series-help"):
            assert page.evaluate(f"document.getElementById('{part}').getBoundingClientRect().height") == 0
        assert not [e for e in page.events if e["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")]
