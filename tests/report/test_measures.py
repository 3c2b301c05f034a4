"""Statistics of the dashboards against direct formulas."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from dashboards import assert_readable, synthetic_checkpoint
from numpy.typing import NDArray

from spinlock_fast.plot_style import PALETTE
from spinlock_fast.report.checkpoint_summary import CheckpointSummary, read_checkpoint_summary
from spinlock_fast.report.code_geometry import (
    clip_outliers,
    code_vectors,
    feature_similarity,
    latent_similarity,
    principal_components,
    tsne,
)
from spinlock_fast.report.data_statistics import DataStatistics, measure_data
from spinlock_fast.report.style import (
    category_colours,
    labelled_ticks,
    level_marker,
    shorten,
    unique_labels,
)
from spinlock_fast.report.write import draw

Matrix = NDArray[np.float32]


@pytest.fixture(scope="module")
def measured(checkpoint: Path) -> tuple[CheckpointSummary, DataStatistics, Matrix]:
    summary = read_checkpoint_summary(checkpoint)
    data = str(checkpoint.parent / "data.h5")
    x = np.concatenate([x for _, x in summary.tokenizer.features_file(data)])
    return summary, measure_data(summary, data), x


def test_centroids_are_means_of_the_rows_of_a_code(measured: tuple[CheckpointSummary, DataStatistics, Matrix]) -> None:
    summary, statistics, x = measured
    first = 0
    for g, codebook in enumerate(summary.codebooks):
        for k in range(codebook.codes):
            rows = statistics.tokens[:, g] == k
            assert statistics.counts[first + k] == rows.sum()
            if rows.any():
                assert np.allclose(statistics.centroids[first + k], x[rows].mean(0), atol=1e-5)
            else:
                assert np.isnan(statistics.centroids[first + k]).all()
        first += codebook.codes
    assert first == summary.total_codes


def test_affinity_is_the_mean_correlation_with_the_other_features(
    measured: tuple[CheckpointSummary, DataStatistics, Matrix],
) -> None:
    summary, statistics, x = measured
    assert statistics.correlation_on == "the 180 training rows"
    r = np.abs(np.corrcoef(x.T.astype(np.float64)))
    train_only = statistics.affinity
    for c, members in enumerate(summary.groups):
        for f in (members[0], summary.groups[c - 1][0]):
            others = [m for m in members if m != f]
            assert train_only[c, f] == pytest.approx(r[f, others].mean(), abs=0.05)


def test_feature_similarity_is_the_cosine_of_covariances(
    measured: tuple[CheckpointSummary, DataStatistics, Matrix],
) -> None:
    summary, statistics, x = measured
    covariances = []
    for g in range(len(summary.codebooks)):
        conditional = np.zeros_like(x, dtype=np.float64)
        for k in np.unique(statistics.tokens[:, g]):
            rows = statistics.tokens[:, g] == k
            conditional[rows] = x[rows].mean(0)
        conditional -= x.mean(0)
        covariances.append((conditional.T @ conditional).ravel())
    with np.errstate(invalid="ignore"):  # 0 / 0 of a codebook of which one code occurs
        unit = [s / np.linalg.norm(s) for s in covariances]
    found = feature_similarity(summary, statistics)
    assert np.allclose(found, np.array(unit) @ np.array(unit).T, atol=1e-4, equal_nan=True)
    own, other = found[0, 1], found[0, 3]  # planted: categories share nothing
    assert own > 0.7 > 0.3 > other


def test_a_codebook_of_which_one_code_occurs_has_no_similarity(
    measured: tuple[CheckpointSummary, DataStatistics, Matrix],
) -> None:
    summary, statistics, _ = measured
    first = summary.codebooks[0].codes
    counts = statistics.counts.copy()
    counts[:first] = 0
    counts[2] = statistics.rows
    centroids = np.where(counts[:, None] > 0, np.nan_to_num(statistics.centroids), np.nan)
    found = feature_similarity(summary, replace(statistics, counts=counts, centroids=centroids))
    assert np.isnan(found[0]).all()
    assert np.isnan(found[:, 0]).all()
    several = [g for g in range(1, len(summary.codebooks)) if len(np.unique(statistics.tokens[:, g])) > 1]
    assert len(several) > 5
    assert not np.isnan(found[np.ix_(several, several)]).any()


def test_a_feature_is_never_compared_with_itself(tmp_path: Path) -> None:
    directory = synthetic_checkpoint(tmp_path, [5, 1, 4], rows=100, epochs=1)
    summary = read_checkpoint_summary(directory)
    statistics = measure_data(summary, str(tmp_path / "data.h5"))
    assert np.isnan(statistics.category_correlation[1, 1])
    assert np.isnan(statistics.affinity[1, 5])
    assert np.isnan(statistics.category_correlation).sum() == np.isnan(statistics.affinity).sum() == 1
    assert_readable(draw("semantic", summary, statistics))


def test_code_vectors_have_length_one_and_zeros_behind(
    measured: tuple[CheckpointSummary, DataStatistics, Matrix],
) -> None:
    summary, _, _ = measured
    vectors = code_vectors(summary)
    assert vectors.shape == (summary.total_codes, max(codebook.dim for codebook in summary.codebooks))
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1.0)
    assert not vectors[: summary.codebooks[0].codes, summary.codebooks[0].dim :].any()


def test_latent_similarity_is_the_cosine_of_mean_codes(
    measured: tuple[CheckpointSummary, DataStatistics, Matrix],
) -> None:
    summary, _, _ = measured
    found = latent_similarity(summary)
    a, b = (summary.model.quantizer.codebook(g).detach().double().mean(0).numpy() for g in (0, 3))
    shared = min(len(a), len(b))
    expected = a[:shared] @ b[:shared] / np.linalg.norm(a) / np.linalg.norm(b)
    assert found[0, 3] == pytest.approx(expected)
    assert np.allclose(np.diag(found), 1.0)
    assert np.array_equal(found, found.T)


def test_principal_components_keep_distances() -> None:
    rng = np.random.default_rng(0)
    plane = rng.standard_normal((30, 2))
    points = plane @ np.linalg.qr(rng.standard_normal((6, 2)))[0].T + 3.0
    found, shares, _ = principal_components(points)
    assert shares.sum() == pytest.approx(1.0)
    assert np.allclose(np.linalg.norm(found[0] - found[1:], axis=1), np.linalg.norm(plane[0] - plane[1:], axis=1))


def test_outliers_are_clipped_and_counted() -> None:
    points = np.random.default_rng(0).uniform(-1, 1, (200, 2))
    assert clip_outliers(points)[1] == 0
    points[7] = (50.0, 0.0)
    inside, moved = clip_outliers(points)
    assert moved == 1
    assert np.abs(inside).max() < 3.0
    assert np.array_equal(np.delete(inside, 7, 0), np.delete(points, 7, 0))


def test_the_embedding_is_the_same_on_each_call_and_keeps_clusters() -> None:
    rng = np.random.default_rng(0)
    points = np.repeat(np.eye(8)[:3] * 10, 12, axis=0) + 0.1 * rng.standard_normal((36, 8))
    found = tsne(points)
    assert np.array_equal(found, tsne(points))
    centres = found.reshape(3, 12, 2).mean(1)
    range_text = np.abs(found.reshape(3, 12, 2) - centres[:, None]).max()
    assert min(np.linalg.norm(centres[i] - centres[j]) for i, j in ((0, 1), (0, 2), (1, 2))) > 2 * range_text


def test_palette_markers_and_labels() -> None:
    assert category_colours(8) == list(PALETTE)
    assert category_colours(9) is None
    assert len({level_marker(level) for level in range(12)}) == 12
    assert shorten("abcdefghij", 5) == "ab…ij"
    assert shorten("abcde", 5) == "abcde"
    names = ["spatial_statistics_of_the_first_state", "spatial_statistics_of_the_final_state"]
    labels = unique_labels(names, 12)
    assert len(set(labels)) == 2
    assert all(len(label) <= 12 for label in labels)
    assert list(labelled_ticks(40, 10.0)) == list(range(40))
    assert list(labelled_ticks(40, 2.5)) == list(range(0, 40, 2))
