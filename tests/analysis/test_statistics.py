"""Every table against a direct implementation of its formula."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from numpy.typing import NDArray
from planted import NUM_CODES, SIZES, operators, planted_codebooks, rows_where
from scipy.stats import hypergeom, mannwhitneyu, rankdata
from sklearn.metrics import adjusted_mutual_info_score, roc_auc_score

from spinlock_fast.analysis.associations import code_counts, cooccurrence_table, lifts_table
from spinlock_fast.analysis.codes import (
    code_auc,
    code_quartiles,
    codes_table,
    features_table,
    fill_missing,
    mid_ranks,
    one_hot,
    samples_table,
)
from spinlock_fast.analysis.conditions import bin_parameter, label_condition, make_conditions
from spinlock_fast.analysis.neighbours import agreement_table, nearest_operators, neighbours_table
from spinlock_fast.analysis.refinement import refinement_table
from spinlock_fast.analysis.stability import feature_overlap, stability_table

OBSERVED = operators(240, seed=1)
MEMBERS = one_hot(OBSERVED.tokens, OBSERVED.codebooks.offsets)
COUNTS = code_counts(OBSERVED)


def of_code(g: int, code: int) -> np.ndarray:
    return OBSERVED.tokens[:, g] == code


def test_counts_and_members_are_those_of_the_tokens() -> None:
    table = codes_table(OBSERVED, COUNTS)
    assert table["count"].sum() == OBSERVED.tokens.size
    for i in range(sum(NUM_CODES)):
        g = OBSERVED.codebooks.names.index(str(table["codebook"][i]))
        rows = of_code(g, int(table["code"][i]))
        assert table["count"][i] == rows.sum() == MEMBERS[i].sum()
        assert table["share"][i] == pytest.approx(rows.mean())
        assert table["distance_median"][i] == pytest.approx(np.median(OBSERVED.distance[rows, g]))
        assert table["margin_median"][i] == pytest.approx(np.median(OBSERVED.margin[rows, g]))


def test_auc_and_p_are_those_of_scikit_learn_and_scipy_ties_included() -> None:
    x = np.round(OBSERVED.features.astype(np.float64), 1)
    auc, p = code_auc(MEMBERS, x)
    for i in range(sum(NUM_CODES)):
        mine = np.asarray(MEMBERS[[i]].todense()).ravel() > 0
        for f in (0, 3, 6):
            assert auc[i, f] == pytest.approx(roc_auc_score(mine, x[:, f]), abs=1e-12)
            test = mannwhitneyu(x[mine, f], x[~mine, f], method="asymptotic", use_continuity=False)
            assert p[i, f] == pytest.approx(test.pvalue, rel=1e-9)


def test_code_without_or_with_all_operators_has_no_auc() -> None:
    tokens = np.zeros((30, 1), np.int64)
    members = one_hot(tokens, np.array([0, 2]))
    auc, p = code_auc(members, np.random.default_rng(0).random((30, 3)))
    assert np.isnan(auc).all()
    assert np.isnan(p).all()
    quartiles = code_quartiles(members, np.random.default_rng(0).random((30, 3)))
    assert np.isfinite(quartiles[:, 0]).all()
    assert np.isnan(quartiles[:, 1]).all()


def test_ranks_are_those_of_scipy() -> None:
    x = np.random.default_rng(0).integers(0, 9, (50, 4)).astype(np.float32)
    np.testing.assert_array_equal(mid_ranks(x), rankdata(x, axis=0))


def test_quartiles_are_those_of_the_operators() -> None:
    found = code_quartiles(MEMBERS, OBSERVED.features)
    expected = np.quantile(OBSERVED.features[of_code(1, 2)], [0.25, 0.5, 0.75], axis=0)
    np.testing.assert_allclose(found[:, NUM_CODES[0] + 2], expected, rtol=1e-5)


def test_profiles_are_quartiles_in_units_of_all_operators() -> None:
    table = features_table(OBSERVED, MEMBERS, [])
    assert len(table["q"]) == sum(NUM_CODES) * (7 + 2)
    (i,) = rows_where(table, codebook="fast/L0", code=3, feature="family::feature_2")
    x = OBSERVED.features[:, 2]
    mine = x[of_code(3, 3)]
    assert table["kind"][i] == "model"
    assert table["median_all"][i] == pytest.approx(np.median(x))
    assert table["q75"][i] == pytest.approx(np.quantile(mine, 0.75), rel=1e-5)
    mad = np.median(np.abs(x - np.median(x)))
    assert table["robust_z"][i] == pytest.approx((np.median(mine) - np.median(x)) / (1.4826 * mad), rel=1e-4)


def test_large_tables_keep_the_features_with_the_largest_auc(monkeypatch: pytest.MonkeyPatch) -> None:
    from spinlock_fast.analysis import codes

    whole = features_table(OBSERVED, MEMBERS, [])
    monkeypatch.setattr(codes, "_MAX_TABLE_ROWS", 2 * sum(NUM_CODES))
    notes: list[str] = []
    part = features_table(OBSERVED, MEMBERS, notes)
    assert len(notes) == 1
    assert len(part["q"]) == 2 * sum(NUM_CODES)
    strength = np.abs(whole["auc"] - 0.5).reshape(-1, 9)
    expected = np.sort(strength, axis=1)[:, -2:].sum(1)
    np.testing.assert_allclose(np.abs(part["auc"] - 0.5).reshape(-1, 2).sum(1), expected)
    assert set(part["q"]) <= set(whole["q"])  # over all tests, those that are not kept as well


def test_missing_values_are_filled_and_constant_columns_dropped() -> None:
    measured = np.array([[1, np.nan, 5, np.nan], [3, np.nan, 5, 2], [np.nan, np.nan, 5, 4]], np.float32)
    filled, names = fill_missing(measured, ["a", "b", "c", "d"])
    assert names == ["a", "d"]
    assert filled.tolist() == [[1, 3], [3, 2], [2, 4]]
    assert np.isnan(measured[2, 0])


def test_samples_are_the_nearest_random_and_least_certain_operators() -> None:
    table = samples_table(OBSERVED, 3, np.random.default_rng(0))
    for kind, values in (("nearest", OBSERVED.distance), ("boundary", OBSERVED.margin)):
        rows = rows_where(table, codebook="fast/L1", code=2, kind=kind)
        own = np.flatnonzero(of_code(4, 2))
        expected = own[np.argsort(values[own, 4])[:3]]
        assert table["row"][rows].tolist() == OBSERVED.rows[expected].tolist()
        assert table["rank"][rows].tolist() == [0, 1, 2]
    rows = rows_where(table, codebook="fast/L1", code=2, kind="random")
    assert of_code(4, 2)[table["row"][rows] // 10].all()


def test_lifts_are_shares_over_shares() -> None:
    conditions = make_conditions(OBSERVED, 5)[0]
    table = lifts_table(OBSERVED, conditions, COUNTS)
    condition = next(c for c in conditions if c.name == "initial condition")
    for code in range(NUM_CODES[0]):
        mine = of_code(0, code)
        for level, name in enumerate(condition.levels):
            (i,) = rows_where(table, codebook="slow/L0", code=code, condition="initial condition", value=name)
            has = condition.codes == level
            both, n, K = int((mine & has).sum()), int(mine.sum()), int(has.sum())
            assert table["count"][i] == both
            assert table["share"][i] == pytest.approx(has[mine].mean())
            assert table["lift"][i] == pytest.approx(has[mine].mean() / has.mean())
            tails = hypergeom.cdf(both, 240, K, n), hypergeom.sf(both - 1, 240, K, n)
            assert table["p"][i] == pytest.approx(min(1.0, 2 * min(tails)), rel=1e-8)
    assert (table["lift_low"] <= table["lift"] + 1e-12).all()
    assert (table["lift"] <= table["lift_high"] + 1e-12).all()
    parameters = rows_where(table, condition="step", codebook="slow/L0", code=0)
    assert len(parameters) == 5


def test_pairs_of_codes_are_counted_across_categories_only() -> None:
    table = cooccurrence_table(OBSERVED, MEMBERS, COUNTS, 2.0, [])  # alpha 2: all pairs
    assert len(table["p"]) == sum(NUM_CODES[:3]) * sum(NUM_CODES[3:])
    assert set(table["category_a"]) == {"slow"}
    assert set(table["category_b"]) == {"fast"}
    for i in range(0, len(table["p"]), 7):
        g = OBSERVED.codebooks.names.index(str(table["codebook_a"][i]))
        h = OBSERVED.codebooks.names.index(str(table["codebook_b"][i]))
        a, b = of_code(g, table["code_a"][i]), of_code(h, table["code_b"][i])
        assert table["count"][i] == (a & b).sum()
        assert table["lift"][i] == pytest.approx((a & b).mean() / (a.mean() * b.mean()))
    assert (np.diff(table["p"]) >= 0).all()


def test_refinement_is_conditional_entropy_and_variance_between_cells() -> None:
    table = refinement_table(OBSERVED)
    x = OBSERVED.features[:, :4].astype(np.float64)
    x = (x - x.mean(0)) / x.std(0)
    for level in range(3):
        (i,) = rows_where(table, category="slow", level=level)
        cells = [tuple(row) for row in OBSERVED.tokens[:, : level + 1].tolist()]
        distinct = sorted(set(cells))
        within = sum(
            np.square(part - part.mean(0)).sum() for cell in distinct if len(part := x[[c == cell for c in cells]])
        )
        assert table["cells"][i] == len(distinct)
        assert table["eta_squared"][i] == pytest.approx(1 - within / np.square(x).sum(), abs=1e-6)
        unbiased = 1 - (within / (240 - len(distinct))) / (np.square(x).sum() / 239)
        assert table["epsilon_squared"][i] == pytest.approx(unbiased, abs=1e-6)
    fast = rows_where(table, category="fast")
    assert (np.abs(table["epsilon_squared"][fast]) < 0.08).all()  # tokens of noise: eta^2 grows, epsilon^2 does not
    assert table["eta_squared"][fast][-1] > 0.15


def test_a_level_that_repeats_the_one_before_adds_nothing() -> None:
    tokens = OBSERVED.tokens.copy()
    tokens[:, 1] = tokens[:, 0] // 2
    table = refinement_table(replace(OBSERVED, tokens=tokens))
    second = rows_where(table, category="slow", level=1)
    assert table["conditional_entropy_nats"][second] == pytest.approx(0.0, abs=1e-12)
    assert table["new_share"][second] == pytest.approx(0.0, abs=1e-12)
    assert table["added"][second] == pytest.approx(0.0, abs=1e-6)


def test_neighbours_are_those_of_the_pairwise_formula() -> None:
    codebooks, tokens = OBSERVED.codebooks, OBSERVED.tokens
    square = np.zeros((240, 240))
    for g, vectors in enumerate(codebooks.vectors):
        codes = vectors[tokens[:, g]].astype(np.float64)
        away = np.square(codes[:, None] - codes[None]).sum(2)
        square += away / away.mean() / len(codebooks.vectors)
    assert square.mean() == pytest.approx(1.0)
    np.fill_diagonal(square, np.inf)
    queries = np.array([0, 17, 239])
    rows, distance = nearest_operators(codebooks, tokens, queries, 4)
    np.testing.assert_allclose(distance, np.sqrt(np.sort(square[queries], axis=1)[:, :4]), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(np.sqrt(np.take_along_axis(square[queries], rows, 1)), distance, rtol=1e-4, atol=1e-6)
    table = neighbours_table(OBSERVED, queries, rows, distance)
    assert table["row"].tolist() == np.repeat([0, 170, 2390], 4).tolist()
    assert table["tokens_that_differ"][0] == (tokens[0] != tokens[rows[0, 0]]).sum()


def test_neighbours_are_found_across_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from spinlock_fast.analysis import neighbours

    queries = np.arange(0, 240, 11)
    whole = nearest_operators(OBSERVED.codebooks, OBSERVED.tokens, queries, 3)
    monkeypatch.setattr(neighbours, "_ROWS_AT_ONCE", 37)
    parts = nearest_operators(OBSERVED.codebooks, OBSERVED.tokens, queries, 3)
    np.testing.assert_allclose(whole[1], parts[1], atol=1e-6)


def test_agreement_counts_neighbours_and_all_pairs() -> None:
    condition = label_condition("kind", np.array(["a", "a", "b", "b", "b"]))
    table = agreement_table([condition], np.arange(5), np.array([[1], [2], [3], [4], [0]]))
    pairs = [(i, j) for i, j in combinations(range(5), 2)]
    assert table["same_as_nearest"][0] == pytest.approx(3 / 5)
    assert table["same_as_any"][0] == pytest.approx(
        sum(condition.codes[i] == condition.codes[j] for i, j in pairs) / len(pairs)
    )


def test_parameters_are_binned_by_quantiles_and_choices_kept() -> None:
    quantity = bin_parameter("scale", np.arange(100.0), 4)
    assert quantity.counts.tolist() == [25, 25, 25, 25]
    edges = bin_parameter("scale", np.arange(101.0), 5)
    assert [int(edges.codes[i]) for i in (0, 19, 20, 99, 100)] == [0, 0, 1, 4, 4]  # a bin holds its lower edge
    assert edges.levels[1] == "20 to 40"
    choice = bin_parameter("layers", np.array([2.0, 4.0, 2.0, 3.0, np.nan]), 4)
    assert choice.levels == ["2", "3", "4", "not finite"]
    assert choice.codes.tolist() == [0, 2, 0, 1, 3]
    texts = label_condition("name", np.array([f"t{i % 80:02d}" for i in range(1000)] + ["t05"]))
    assert len(texts.levels) == 64
    assert texts.levels[-1] == "other"
    assert texts.levels[texts.codes[5]] == "t05"


def test_stability_is_one_for_the_same_categories_in_another_order() -> None:
    order = [3, 4, 5, 0, 1, 2]
    codebooks = planted_codebooks()
    other = replace(
        OBSERVED,
        codebooks=replace(
            codebooks,
            names=[codebooks.names[g] for g in order],
            categories=["one"] * 3 + ["two"] * 3,
            num_codes=[codebooks.num_codes[g] for g in order],
        ),
        tokens=OBSERVED.tokens[:, order],
        features=-2.0 * OBSERVED.features,
        groups={"one": [4, 5, 6], "two": [0, 1, 2, 3]},
    )
    overlap = feature_overlap(OBSERVED.features, OBSERVED.groups, other.features, other.groups)
    assert overlap[0, 1] == pytest.approx(1.0, abs=1e-6)
    assert overlap[0, 0] < 0.3
    table = stability_table("a", OBSERVED, "b", other)
    assert len(table["ami"]) == len(SIZES) * 9
    for category, match in (("slow", "two"), ("fast", "one")):
        for level in range(3):
            (i,) = rows_where(table, category_a=category, category_b=match, level_a=level, level_b=level)
            assert table["ami"][i] == pytest.approx(1.0)
    (i,) = rows_where(table, category_a="slow", level_a=0, level_b=1)
    expected = adjusted_mutual_info_score(OBSERVED.tokens[:, 0], OBSERVED.tokens[:, 1])
    assert table["ami"][i] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("common", "others", "levels", "counts"),
    [
        (0.0, np.linspace(1.0, 2.0, 15), ["0", "0 to 2"], [85, 15]),  # four of six quantiles are 0
        (3.0, np.linspace(1.0, 2.0, 15), ["1 to 3", "3"], [15, 85]),
        (1.5, np.linspace(1.0, 2.0, 16), ["1 to 1.5", "1.5", "1.5 to 2"], [8, 85, 8]),
    ],
)
def test_a_value_of_most_operators_is_a_level_of_its_own(
    common: float, others: NDArray[np.float64], levels: list[str], counts: list[int]
) -> None:
    values = np.concatenate([np.full(85, common), others])
    condition = bin_parameter("rate", values, 5)
    assert condition.levels == levels
    assert condition.counts.tolist() == counts
    unknown = bin_parameter("rate", np.append(values, [np.nan, np.inf]), 5)
    assert unknown.levels == [*levels, "not finite"]
    assert unknown.counts.tolist() == [*counts, 2]
