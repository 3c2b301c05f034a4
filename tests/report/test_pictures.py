"""Dashboards with 2 to 40 categories and long names are readable and show the measured values."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from dashboards import assert_readable, drawn_texts, synthetic_checkpoint
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import QuadMesh
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

import spinlock_fast.report
from spinlock_fast.analysis import analyze
from spinlock_fast.errors import ConfigError
from spinlock_fast.features.categories import category_correlation
from spinlock_fast.plot_style import BACKGROUND, FOCUS, MAGNITUDE, NEUTRAL, PALETTE, figure_style
from spinlock_fast.report import KINDS, code_maps, write_report
from spinlock_fast.report.checkpoint_summary import CheckpointSummary, read_checkpoint_summary
from spinlock_fast.report.data_statistics import DataStatistics, measure_data
from spinlock_fast.report.write import draw

SIZES = {2: [5, 9], 11: [4, 16, 15, 13, 32, 28, 20, 10, 11, 14, 9], 25: [4, 3, 5, 6, 4] * 5, 40: [4, 3, 5, 6] * 10}
FEW_CODES = [{"num_tokens": 7, "latent_dim": 4}, {"num_tokens": 4, "latent_dim": 8}]
_MADE: dict[int, Path] = {}


@pytest.fixture(scope="module")
def directory_of(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Callable[[int], Path]:
    """A checkpoint with a number of categories; those with 11 and 40 have long names, with 25 one family has none."""

    def make(count: int) -> Path:
        if count not in _MADE:
            _MADE[count] = synthetic_checkpoint(
                tmp_path_factory.mktemp(f"{count}"),
                SIZES[count],
                epochs=1,
                long_names=count in (11, 40),
                levels=FEW_CODES if count >= 25 else [],
                nameless=["summary"] if count == 25 else [],
                conditions=count != 2,
            )
        return _MADE[count]

    _MADE.clear()
    _MADE[5] = checkpoint
    return make


@pytest.fixture(scope="module")
def five(checkpoint: Path) -> Callable[[str], Figure]:
    """The dashboards of the checkpoint with five categories, each drawn once."""
    summary, statistics, _ = read(checkpoint)

    @cache
    def figure(kind: str) -> Figure:
        with figure_style():
            return draw(kind, summary, statistics)

    return figure


def read(directory: Path, with_data: bool = True) -> tuple[CheckpointSummary, DataStatistics | None, dict[str, Any]]:
    return _read(directory, with_data)


@cache
def _read(directory: Path, with_data: bool) -> tuple[CheckpointSummary, DataStatistics | None, dict[str, Any]]:
    summary = read_checkpoint_summary(directory)
    statistics = measure_data(summary, str(directory.parent / "data.h5")) if with_data else None
    return summary, statistics, json.loads((directory / "metrics.json").read_text())


def drawn(directory: Path, kind: str, with_data: bool = True) -> Figure:
    """A dashboard, drawn once: tests only look at it."""
    return _drawn(directory, kind, with_data)


@cache
def _drawn(directory: Path, kind: str, with_data: bool) -> Figure:
    summary, statistics, _ = read(directory, with_data)
    return draw(kind, summary, statistics)


def panel(figure: Figure, title: str) -> Axes:
    found = [ax for ax in figure.axes if title in ax.get_title(loc="left")]
    assert len(found) == 1, [ax.get_title(loc="left") for ax in figure.axes]
    return found[0]


def words(figure: Figure, ax: Axes) -> list[str]:
    own = {id(text) for text in ax.texts}
    return [text.get_text() for text, _ in drawn_texts(figure) if id(text) in own]


@pytest.mark.parametrize("kind", KINDS)
def test_dashboards_of_five_categories_are_readable(five: Callable[[str], Figure], kind: str) -> None:
    assert_readable(five(kind))
    assert_few_colours(five(kind))


SLOW = pytest.mark.slow
CASES = [pytest.param(40, kind, True) for kind in KINDS]
CASES += [pytest.param(40, "semantic", False)]
CASES += [pytest.param(count, kind, True, marks=SLOW) for count in (2, 11, 25) for kind in KINDS]
CASES += [pytest.param(5, "topological", False, marks=SLOW), pytest.param(25, "semantic", False, marks=SLOW)]


@pytest.mark.parametrize(("count", "kind", "with_data"), CASES)
def test_dashboards_are_readable(directory_of: Callable[[int], Path], count: int, kind: str, with_data: bool) -> None:
    summary, statistics, metrics = read(directory_of(count), with_data)
    figure = draw(kind, summary, statistics)
    assert_readable(figure)
    assert_few_colours(figure)
    if kind == "topological" and with_data and count == 40:
        codes = panel(figure, "code vectors, latent")
        in_focus = [p for p in codes.collections if to_hex(p.get_facecolor()[0]) != BACKGROUND]
        assert {to_hex(points.get_facecolor()[0]) for points in in_focus} == {FOCUS}
        assert sum(len(points.get_offsets()) for points in in_focus) == metrics["total_codes"]


def assert_few_colours(figure: Figure) -> None:
    """Asserts that points and bars have the eight colours of the palette or are grey, and never black."""
    points = [p for ax in figure.axes for p in ax.collections if not isinstance(p, QuadMesh)]
    bars = [bar for ax in figure.axes for bar in ax.patches if bar.get_fill() and not isinstance(bar, FancyBboxPatch)]
    colours = {to_hex(colour) for p in points for colour in np.atleast_2d(p.get_facecolor())}
    colours |= {to_hex(bar.get_facecolor()) for bar in bars}
    assert "#000000" not in colours
    assert {c for c in colours if len({c[1:3], c[3:5], c[5:7]}) > 1} <= {*PALETTE, NEUTRAL}


@pytest.mark.parametrize(("kind", "measured"), [("semantic", False), ("engineering", True)])
def test_missing_parts_leave_no_gap(checkpoint: Path, kind: str, measured: bool) -> None:
    summary = read_checkpoint_summary(checkpoint)
    summary.epochs, summary.metrics = [], summary.metrics if measured else {}
    assert_readable(draw(kind, summary, None))


@pytest.mark.parametrize("kind", KINDS)
def test_totals_are_those_of_metrics_json(checkpoint: Path, five: Callable[[str], Figure], kind: str) -> None:
    metrics = json.loads((checkpoint / "metrics.json").read_text())
    texts = [text.get_text() for text, _ in drawn_texts(five(kind))]
    line = next(text for text in texts if "codebooks  ·" in text)
    numbers = [int(number.replace(",", "")) for number in re.findall(r"[\d,]*\d", line)]
    categories = metrics["categories"]
    families = {family for category in categories for family in category["families"]}
    assert numbers == [
        len(categories),
        sum(len(category["codes"]) for category in categories),
        sum(category["features"] for category in categories),
        len(families),
        metrics["total_codes"],
        metrics["active_codes"],
        metrics["val_rows"],
    ]


def test_heat_maps_hold_what_was_measured(checkpoint: Path, five: Callable[[str], Figure]) -> None:
    metrics = json.loads((checkpoint / "metrics.json").read_text())
    figure = five("engineering")
    used = panel(figure, "Utilization").images[0]
    expected = np.array([category["utilization"] for category in metrics["categories"]])
    assert np.allclose(used.get_array(), expected)
    assert used.get_clim() == (0.0, 1.0)
    share = panel(figure, "Perplexity").images[0]
    codes = np.array([category["codes"] for category in metrics["categories"]])
    perplexity = np.array([category["perplexity"] for category in metrics["categories"]])
    assert np.allclose(share.get_array(), perplexity / codes)
    assert share.get_clim() == (0.0, 1.0)
    assert {used.get_cmap().name, share.get_cmap().name} == {MAGNITUDE}
    bars = panel(figure, "Error by category")
    errors = [category["partial_mse"] for category in metrics["categories"]]
    assert np.allclose([bar.get_width() for bar in bars.patches], errors)
    assert [label.get_text() for label in bars.get_yticklabels()] == [c["name"] for c in metrics["categories"]]
    low, high = panel(figure, "Quality on").get_ylim()
    curves = [y for line in panel(figure, "Quality on").lines[:3] for y in line.get_ydata()]
    assert low <= min(curves) < low + 0.1
    assert high - 0.1 < max(curves) <= high


def test_the_summary_repeats_metrics_json(checkpoint: Path, five: Callable[[str], Figure]) -> None:
    metrics = json.loads((checkpoint / "metrics.json").read_text())
    texts = [text.get_text() for text in panel(five("engineering"), "Summary").texts]
    rows = dict(zip(texts[0::2], texts[1::2], strict=False))
    assert rows["quality"] == f"{metrics['quality']:.4f}"
    assert rows["codes in use"] == f"{metrics['active_codes']} of {metrics['total_codes']}"
    assert rows["utilization"] == f"{metrics['utilization']:.3f}"
    assert rows["epochs"] == f"{metrics['epochs']}, best {metrics['best_epoch']}"


def test_curves_mark_the_best_epoch_and_the_resets(checkpoint: Path, five: Callable[[str], Figure]) -> None:
    metrics = json.loads((checkpoint / "metrics.json").read_text())
    history = json.loads((checkpoint / "training_history.json").read_text())
    resets = [record["epoch"] for record in history["epochs"] if record["resets"]]
    assert resets
    figure = five("engineering")
    for title, key in (("Loss", "val_loss"), ("Quality", "quality")):
        lines = {line.get_marker(): line for line in panel(figure, title).lines if len(line.get_xdata())}
        assert list(lines["D"].get_xdata()) == [metrics["best_epoch"]]
        assert lines["D"].get_ydata()[0] == pytest.approx(metrics[key])
        assert list(lines["^"].get_xdata()) == resets
    assert f"dead codes replaced: {sum(r['resets'] or 0 for r in history['epochs']):,}" in [
        text.get_text() for text, _ in drawn_texts(figure)
    ]


def test_the_schematic_counts_every_weight(checkpoint: Path, five: Callable[[str], Figure]) -> None:
    summary, _, metrics = read(checkpoint, with_data=False)
    model = summary.model
    parts = (model.category_mlp, model.heads, model.shared_decoder, model.partial_decoders)
    assert sum(p.numel() for part in parts for p in part.parameters()) == metrics["trainable_parameters"]
    texts = " ".join(text.get_text() for text in five("engineering").axes[1].texts)
    for level in range(3):
        assert f"L{level}: {sum(c['codes'][level] for c in metrics['categories'])} codes" in texts
    assert f"{summary.tokenizer.cleaner.keep.size} → {len(summary.feature_names)} columns" in texts


def test_maps_hold_each_code_once(checkpoint: Path, five: Callable[[str], Figure]) -> None:
    _, statistics, metrics = read(checkpoint)
    assert statistics is not None
    figure = five("topological")
    codes, centroids = (panel(figure, title) for title in ("code vectors, latent", "codes in feature space"))
    assert sum(len(points.get_offsets()) for points in codes.collections) == metrics["total_codes"]
    occurring = sum(len(np.unique(column)) for column in statistics.tokens.T)
    assert sum(len(points.get_offsets()) for points in centroids.collections) == occurring
    assert {len(category["codes"]) for category in metrics["categories"]} == {3}
    assert len({points.get_paths()[0].vertices.tobytes() for points in codes.collections}) == 3  # a marker a level
    texts = [text.get_text() for text in panel(figure, "By level").texts]  # the caption comes last
    assert texts[-5:-1] == [
        f"{metrics['total_codes']}",
        f"{occurring}",
        f"{metrics['utilization']:.3f}",
        f"{metrics['perplexity_over_k']:.3f}",
    ]


def test_what_means_something_is_large(five: Callable[[str], Figure]) -> None:
    figure = five("topological")
    for large, small in (("codes in feature space", "code vectors"), ("Codebooks in feature", "Codebook centroids")):
        a, b = (panel(figure, title).get_window_extent() for title in (large, small))
        assert a.width * a.height > 1.5 * b.width * b.height
    maps = panel(figure, "codes in feature space")
    assert maps.get_xlabel().startswith("component 1, ")
    assert "feature_" in maps.get_xlabel()  # the columns have names
    assert panel(figure, "code vectors").get_xlabel() == "t-SNE 1"


def test_semantic_panels_hold_what_was_measured(checkpoint: Path, five: Callable[[str], Figure]) -> None:
    summary, statistics, metrics = read(checkpoint)
    assert statistics is not None
    figure = five("semantic")
    sizes = panel(figure, "Features by family")
    counts = [[c["families"].get(f, 0) for c in metrics["categories"]] for f in summary.families]
    assert [bar.get_width() for bar in sizes.patches] == [n for family in counts for n in family]
    image = panel(figure, "Categories").images[0]
    values = np.asarray(image.get_array())
    off = values[~np.eye(len(values), dtype=bool)]
    assert off.max() == pytest.approx(metrics["category_correlation_max"], abs=1e-4)
    features = panel(figure, "Features and categories").images[0].get_array()
    assert features.shape == (len(metrics["categories"]), sum(c["features"] for c in metrics["categories"]))
    members = words(figure, panel(figure, "Strongest members"))
    for c, group in enumerate(summary.groups):
        strongest = summary.feature_names[group[int(np.argmax(statistics.affinity[c, group]))]]
        assert strongest.partition("::")[2] in members


def test_associations_are_those_of_analyze(checkpoint: Path, five: Callable[[str], Figure]) -> None:
    found = analyze(checkpoint, str(checkpoint.parent / "data.h5")).tables["associations"]
    told = panel(five("semantic"), "What the tokens tell")
    (mesh,) = told.collections
    names = [label.get_text() for ax in told.child_axes for label in ax.get_xticklabels()]
    assert names[0] == "noise regime"
    for m, name in enumerate(names):
        own = found["condition"] == name
        shown = np.ma.filled(mesh.get_array().reshape(-1, len(names))[:, m], np.nan)
        clear = np.abs(found["q"][own] - 0.05) > 0.02  # the permutations are others
        expected = np.where(found["q"][own] <= 0.05, found["ami"][own], np.nan)
        np.testing.assert_allclose(shown[clear], expected[clear])
    assert not np.ma.getmaskarray(mesh.get_array()).all()


def test_columns_without_names_show_what_their_tokens_tell(checkpoint: Path, tmp_path: Path) -> None:
    summary, statistics, _ = read(checkpoint)
    for family in summary.tokenizer.families:
        family.column_names = None
    figure = draw("semantic", summary, statistics)
    members = words(figure, panel(figure, "Members"))
    assert "without names: 12 of summary" in members
    assert any(text.startswith("tells noise regime .") for text in members)
    assert not [text for text in members if "feature_" in text]
    caption = [text.get_text() for text, _ in drawn_texts(figure) if "have no names" in text.get_text()]
    assert caption


def test_figures_from_python_are_those_of_the_command(checkpoint: Path, tmp_path: Path) -> None:
    with matplotlib.rc_context({"font.size": 20, "axes.grid": True}):  # the settings of a user change nothing
        figure = spinlock_fast.report.engineering(checkpoint)
    figure.savefig(tmp_path / "python.png", metadata={"Software": None})
    write_report(checkpoint, tmp_path, kinds=("engineering",))
    assert (tmp_path / "python.png").read_bytes() == (tmp_path / "engineering.png").read_bytes()
    with pytest.raises(ConfigError, match="--conditions"):
        write_report(checkpoint, tmp_path, kinds=("engineering",), conditions=["metadata/noise_regimes"])


def test_correlation_of_other_rows_is_said_to_be_of_all(checkpoint: Path) -> None:
    summary = read_checkpoint_summary(checkpoint)
    summary.metrics["samples"] += 1
    statistics = measure_data(summary, str(checkpoint.parent / "data.h5"))
    assert statistics.correlation_on == "all 200 rows"
    x = np.concatenate([x for _, x in summary.tokenizer.features_file(checkpoint.parent / "data.h5")])
    expected = category_correlation(x, summary.model.config.group_indices)
    assert np.allclose(statistics.category_correlation, expected)


def test_no_global_state_is_left(checkpoint: Path) -> None:
    before = dict(matplotlib.rcParams)
    summary, _, _ = read(checkpoint, with_data=False)
    figure = draw("engineering", summary, None)
    assert dict(matplotlib.rcParams) == before
    assert isinstance(figure.canvas, FigureCanvasAgg)
    assert figure.canvas.manager is None


@pytest.mark.slow
def test_points_of_many_maps_are_an_image_in_an_svg(
    directory_of: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    for limit in (20_000, 10):
        monkeypatch.setattr(code_maps, "_MAX_VECTOR_POINTS", limit)
        write_report(directory_of(25), tmp_path, kinds=("topological",))
        svg = (tmp_path / "topological.svg").read_text()
        sizes.append((svg.count("<use"), svg.count("<image")))
    (points, images), (fewer_points, more_images) = sizes
    assert fewer_points < points / 3
    assert more_images > images


def test_assert_readable_finds_what_a_reader_would() -> None:
    figure = Figure(figsize=(3, 2))
    FigureCanvasAgg(figure)
    ax = figure.add_subplot()
    ax.plot([0, 1], [0, 1])
    assert_readable_fails = pytest.raises(AssertionError)
    for text, problem in (
        (ax.text(0.5, 0.5, "small", fontsize=5), "below 7 points"),
        (ax.text(0.9, 0.1, "a long text at the right edge"), "clipped"),
        (ax.text(0.0, 1.02, "0.0", transform=ax.get_xaxis_transform()), ""),
    ):
        if problem:
            with assert_readable_fails as caught:
                assert_readable(figure)
            assert problem in str(caught.value)
        text.remove()
    first, second = ax.text(0.2, 0.5, "one upon"), ax.text(0.3, 0.5, "the other")
    with pytest.raises(AssertionError, match="overlap"):
        assert_readable(figure)
    first.remove()
    second.remove()
    assert_readable(figure)
    figure.add_axes((0.7, 0.2, 0.1, 0.1))
    with pytest.raises(AssertionError, match="empty panel"):
        assert_readable(figure)
