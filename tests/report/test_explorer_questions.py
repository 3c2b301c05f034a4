"""Three questions whose answers were planted, answered by the controls of the explorer alone."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from browser import PROGRAM, browser_page
from regimes import FEATURES, run_command, train_on_regimes

from spinlock_fast.tokenizer import Tokenizer


@pytest.mark.slow
@pytest.mark.skipif(PROGRAM is None, reason="no Chromium on this machine")
def test_three_questions_are_answered_by_the_page(tmp_path: Path) -> None:
    planted = train_on_regimes(tmp_path)
    arguments = ("--type", "html", "--output", tmp_path / "page", "--conditions", "metadata/diverged")
    run_command("report", planted.checkpoint, *arguments)
    tokens = Tokenizer.from_checkpoint(planted.checkpoint).encode(str(planted.data))
    names = list(chain(*FEATURES.values()))
    with browser_page() as page:
        page.resize(1280)
        page.open(tmp_path / "page" / "explorer.html")

        # Which code marks diverged operators? One action.
        page.choose("#condition", "metadata/diverged: 1")
        marked, *ties = page.texts("#best button.code")
        assert len(ties) == 1  # the other level has a code for the same rows
        assert f"(and {ties[0]}, equally well)" in page.texts("#best")[0]
        assert page.texts("#codes tbody td:first-child")[0] == marked
        assert marked.startswith("c1 ")
        rows = tokens[:, int(marked[4])] == int(marked.split(" = ")[1])
        assert (rows & planted.diverged).sum() / (rows | planted.diverged).sum() > 0.9

        # What distinguishes codes 4 and 9 of cluster_2? One action. Codes with few rows are replaced by frequent ones.
        page.press("Escape")
        first, second = _two_codes(tokens[:, 2])
        page.write("#search", f"c2={first} vs {second}")
        (summary,) = page.texts("#summary")
        means = [planted.features[tokens[:, 2] == code].mean(0) for code in (first, second)]
        difference = (means[0] - means[1]) / planted.features.std(0)
        strongest = int(np.abs(difference).argmax())
        stated = f"have {'higher' if difference[strongest] > 0 else 'lower'} summary::{names[strongest]} (by "
        assert stated in summary  # the largest is named first
        assert "energy" not in summary
        assert "residual" not in summary
        # A code without rows has no conditions to compare.
        unused = int(np.flatnonzero(np.bincount(tokens[:, 2], minlength=14) == 0)[0])
        page.write("#search", f"c2={unused} vs {second}")
        assert page.texts("#profile p") == ["No row has this code."]
        assert page.texts("#lifts-summary") == [""]

        # Show a typical operator of a code of c1 with large noise. Two actions.
        code = int(np.bincount(tokens[~planted.diverged, 0]).argmax())
        page.write("#search", f"c1={code} noise regime: large")
        first = page.texts("#examples td button")[0]
        page.click("#best button.row")
        assert page.texts("#row-heading") == [f"Row {first}"]
        (row,) = [int(text.removeprefix("Row ")) for text in page.texts("#row-heading")]
        assert tokens[row, 0] == code
        assert planted.large_noise[row]
        shown = dict(zip(page.texts("#row-conditions dt"), page.texts("#row-conditions dd"), strict=True))
        assert shown["noise regime"] == "large"
        assert page.texts("#neighbours td:first-child") == _nearest(planted.checkpoint, planted.data, row, tmp_path)


def _nearest(checkpoint: Path, data: Path, row: int, directory: Path) -> list[str]:
    """The five nearest rows by the command line."""
    run_command("tokenize", checkpoint, data, "--output", directory / "tokens.h5", "--quiet")
    found = ("--like", row, "--top", 5, "--quiet", "--json", directory / "nearest.json")
    run_command("search", checkpoint, directory / "tokens.h5", *found)
    return [str(each["row"]) for each in json.loads((directory / "nearest.json").read_text())["rows"]]


def _two_codes(tokens: np.ndarray) -> tuple[int, int]:
    """4 and 9 if at least 20 rows have each of them, else the most frequent codes."""
    counts = np.bincount(tokens, minlength=10)
    first, second = np.argsort(-counts, kind="stable")[:2]
    return (4, 9) if min(counts[4], counts[9]) >= 20 else (int(first), int(second))
