"""The curve of error against bits, small."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from helpers import planted_matrix, write_dataset

from benchmarks.studies import rate_distortion
from benchmarks.studies.rate_distortion import bits_of, by_category, codebook_sizes, lines_of, main, plot, scalar

GROUPS = {"a": list(range(6)), "b": list(range(6, 12))}


def test_codes_are_multiplied_and_levels_added() -> None:
    plain, more = codebook_sizes(GROUPS, 2, 1), codebook_sizes(GROUPS, 3, 4)
    assert [len(books) for books in plain.values()] == [2, 2]
    assert [book.num_tokens for book in more["a"][:2]] == [4 * book.num_tokens for book in plain["a"]]
    codes = [book.num_tokens for books in plain.values() for book in books]
    assert bits_of(plain) == pytest.approx(sum(map(math.log2, codes)))


def test_references_gain_by_bits() -> None:
    x = planted_matrix(300, [6, 6], seed=0)
    rows, others = x[:250], x[250:]
    few, many = (float(np.square(scalar(rows, others, bits) - others).mean()) for bits in (6, 36))
    assert many < 0.25 * few
    assert few < float(np.square(others).mean())
    trained = np.arange(250)
    few, many = (
        float(np.square(by_category(x, trained, GROUPS, codebook_sizes(GROUPS, levels, 1))[250:] - others).mean())
        for levels in (1, 3)
    )
    assert many < few


def test_lines_are_written_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dataset(tmp_path / "operators_real.h5", 100, seed=0)
    (tmp_path / "original_frames").mkdir()
    np.savez(
        tmp_path / "original_frames" / "seed42.npz",
        x=planted_matrix(100, [6, 6], seed=0),
        val_rows=np.arange(0, 100, 10),
        meta=json.dumps(
            {
                "group_indices": GROUPS,
                "feature_names": [f"f{i}" for i in range(12)],
                "levels": {},
                "original": {"error_final": 0.5},
            }
        ),
    )
    for name, few in (("LEVELS", (2,)), ("FACTORS", (1,)), ("BITS", (4, 8)), ("REFERENCES", {"scalar": scalar})):
        monkeypatch.setattr(rate_distortion, name, few)  # those by faiss stay out: it need not be installed
    output = tmp_path / "rate.jsonl"
    command = [str(tmp_path), "--output", str(output), "--epochs", "1"]
    assert main(command) == 0
    assert "2 levels, 1 x codes" in capsys.readouterr().out
    rows = lines_of(output)
    assert [row["kind"] for row in rows] == ["scalar", "scalar", "category", "model"]
    assert rows[-1]["bits"] == pytest.approx(bits_of(codebook_sizes(GROUPS, 2, 1)))
    assert main(command) == 0
    assert lines_of(output) == rows


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib, which no other part of the project does")
    rows = [
        {"kind": kind, "levels": levels, "bits": bits, "error": 1.0 / bits}
        for kind in ("model", "product", "residual", "scalar", "category")
        for levels in rate_distortion.LEVELS
        for bits in (40.0, 80.0)
    ]
    plot(rows, tmp_path / "rate.png")
    assert (tmp_path / "rate.png").read_bytes()[1:4] == b"PNG"
