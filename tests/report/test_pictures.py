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
from matplotlib.figure import Figure

from spinlock_fast.features.categories import category_correlation
from spinlock_fast.report import KINDS
from spinlock_fast.report.checkpoint_summary import CheckpointSummary, read_checkpoint_summary
from spinlock_fast.report.data_statistics import DataStatistics, measure_data
from spinlock_fast.report.write import draw

SIZES = {2: [5, 9], 11: [4, 16, 15, 13, 32, 28, 20, 10, 11, 14, 9], 40: [4, 3, 5, 6] * 10}
FEW_CODES = [{"num_tokens": 7, "latent_dim": 4}, {"num_tokens": 4, "latent_dim": 8}]


@pytest.fixture(scope="module")
def directory_of(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Callable[[int], Path]:
    """A checkpoint with so many categories, trained at the first call."""

    @cache
    def made(count: int) -> Path:
        directory, levels = tmp_path_factory.mktemp(f"{count}"), FEW_CODES if count == 40 else []
        return synthetic_checkpoint(directory, SIZES[count], epochs=1, long_names=True, levels=levels)

    return lambda count: checkpoint if count == 5 else made(count)


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


CASES = [
    pytest.param(count, kind, True, marks=[pytest.mark.slow] if count == 11 else [])
    for count in (2, 5, 11, 40)
    for kind in KINDS
]
CASES += [pytest.param(count, kind, False) for count in (5, 40) for kind in ("topological", "semantic")]


@pytest.mark.parametrize(("count", "kind", "with_data"), CASES)
def test_dashboards_are_readable(directory_of: Callable[[int], Path], count: int, kind: str, with_data: bool) -> None:
    assert_readable(drawn(directory_of(count), kind, with_data))


@pytest.mark.parametrize(("kind", "measured"), [*((kind, False) for kind in KINDS), ("engineering", True)])
def test_missing_parts_leave_no_gap(checkpoint: Path, kind: str, measured: bool) -> None:
    summary = read_checkpoint_summary(checkpoint)
    summary.epochs, summary.metrics = [], summary.metrics if measured else {}
    assert_readable(draw(kind, summary, None))


@pytest.mark.parametrize("kind", KINDS)
def test_totals_are_those_of_metrics_json(checkpoint: Path, kind: str) -> None:
    _, _, metrics = read(checkpoint)
    texts = [text.get_text() for text, _ in drawn_texts(drawn(checkpoint, kind))]
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


def test_heat_maps_hold_what_was_measured(checkpoint: Path) -> None:
    _, _, metrics = read(checkpoint)
    figure = drawn(checkpoint, "engineering")
    used = panel(figure, "Utilization").images[0]
    expected = np.array([category["utilization"] for category in metrics["categories"]])
    assert np.allclose(used.get_array(), expected)
    assert used.get_clim() == (0.0, 1.0)
    share = panel(figure, "Perplexity").images[0]
    codes = np.array([category["codes"] for category in metrics["categories"]])
    perplexity = np.array([category["perplexity"] for category in metrics["categories"]])
    assert np.allclose(share.get_array(), perplexity / codes)
    assert share.get_clim() == (0.0, 1.0)
    assert {used.get_cmap().name, share.get_cmap().name} == {"cividis"}
    bars = panel(figure, "Error by category").patches
    errors = [category["partial_mse"] for category in metrics["categories"]]
    assert np.allclose([bar.get_width() for bar in bars], errors)


def test_the_summary_repeats_metrics_json(checkpoint: Path) -> None:
    _, _, metrics = read(checkpoint)
    texts = [text.get_text() for text in panel(drawn(checkpoint, "engineering"), "Summary").texts]
    rows = dict(zip(texts[0::2], texts[1::2], strict=False))
    assert rows["quality"] == f"{metrics['quality']:.4f}"
    assert rows["codes in use"] == f"{metrics['active_codes']} of {metrics['total_codes']}"
    assert rows["utilization"] == f"{metrics['utilization']:.3f}"
    assert rows["epochs"] == f"{metrics['epochs']}, best {metrics['best_epoch']}"


def test_curves_mark_the_best_epoch_and_the_resets(checkpoint: Path) -> None:
    summary, _, metrics = read(checkpoint, with_data=False)
    history = json.loads((checkpoint / "training_history.json").read_text())
    resets = [record["epoch"] for record in history["epochs"] if record["resets"]]
    assert resets
    figure = draw("engineering", summary, None)
    for title, key in (("Loss", "val_loss"), ("Quality", "quality")):
        lines = {line.get_marker(): line for line in panel(figure, title).lines if len(line.get_xdata())}
        assert list(lines["D"].get_xdata()) == [metrics["best_epoch"]]
        assert lines["D"].get_ydata()[0] == pytest.approx(metrics[key])
        assert list(lines["^"].get_xdata()) == resets
    assert f"dead codes replaced: {sum(r['resets'] or 0 for r in history['epochs']):,}" in [
        text.get_text() for text, _ in drawn_texts(figure)
    ]


def test_the_schematic_counts_every_weight(checkpoint: Path) -> None:
    summary, _, metrics = read(checkpoint)
    model = summary.model
    parts = (model.category_mlp, model.heads, model.shared_decoder, model.partial_decoders)
    assert sum(p.numel() for part in parts for p in part.parameters()) == metrics["trainable_parameters"]
    texts = " ".join(text.get_text() for text in drawn(checkpoint, "engineering").axes[1].texts)
    for level in range(3):
        assert f"L{level}: {sum(c['codes'][level] for c in metrics['categories'])} codes" in texts
    assert f"{summary.tokenizer.cleaner.keep.size} → {len(summary.feature_names)} columns" in texts


def test_maps_hold_each_code_once(checkpoint: Path) -> None:
    _, statistics, metrics = read(checkpoint)
    assert statistics is not None
    figure = drawn(checkpoint, "topological")
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


def test_many_categories_share_one_colour(directory_of: Callable[[int], Path]) -> None:
    metrics = read(directory_of(40))[2]
    codes = panel(drawn(directory_of(40), "topological"), "code vectors, latent")
    in_focus = [
        points for points in codes.collections if tuple(points.get_facecolor()[0][:3]) != (0.8117647058823529,) * 3
    ]
    assert len({tuple(points.get_facecolor()[0]) for points in in_focus}) == 1
    assert sum(len(points.get_offsets()) for points in in_focus) == metrics["total_codes"]


def test_semantic_panels_hold_what_was_measured(checkpoint: Path) -> None:
    summary, statistics, metrics = read(checkpoint)
    assert statistics is not None
    figure = drawn(checkpoint, "semantic")
    sizes = panel(figure, "Sizes, by family")
    counts = [[c["families"].get(f, 0) for c in metrics["categories"]] for f in summary.families]
    assert [bar.get_width() for bar in sizes.patches] == [n for family in counts for n in family]
    image = panel(figure, "Correlation of the categories").images[0]
    values = np.asarray(image.get_array())
    off = values[~np.eye(len(values), dtype=bool)]
    assert off.max() == pytest.approx(metrics["category_correlation_max"], abs=1e-4)
    assert image.get_clim() == (0.0, 1.0)
    tokens = np.asarray(panel(figure, "Tokens").images[0].get_array())
    assert tokens.tolist() == [category["codes"] for category in metrics["categories"]]
    features = panel(figure, "Features by category").images[0].get_array()
    assert features.shape == (len(metrics["categories"]), sum(c["features"] for c in metrics["categories"]))


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
