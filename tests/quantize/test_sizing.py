import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spinlock_fast.config.schema import LevelConfig, parse_ratios
from spinlock_fast.quantize import commitment_weight, dead_code_threshold, resolve_levels, size_codebooks

GOLDEN = [4, 16, 15, 13, 32, 28, 20, 10, 11, 14, 9]
RATIOS = (0.5, 1.0, 1.5)


def pairs(levels):
    return [(level.num_tokens, level.latent_dim) for level in levels]


def golden():
    sizes = {f"cluster_{i}": n for i, n in enumerate(GOLDEN, start=1)}
    return resolve_levels(sizes, [], "0.5:1:1.5")


def test_golden_totals():
    books = [level for levels in golden().values() for level in levels]
    assert len(books) == 33
    assert sum(book.num_tokens for book in books) == 484
    assert sum(book.latent_dim for book in books) == 564


def test_golden_first_codebooks():
    first = [tuple(level.num_tokens for level in golden()[f"cluster_{i}"]) for i in (1, 2, 3)]
    assert first == [(15, 7, 6), (28, 14, 7), (24, 13, 6)]


def test_golden_order_is_that_of_the_categories():
    assert list(golden()) == [f"cluster_{i}" for i in range(1, 12)]


@given(st.integers(1, 5000), st.sampled_from([(0.5, 1.0, 1.5), (1.0,), (0.1, 0.2, 0.3, 4.0)]))
def test_sizes_follow_the_formula(n, ratios):
    base = int(7 * math.log2(n))
    for level, (codes, dim) in enumerate(pairs(size_codebooks(n, ratios))):
        assert codes == (max(4 * (base // 4), 15) if level == 0 else max(6, int(base / 2**level)))
        assert dim == max(4, 4 * math.ceil(n * ratios[level] / 4))


def test_one_feature_gets_the_smallest_codebooks():
    assert pairs(size_codebooks(1, RATIOS)) == [(15, 4), (6, 4), (6, 4)]


@pytest.mark.parametrize("n", [0, -1])
def test_category_without_features_is_rejected(n):
    with pytest.raises(ValueError, match="at least 1 feature"):
        size_codebooks(n, RATIOS)


def test_uniform_gives_every_level_the_codes_of_level_0():
    assert [k for k, _ in pairs(size_codebooks(16, RATIOS, uniform=True))] == [28, 28, 28]


@pytest.mark.parametrize("levels", [None, [], {}])
def test_no_levels_are_sized_from_the_features(levels):
    assert pairs(resolve_levels({"a": 16}, levels, "0.5:1:1.5")["a"]) == pairs(size_codebooks(16, RATIOS))


def test_list_of_levels_applies_to_all_categories():
    level = LevelConfig(num_tokens=5, latent_dim=2)
    assert resolve_levels({"b": 4, "a": 9}, [level], "1") == {"b": [level], "a": [level]}


def test_levels_by_category_keep_the_order_of_the_categories():
    few, many = LevelConfig(num_tokens=5, latent_dim=2), LevelConfig(num_tokens=9, latent_dim=2)
    resolved = resolve_levels({"b": 4, "a": 9}, {"a": [many], "b": [few, few]}, "1")
    assert list(resolved.items()) == [("b", [few, few]), ("a", [many])]


@pytest.mark.parametrize(
    ("levels", "name"),
    [({"a": 1}, "b"), ({"a": 1, "b": 1, "c": 1}, "c"), ({"a": 1, "b": 0}, "b")],
)
def test_levels_of_unknown_categories_are_rejected(levels, name):
    level = LevelConfig(num_tokens=5, latent_dim=2)
    with pytest.raises(ValueError, match=name):
        resolve_levels({"a": 4, "b": 4}, {key: [level] * count for key, count in levels.items()}, "1")


@pytest.mark.parametrize(("text", "ratios"), [("0.5:1:1.5", RATIOS), ("2", (2.0,)), (" 1 : 2 ", (1.0, 2.0))])
def test_ratios_are_numbers_between_colons(text, ratios):
    assert parse_ratios(text) == ratios


@pytest.mark.parametrize("text", ["", ":", "1:", "a", "0", "-1:2", "nan", "inf", "1,2"])
def test_invalid_ratios_are_rejected(text):
    with pytest.raises(ValueError, match="positive numbers"):
        parse_ratios(text)


@pytest.mark.parametrize(
    ("features", "bits", "weight"),
    [(60, 20, 0.15), (20, 20, 0.1), (10_000, 20, 0.25), (5, 0, 0.25)],
    ids=["between", "many bits", "few bits", "none"],
)
def test_automatic_commitment_follows_the_bits_per_feature(features, bits, weight):
    levels = [LevelConfig(num_tokens=32, latent_dim=2)] * (bits // 5) or [LevelConfig(num_tokens=1, latent_dim=2)]
    assert commitment_weight("auto", levels, features) == pytest.approx(weight)
    assert commitment_weight(0.7, levels, features) == 0.7


@pytest.mark.parametrize(("rows", "threshold"), [(400, 0.375), (100_000, 0.2), (100, 0.5)])
def test_automatic_threshold_follows_the_rows_of_a_code(rows, threshold):
    assert dead_code_threshold("auto", [7, 30, 12], rows) == pytest.approx(threshold)
    assert dead_code_threshold(0.05, [7, 30, 12], rows) == 0.05
