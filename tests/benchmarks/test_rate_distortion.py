"""The curve of error against bits, small."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import planted_matrix, write_dataset

from benchmarks.studies import feature_matrix, rate_distortion
from benchmarks.studies.rate_distortion import (
    bits_of,
    codebook_sizes,
    equal_codebooks,
    lines_of,
    load_matrix,
    main,
    plot,
)
from benchmarks.studies.reference_quantizers import (
    NeuralResidual,
    Reference,
    Training,
    code_sizes,
    finite_scalars,
    scalar_levels,
)

GROUPS = {"a": list(range(6)), "b": list(range(6, 12))}
FEW = Training(epochs=3)


@pytest.fixture
def matrix(tmp_path: Path) -> Path:
    meta = {"group_indices": GROUPS, "feature_names": [f"f{i}" for i in range(12)]}
    path = tmp_path / "seed7.npz"
    np.savez(path, x=planted_matrix(120, [6, 6], seed=0), val_rows=np.arange(0, 120, 10), meta=json.dumps(meta))
    return path


@pytest.mark.parametrize("bits", [12, 24, 60])
@pytest.mark.parametrize("code_bits", [4, 7])
def test_sizes_hold_the_bits(bits: int, code_bits: int) -> None:
    sizes = codebook_sizes(GROUPS, bits, code_bits)
    assert bits_of(sizes) == pytest.approx(bits, rel=0.1)
    assert {len(own) for own in sizes.values()} == {math.ceil(bits / 2 / code_bits)}
    assert max(size.num_tokens for own in sizes.values() for size in own) <= 2 * 2**code_bits


def test_equal_codebooks_are_shared_out_by_features() -> None:
    groups = {"a": list(range(20)), "b": list(range(20, 29)), "c": [29]}
    sizes = equal_codebooks(groups, 60, 6)
    assert [len(own) for own in sizes.values()] == [6, 3, 1]
    assert {size.num_tokens for own in sizes.values() for size in own} == {64}
    few = equal_codebooks(groups, 12, 8)  # one codebook per category at least
    assert [size.num_tokens for own in few.values() for size in own] == [16, 16, 16]


def test_bits_of_references() -> None:
    assert code_sizes(20, 8) == [8, 8, 4]
    assert code_sizes(20, 4) == [4] * 5
    assert scalar_levels(11, 20, 8) == [8, 8, 8, 4]
    assert scalar_levels(11, 2, 8) == [8, 8]  # no more scalars than columns


def test_splits_are_disjoint_and_complete(matrix: Path) -> None:
    loaded = load_matrix(matrix)
    parts = [loaded.train, loaded.validation, loaded.test]
    assert [len(rows) for rows in parts] == [98, 10, 12]
    assert sorted(np.concatenate(parts)) == list(range(120))
    np.testing.assert_array_equal(loaded.test, np.arange(0, 120, 10))


def test_finite_scalars_gain_by_bits() -> None:
    x = planted_matrix(300, [6, 6], seed=0)
    few, many = (float(np.square(finite_scalars(x[:250], b, 4, FEW)(x[250:]) - x[250:]).mean()) for b in (4, 24))
    assert many < 0.7 * few < 0.2 * float(np.square(x[250:]).mean())


def test_neural_residual_starts_as_a_residual_quantizer_and_learns() -> None:
    torch.manual_seed(0)
    x = torch.from_numpy(planted_matrix(200, [6, 6], seed=0))
    codes = torch.stack([x[:4], 0.3 * x[4:8]])
    model = NeuralResidual(codes)
    with torch.no_grad():
        sums = (codes[0][:, None] + codes[1]).flatten(0, 1)  # the beam holds all pairs of codes
        nearest = sums[torch.cdist(x, sums).argmin(1)]
        torch.testing.assert_close(model(x), nearest)
        before = float(model.loss(x))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        model.loss(x).backward()
        optimizer.step()
    with torch.no_grad():
        assert float(model.loss(x)) < 0.8 * before


def test_lines_are_written_once_and_test_rows_only_on_demand(
    matrix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # those by faiss stay out: it need not be installed
    monkeypatch.setattr(rate_distortion, "REFERENCES", {"finite_scalars": Reference(finite_scalars, (), 20)})
    output = tmp_path / "rate.jsonl"
    settings = (Path(__file__).parents[2] / "configs/100k.yaml").read_text(encoding="utf-8")
    brief = tmp_path / "brief.yaml"
    brief.write_text(settings.replace("joint_search_epochs: auto", "joint_search_epochs: 1"), encoding="utf-8")
    options = ["--epochs", "1", "--batch-size", "64", "--model-options", "4", "--config", str(brief)]
    command = [str(matrix), "--output", str(output), *options, "--bits", "16", "--kinds", "model", "finite_scalars"]
    monkeypatch.chdir(Path(__file__).parents[2])
    monkeypatch.setitem(rate_distortion.MODELS, "model", ("nearest", "joint", "perturbed"))
    with pytest.raises(SystemExit):  # argparse has the names of the module's start
        main([*command, "--kinds", "unknown"])
    assert main(command) == 0
    rows = lines_of(output)
    kinds = [(row["kind"], row["bits"]) for row in rows]
    assert kinds == [(kind, 16) for kind in ("nearest", "joint", "perturbed", "finite_scalars")]
    assert all(0.0 < row["validation_error"] < 2.0 and "test_error" not in row for row in rows)
    assert rows[1]["validation_error"] <= rows[0]["validation_error"]
    assert main(command) == 0
    assert lines_of(output) == rows
    # finite_scalars has 16 bits already, and does not take 24
    assert main([*command, "--bits", "16", "24", "--kinds", "one_category", "finite_scalars", "--test"]) == 0
    added = lines_of(output)[len(rows) :]
    assert [(row["kind"], row["bits"]) for row in added] == [("one_category", 16), ("one_category", 24)]
    assert all(row["test_error"] > 0.0 for row in added)


def test_the_matrix_of_a_file_is_split_by_operator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dataset(tmp_path / "data.h5", 120, seed=0)
    path = tmp_path / "matrix.npz"
    monkeypatch.chdir(Path(__file__).parents[2])
    command = ["configs/10k.yaml", "--output", str(path), "--set", f"dataset_path={tmp_path / 'data.h5'}"]
    assert feature_matrix.main(command) == 0
    loaded = load_matrix(path)
    assert [len(rows) for rows in (loaded.train, loaded.validation, loaded.test)] == [84, 18, 18]
    assert loaded.groups is not None
    assert sorted(i for members in loaded.groups.values() for i in members) == list(range(loaded.x.shape[1]))
    np.testing.assert_allclose(loaded.x[loaded.train].mean(0), 0.0, atol=1e-4)
    np.testing.assert_allclose(loaded.x[loaded.train].std(0), 1.0, atol=1e-3)
    assert "120 rows" in capsys.readouterr().out


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib, which no other part of the project does")
    rows = [
        {"kind": kind, "bits": bits, "bits_used": bits + 0.5, "validation_error": 1.0 / bits, "test_error": 2.0 / bits}
        for kind in rate_distortion.CURVES
        for bits in (40, 80)
    ]
    plot(rows, tmp_path / "rate.png")
    assert (tmp_path / "rate.png").read_bytes()[1:4] == b"PNG"
