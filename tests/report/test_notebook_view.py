"""`_repr_html_` of `Tokenizer` and `TrainResult`."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from spinlock_fast import Tokenizer, Trainer
from spinlock_fast.config.schema import RunConfig
from spinlock_fast.training.result import TrainResult

VOID = {"br", "img", "hr"}


class Page(HTMLParser):
    """Collects the tags and texts of HTML, and checks that every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.texts: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in VOID
        self.tags.add(tag)
        self.attributes += attrs
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def value(self, label: str) -> str:
        return self.texts[self.texts.index(label) + 1]


def displayed(value: object) -> str:
    """The HTML that a notebook shows."""
    html = value._repr_html_()  # type: ignore[attr-defined]
    assert isinstance(html, str)
    return html


@pytest.fixture(scope="module")
def result() -> TrainResult:
    x = np.random.default_rng(0).standard_normal((80, 6)).astype(np.float32)
    names = ["<script>alert(1)</script>", "b&b", "c\x1b[31m", "d", "e", "f"]
    overrides = {"training.num_epochs": 2, "training.batch_size": 32, "device": "cpu"}
    groups = {"one<b>": [0, 1, 2], "two": [3, 4, 5]}
    return Trainer.from_config(RunConfig(), overrides).fit(x, group_indices=groups, feature_names=names)


def test_a_training_result_shows_its_metrics_escaped(result: TrainResult) -> None:
    html = displayed(result)
    page = Page(html)
    assert page.tags <= {"div", "strong", "table", "thead", "tbody", "tr", "th", "td", "details", "summary"}
    assert {name for name, _ in page.attributes} <= {"style", "scope"}
    assert page.value("quality") == f"{result.metrics['quality']:.4f}"
    assert page.value("epochs") == f"2, best {result.best_epoch}"
    assert "one<b>" in page.texts
    assert "<script>alert(1)</script>, b&b, c\\x1b[31m" in page.texts
    # Light and dark themes: no colour but the inherited one and a translucent grey.
    assert "#" not in html
    assert {"inherit"} == {part.split(";")[0].split('"')[0] for part in html.split("color:")[1:]}


def test_a_tokenizer_shows_sizes_and_checkpoint(result: TrainResult, tmp_path: Path) -> None:
    page = Page(displayed(result.tokenizer))
    G = len(result.model.codebook_names)
    assert page.value("tokens").startswith(f"[N, {G}], ")
    assert page.value("checkpoint") == "not saved"
    result.tokenizer.save(tmp_path / "saved")
    loaded = Tokenizer.from_checkpoint(tmp_path / "saved")
    assert Page(displayed(loaded)).value("checkpoint") == loaded.checkpoint_hash[:12] != ""
    loaded.metrics = {"quality": "<b>", "utilization": None, "val_rows": []}  # of a damaged file
    assert "quality" not in Page(displayed(loaded)).texts


def test_a_tokenizer_before_fit_shows_its_settings() -> None:
    page = Page(displayed(Tokenizer(num_epochs=3)))
    assert page.texts[0] == "Tokenizer (not fitted)"
    assert page.value("num_epochs") == "3"
    Page(displayed(Tokenizer(settings=5)))  # type: ignore[arg-type]  # an error of `fit`, not of its display


def test_ipython_shows_the_html(result: TrainResult) -> None:
    pytest.importorskip("IPython", reason="shows values as a notebook does")
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell()
    shell.user_ns |= {"result": result, "tokenizer": result.tokenizer}
    for name in ("result", "tokenizer"):
        assert shell.display_formatter is not None
        data, _ = shell.display_formatter.format(shell.run_cell(name).result)
        assert data["text/html"] == displayed(shell.user_ns[name])
