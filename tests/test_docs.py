"""Commands of the README and of the quickstart run, in order, on small data; every block says whether it does.

A comment before a block of commands tells: `<!-- run -->`, `<!-- run, shortened -->` (with the replacements below, so
that it takes seconds), or `<!-- not run: reason -->`. Blocks of Python may use the names in `_GIVEN`.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from helpers import write_dataset

from spinlock_fast.commands.main import VERBS, command_of
from spinlock_fast.data.loader import HDF5Loader
from spinlock_fast.train import main as train_main

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/quickstart.md", "docs/tokens.md")
REPLACED = {
    "--operators 1000": "--operators 4",
    "{'training.num_epochs': 50}": "{'training.num_epochs': 1, 'training.batch_size': 64, 'training.topo_samples': 64}",
    '{"training.num_epochs": 50}': "{'training.num_epochs': 1, 'training.batch_size': 64, 'training.topo_samples': 64}",
    "training.num_epochs=50": "training.num_epochs=2",
    "dataset_path=data/1k.h5": "dataset_path=data/quickstart.h5 --set training.num_epochs=1 --output checkpoints/100k",
}
_BLOCK = re.compile(r"(?:<!-- (?P<marker>[^>]*?) -->\n)?```(?P<language>bash|python)\n(?P<text>.*?)```", re.DOTALL)


class Block(NamedTuple):
    """A fenced block of commands."""

    page: str
    line: int
    marker: str
    language: str
    text: str


def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, m.start()) + 1, m["marker"] or "", m["language"], m["text"])
        for m in _BLOCK.finditer(text)
    ]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone after `make train`, small: 80 operators, two epochs."""
    where = tmp_path_factory.mktemp("clone")
    shutil.copytree(ROOT / "configs", where / "configs")
    write_dataset(where / "data" / "quickstart.h5", 80, seed=0, summary_width=360, temporal_shape=(256, 63))
    arguments = ["--set", f"dataset_path={where}/data/quickstart.h5", "--set", "training.num_epochs=2"]
    with pytest.raises(SystemExit) as end:
        train_main(
            [
                str(where / "configs/quickstart.yaml"),
                *arguments,
                "--quiet",
                "--output",
                str(where / "checkpoints/quickstart"),
            ]
        )
    assert end.value.code == 0
    return where


@pytest.mark.parametrize("page", PAGES)
def test_every_block_says_whether_it_runs(page: str) -> None:
    for block in blocks(page):
        known = block.marker in ("run", "run, shortened") or block.marker.startswith("not run: ")
        assert known, f"{page}:{block.line}: {block.marker!r} before a block of {block.language}"


@pytest.mark.parametrize("page", ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_links_within_the_project_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (ROOT / page).parent.joinpath(target).exists(), f"{page}: {target}"


# What Markdown and the extensions of mkdocs.yml make; anything else was meant as text.
_MADE_OF_MARKDOWN = {
    *("h1", "h2", "h3", "h4", "h5", "h6", "p", "a", "em", "strong", "code", "pre", "ul", "ol", "li", "br", "hr"),
    *("table", "thead", "tbody", "tr", "th", "td", "img", "blockquote", "span", "div"),
}


class Tags(HTMLParser):
    """Collects tags, and the texts of table cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.cells: list[str] = []
        self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        if tag == "td":
            self.cells.append("")
        self._in_cell = tag == "td" or self._in_cell

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = self._in_cell and tag != "td"

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.cells[-1] += data


DOCS = sorted((ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("page", DOCS, ids=lambda path: path.stem)
def test_no_text_of_a_page_is_taken_for_a_tag(page: Path) -> None:
    markdown = pytest.importorskip("markdown", reason="comes with mkdocs, an optional extra")
    html = markdown.markdown(page.read_text(encoding="utf-8"), extensions=["tables", "fenced_code"])
    assert set(Tags(html).tags) <= _MADE_OF_MARKDOWN


def test_formulas_are_shown_as_they_are_written() -> None:
    from spinlock_fast.descriptors.registry import PER_TRAJECTORY, TEMPORAL

    markdown = pytest.importorskip("markdown", reason="comes with mkdocs, an optional extra")
    page = (ROOT / "docs" / "features.md").read_text(encoding="utf-8")
    cells = Tags(markdown.markdown(page, extensions=["tables", "fenced_code"])).cells
    expected = {feature.formula for groups in (TEMPORAL, PER_TRAJECTORY) for f in groups.values() for feature in f}
    assert set(cells[3::5]) == expected
    assert {len(set(cells[i::5])) > 1 for i in range(5)} == {True}


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="the site is built with mkdocs-material, an optional extra")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "tokens" / "index.html").exists()
    for page in DOCS:
        where = tmp_path / ("" if page.stem == "index" else page.stem) / "index.html"
        article = re.search(r"<article.*?</article>", where.read_text(encoding="utf-8"), re.DOTALL)
        assert article is not None
        added = {"article", "nav", "button", "label", "input", "svg", "path", "iframe", "form", "aside"}  # by the theme
        assert set(Tags(article[0]).tags) <= _MADE_OF_MARKDOWN | added, page


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_blocks_run(
    page: str, template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(template, tmp_path / "clone")
    monkeypatch.chdir(tmp_path / "clone")
    names = given()
    ran = 0
    for block in blocks(page):
        if block.marker.startswith("not run"):
            continue
        text = block.text
        if block.marker == "run, shortened":
            assert any(long in text for long in REPLACED), f"{page}:{block.line}: nothing to shorten"
        for long, short in REPLACED.items():
            text = text.replace(long, short)
        if block.language == "python":
            exec(compile(text, f"{page}:{block.line}", "exec"), names)
            ran += 1
            continue
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                assert command(words) == 0, f"{page}:{block.line}: {line}\n{capsys.readouterr().err}"
                ran += 1
    assert ran >= 2


def command(words: list[str]) -> int:
    """Runs `python -m spinlock_fast.VERB ...` in this process; its exit status."""
    assert words[:2] == ["python", "-m"], words
    package, _, verb = words[2].partition(".")
    assert package == "spinlock_fast"
    assert verb in VERBS, words
    try:
        command_of(verb)(words[3:])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def given() -> dict[str, Any]:
    """Names that blocks of Python may use without saying where they come from."""
    with_all = HDF5Loader(
        "data/quickstart.h5",
        [
            "features/summary/aggregated/features",
            "features/temporal/features",
            "features/architecture/aggregated/features",
        ],
        batch_size=80,
        shuffle=False,
    )
    s, t, a = (values.numpy() for name, values in next(iter(with_all)).items() if name != "index")
    x = np.random.default_rng(0).standard_normal((120, 24)).astype(np.float32)
    return {"s": s, "t": t, "a": a, "x": x, "z": torch.randn(8, 16)}


@pytest.mark.slow
def test_the_tour_runs(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cells, as a script, without showing pictures."""
    matplotlib = pytest.importorskip("matplotlib", reason="the tour draws with matplotlib, an optional extra")
    matplotlib.use("Agg")
    shutil.copytree(template, tmp_path / "clone")
    monkeypatch.chdir(tmp_path / "clone")
    notebook = json.loads((ROOT / "examples" / "tour.ipynb").read_text(encoding="utf-8"))
    names: dict[str, Any] = {}
    for i, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"tour.ipynb, cell {i}", "exec"), names)
    assert len(names["tokens"]) == 80
    assert names["plt"].get_fignums()
    names["plt"].close("all")
