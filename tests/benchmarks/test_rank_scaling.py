"""The arithmetic of larger runs, and the measurement that it starts from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.training import model_scaling, rank_scaling
from benchmarks.training.model_scaling import Costs, fit

COSTS = Costs(fixed=0.02, per_row=1e-4, latency=50e-6, bandwidth=1e9, messages=2.0, exchanged=11e6)


def result(cores: int = 2) -> dict[str, Any]:
    """A file of `rank_scaling` whose steps take exactly what the model says."""
    rows = []
    for batch in (512, 2048):
        for ranks in (1, 2, 4):
            rows.append(
                {
                    "scaling": "strong",
                    "batch_per_step": batch,
                    "ranks": ranks,
                    "step_ms": COSTS.step(batch, ranks) * 1e3,
                    "collective_ms": COSTS.communication(ranks) * 1e3,
                    "messages_per_step": COSTS.messages,
                    "bytes_per_step": COSTS.exchanged,
                }
            )
    return {"environment": {"cores": cores}, "rows": rows}


def test_the_fit_recovers_the_costs_of_its_own_model() -> None:
    fitted = fit(result(), None, None)
    for name, value in vars(COSTS).items():
        assert getattr(fitted, name) == pytest.approx(value, rel=1e-6), name


def test_ranks_beyond_the_cores_are_not_fitted() -> None:
    with pytest.raises(SystemExit, match="at most as many as cores"):
        fit(result(cores=1), None, None)


def test_the_table_names_the_resource_that_ends_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "scaling.json"
    path.write_text(json.dumps(result()))
    model_scaling.main([str(path), "--memory", "64", "--disk", "500"])
    lines = capsys.readouterr().out.splitlines()
    assert any("strong    512 rows 2 ranks" in line and "(+0%)" in line for line in lines)
    smallest, largest = (next(line for line in lines if f"{rows:,} {8:3} ranks" in line) for rows in (10**5, 10**9))
    assert smallest.endswith("fits memory")
    assert "688 GB go to disk" in largest
    assert "the matrix exceeds the disk of 500 GB" in largest


@pytest.mark.slow
@pytest.mark.dist
def test_steps_of_two_ranks_are_those_of_one_process() -> None:
    rows = rank_scaling.scaling([1, 2], [64], steps=2, rounds=1)
    assert [row["ranks"] for row in rows] == [1, 2, 1, 2]
    assert rows[1]["messages_per_step"] == 2.0
    assert rows[1]["bytes_per_step"] > 4 * 2_700_000
