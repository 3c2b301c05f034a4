"""Means, intervals and the tables of records."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers import raises_one_line
from scipy import stats

from spinlock_fast.ablation.output_files import write_tables
from spinlock_fast.ablation.records import COUNTS, MEASURES, Record, read_csv, write_csv
from spinlock_fast.ablation.statistics import paired_difference, summarize
from spinlock_fast.ablation.tables import markdown, table_of
from spinlock_fast.errors import DataError


def record(variant: str, position: int, seed: int, error: float) -> Record:
    measures = dict.fromkeys(MEASURES, 0.5) | {"reconstruction_error": error}
    counts = dict.fromkeys(COUNTS, 10)
    return Record(
        variant=variant,
        position=position,
        seed=seed,
        identity="",
        measures=measures,
        counts=counts,
        device="cpu",
        date="2026-01-01",
    )


RECORDS = [
    *(record("base", 0, seed, error) for seed, error in enumerate([0.2, 0.4, 0.3])),
    *(record("drop loss:vq", 1, seed, error) for seed, error in enumerate([0.3, 0.5, 0.41])),
    record("one|seed", 2, 1, 0.1),
]


def test_paired_difference_is_that_of_scipy() -> None:
    rng = np.random.default_rng(0)
    for count in (2, 3, 10):
        base, change = rng.standard_normal(count), rng.standard_normal(count)
        expected = stats.ttest_rel(base + change, base)
        interval = expected.confidence_interval(0.95)
        found = paired_difference(dict(enumerate(base + change)), dict(enumerate(base)))
        assert found is not None
        assert found.pairs == count
        np.testing.assert_allclose([found.mean, found.low, found.high], [change.mean(), *interval], rtol=1e-9)
        assert found.excludes_zero == (expected.pvalue < 0.05)


def test_only_common_seeds_are_paired() -> None:
    found = paired_difference({1: 2.0, 2: 5.0, 9: 100.0}, {1: 1.0, 2: 2.0, 3: -50.0})
    assert found is not None
    assert (found.pairs, found.mean) == (2, 2.0)
    assert paired_difference({1: 2.0}, {2: 2.0}) is None


def test_one_seed_has_no_spread() -> None:
    summary, difference = summarize([3.0]), paired_difference({1: 3.0}, {1: 1.0})
    assert summary is not None
    assert summary.spread is None
    assert difference is not None
    assert (difference.mean, difference.low, difference.high) == (2.0, None, None)
    assert not difference.excludes_zero
    assert summarize([]) is None


def test_spread_is_the_sample_standard_deviation() -> None:
    summary = summarize([1.0, 2.0, 4.0])
    assert summary is not None
    assert summary.spread == pytest.approx(stats.tstd([1.0, 2.0, 4.0]))


def test_table() -> None:
    base, dropped, single = table_of(RECORDS)
    assert base.summaries["reconstruction_error"].mean == pytest.approx(0.3)
    assert not base.differences
    assert dropped.differences["reconstruction_error"].pairs == 3
    assert single.differences["reconstruction_error"].mean == pytest.approx(-0.3)
    assert "seconds" not in dropped.differences
    text = markdown(RECORDS)
    assert "| `base` | 3 | 10 | 0.300 ± 0.100 |" in text
    assert "| `drop loss:vq` | 3 | **+0.103 [+0.089, +0.118]** |" in text
    assert "| `one&#124;seed` | 1 | -0.300 |" in text


def test_without_a_base_there_are_no_differences() -> None:
    assert "interval" not in markdown(RECORDS[3:])


def test_csv_keeps_every_digit(tmp_path: Path) -> None:
    write_csv(tmp_path / "results.csv", RECORDS)
    assert read_csv(tmp_path / "results.csv") == RECORDS


def test_damaged_csv(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    for text in ["variant,seed\nbase,1\n", "variant\n\0", "\xff"]:
        path.write_bytes(text.encode("latin-1"))
        with raises_one_line(DataError, "results.csv"):
            assert read_csv(path) is None
    with raises_one_line(DataError, "missing.csv"):
        read_csv(tmp_path / "missing.csv")


def test_plot_of_long_names(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the plot needs the extra report")
    named = [entry.model_copy(update={"variant": f"$x_1={entry.variant}" * 9}) for entry in RECORDS[3:]]
    written = write_tables(tmp_path, [*RECORDS[:3], *named])
    assert [path.name for path in written] == ["results.csv", "ablation.md", "ablation.png"]
    assert (tmp_path / "ablation.png").read_bytes().startswith(b"\x89PNG")
