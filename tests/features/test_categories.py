import json

import helpers
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import silhouette_score

from spinlock_fast.config.schema import TrainingConfig
from spinlock_fast.errors import ConfigError, DataError
from spinlock_fast.features import categories
from spinlock_fast.features.categories import (
    assign_categories,
    category_correlation,
    discover_categories,
    max_off_diagonal,
    nearest_categories,
    read_mapping,
    silhouette,
)


def discover(x, names=None, **options):
    names = names or [f"f::{i}" for i in range(x.shape[1])]
    return discover_categories(x, names, TrainingConfig(**options), seed=0)


def as_sets(groups):
    return {frozenset(members) for members in groups.values()}


def consecutive_groups(sizes):
    ends = np.cumsum(sizes)
    return {frozenset(range(end - n, end)) for end, n in zip(ends, sizes, strict=True)}


@pytest.mark.parametrize("sizes", [[5, 4], [3, 8, 5, 4], [6] * 11])
@pytest.mark.parametrize("seed", [0, 1])
def test_planted_groups_are_found(sizes, seed):
    groups = discover(helpers.planted_matrix(400, sizes, seed=seed))
    assert as_sets(groups) == consecutive_groups(sizes)
    assert list(groups) == [f"cluster_{i}" for i in range(1, len(sizes) + 1)]


def test_groups_are_found_in_any_order_of_columns_and_at_any_scale():
    x = helpers.planted_matrix(400, [4, 5, 6], seed=0)
    order = np.random.default_rng(0).permutation(15)
    scaled = x[:, order] * 10.0 ** np.linspace(-3, 3, 15) + 5.0
    found = {frozenset(int(order[i]) for i in members) for members in discover(scaled).values()}
    assert found == consecutive_groups([4, 5, 6])


@pytest.mark.parametrize("seed", range(4))
def test_every_feature_has_one_category_and_none_is_small(seed):
    x = np.random.default_rng(seed).standard_normal((60, 23))
    groups = discover(x)
    assert sorted(i for members in groups.values() for i in members) == list(range(23))
    assert min(len(members) for members in groups.values()) >= 3


def test_a_small_cluster_joins_its_nearest():
    x = helpers.planted_matrix(400, [6, 6, 2], seed=0)
    x[:, 12:] = 0.6 * x[:, 6:8] + x[:, 12:]  # the pair leans towards the second group
    assert as_sets(discover(x)) == {frozenset(range(6)), frozenset(range(6, 14))}
    assert len(discover(x, min_features_per_category=2)) == 3


def test_singleton_cluster_is_merged():
    groups = discover(helpers.planted_matrix(400, [6, 6, 1], seed=0), min_features_per_category=1)
    assert min(len(members) for members in groups.values()) > 1


@pytest.mark.parametrize("number", [2, 3, 4])
def test_a_fixed_number_of_categories(number):
    x = helpers.planted_matrix(400, [6, 6, 6, 6], seed=0)
    assert len(discover(x, num_categories_auto=number)) == number


def test_a_largest_number_of_categories():
    assert len(discover(helpers.planted_matrix(400, [4] * 8, seed=0), max_clusters=5)) <= 5


def test_isolated_families_share_no_category_and_come_last():
    x = helpers.planted_matrix(400, [5, 5], seed=0)
    names = [f"{'theta' if i in (0, 1, 2, 7) else 'u'}::{i}" for i in range(10)]
    groups = discover(x, names, isolated_families=["theta"])
    isolated = [set(members) & {0, 1, 2, 7} for members in groups.values()]
    assert all(not part or len(part) == len(groups[name]) for name, part in zip(groups, isolated, strict=True))
    assert isolated[0] == set()
    assert isolated[-1]


def test_all_families_isolated():
    names = [f"{'a' if i < 5 else 'b'}::{i}" for i in range(10)]
    groups = discover(helpers.planted_matrix(100, [5, 5], seed=0), names, isolated_families=["b", "a"])
    assert as_sets(groups) == consecutive_groups([5, 5])


def test_isolated_family_without_features_is_ignored():
    names = [f"a::{i}" for i in range(10)]
    assert len(discover(helpers.planted_matrix(100, [5, 5], seed=0), names, isolated_families=["gone"])) == 2


@pytest.mark.parametrize("columns", [1, 2, 3, 5])
def test_too_few_features_for_two_categories_make_one(columns):
    groups = discover(helpers.planted_matrix(50, [columns], seed=0))
    assert groups == {"cluster_1": list(range(columns))}


@pytest.mark.parametrize("rows", [10, 50, 64])
@pytest.mark.parametrize("columns", [6, 12])
def test_perfectly_correlated_features_form_one_category(rows, columns):
    x = np.repeat(np.random.default_rng(rows).integers(0, 2, (rows, 1)).astype(float), columns, axis=1)
    assert discover(x) == {"cluster_1": list(range(columns))}


def test_too_few_rows_are_an_error():
    with helpers.raises_one_line(DataError, "9 training rows", "10"):
        discover(helpers.planted_matrix(9, [5, 5], seed=0))
    assert discover(helpers.planted_matrix(10, [5, 5], seed=0))


def test_the_seed_alone_chooses_the_rows(monkeypatch):
    monkeypatch.setattr(categories, "_CORRELATION_ROWS", 60)
    x = helpers.planted_matrix(400, [5, 5, 5], seed=0)
    assert discover(x) == discover(x)
    assert as_sets(discover(x)) == consecutive_groups([5, 5, 5])


@given(st.integers(3, 25), st.integers(2, 6), st.integers(0, 2**31))
def test_silhouette_against_sklearn(points, clusters, seed):
    rng = np.random.default_rng(seed)
    clusters = min(clusters, points - 1)
    labels = rng.permutation(np.r_[np.arange(clusters), rng.integers(0, clusters, points - clusters)])
    distance = 1.0 - np.abs(np.corrcoef(rng.standard_normal((30, points)), rowvar=False))
    np.fill_diagonal(distance, 0.0)
    expected = silhouette_score(distance, labels, metric="precomputed")
    assert silhouette(distance, labels) == pytest.approx(expected, abs=1e-12)


def test_category_correlation_against_a_loop():
    x = helpers.planted_matrix(100, [3, 1, 4], seed=0, noise=2.0)
    groups = {"b": [5, 0, 2], "a": [7], "c": [1, 3, 4, 6]}
    found = category_correlation(x, groups)
    for a, first in enumerate(groups.values()):
        for b, second in enumerate(groups.values()):
            values = [abs(np.corrcoef(x[:, i], x[:, j])[0, 1]) for i in first for j in second if i != j]
            assert found[a, b] == pytest.approx(np.mean(values) if values else 0.0, abs=1e-6)


def test_feature_in_no_category_joins_the_most_correlated():
    x = helpers.planted_matrix(400, [4, 5], seed=0)
    x[:, 3] = -1000.0 * x[:, 3]
    groups = {"b": [4, 5, 6, 8], "a": [0, 1, 2]}
    assert nearest_categories(x, groups) == {"b": [7], "a": [3]}
    x[:, 7] = 2.0  # constant: to the first
    assert nearest_categories(x, groups) == {"b": [7], "a": [3]}
    assert nearest_categories(x[:, :3], {"a": [0, 1, 2]}) == {}


def test_largest_entry_off_the_diagonal():
    assert max_off_diagonal(np.array([[9.0, 0.2], [0.4, 9.0]])) == 0.4
    assert max_off_diagonal(np.array([[9.0]])) == 0.0


NAMES = ["summary::a", "summary::b", "temporal::a", "temporal::b", "other"]


def write(tmp_path, value):
    path = tmp_path / "categories.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_categories_of_a_file_by_name_and_by_index(tmp_path):
    path = write(tmp_path, {"z": ["temporal::b", "summary::a"], "a": [2, "other"]})
    groups = assign_categories(path, NAMES)
    assert list(groups.items()) == [("z", [3, 0]), ("a", [2, 4])]


def test_dropped_features_of_a_mapping_are_ignored(tmp_path):
    path = write(tmp_path, {"a": ["summary::gone", "summary::a"], "b": ["summary::gone2"]})
    assert assign_categories(path, NAMES) == {"a": [0]}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("{", "not JSON"),
        ("[1]", "expected"),
        ({"a": "summary::a"}, "expected"),
        ({"a": ["nothing"]}, "none of the features"),
        ({}, "none of the features"),
        ({"a": ["summary::a"], "b": ["summary::a"]}, "'summary::a' is in a and in b"),
        ({"a": ["summary::a", 0]}, "'summary::a' is in a and in a"),
        ({"a": [-1]}, ""),
        ({"a": [1.5]}, ""),
        ({"a": [True]}, ""),
        ({"a": [["summary::a"]]}, ""),
    ],
)
def test_files_that_are_no_categories(tmp_path, content, text):
    with helpers.raises_one_line(ConfigError, text, "training.category_assignment"):
        assign_categories(write(tmp_path, content), NAMES)


def test_a_mapping_file_that_is_missing(tmp_path):
    with helpers.raises_one_line(ConfigError, "nowhere.json", "no such file"):
        assign_categories(tmp_path / "nowhere.json", NAMES)


def test_mapping_file_is_read_unchanged(tmp_path):
    mapping = {"z": ["anything", 3], "a": []}
    assert list(read_mapping(write(tmp_path, mapping)).items()) == list(mapping.items())


def test_names_that_are_no_feature_are_counted(tmp_path, caplog):
    assign_categories(write(tmp_path, {"a": ["summary::a", "summary::mispelt"]}), NAMES)
    assert "1 of 2 names match no feature" in caplog.text
