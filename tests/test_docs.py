"""The commands and Python blocks of README.md and docs/ run, on small data; the generated pages are current.

An HTML comment before a block states how it is tested:

    <!-- run -->                as it stands
    <!-- run, shortened -->     with the replacements of `REPLACED`, which reduce its running time
    <!-- not run: REASON -->    not at all

The blocks of a page run in order, in a copy of a small clone after `make train`. Each block of Python runs in a fresh
namespace, so it must contain its imports and its data.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
from helpers import write_dataset

from spinlock_fast.commands.main import VERBS, command_of
from spinlock_fast.train import main as train_main

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = ("README.md", *(f"docs/{path.name}" for path in DOCS))
REPLACED = {
    "--operators 1000": "--operators 4",
    "--operators 512 --output data/u0.h5": "--operators 24 --output data/u0.h5",
    "--output predictors/quickstart --set num_epochs=50": "--output predictors/quickstart --set num_epochs=1",
    "--seed 7": "--seed 7 --operators 24",
    "--operators 24 \\\n  --output data/new.h5": "--operators 6 \\\n  --output data/new.h5",
    'freeze="none", num_epochs=50': 'freeze="none", num_epochs=2',
    "x, num_epochs=50": "x, num_epochs=1, batch_size=64, topo_samples=64",
    "num_epochs=20, batch_size=64": "num_epochs=1, batch_size=64, topo_samples=64",
    "training.num_epochs=50": "training.num_epochs=2",
    "dataset_path=data/1k.h5": "dataset_path=data/quickstart.h5 --set training.num_epochs=1 --output checkpoints/100k",
    "--output checkpoints/behaviour": "--output checkpoints/behaviour --set training.num_epochs=2",
    "N, T, G = 200, 40, 32": "N, T, G = 80, 12, 16",
    "--output checkpoints/lorenz": "--output checkpoints/lorenz --set training.num_epochs=2",
    "--output checkpoints/table": "--output checkpoints/table --set training.num_epochs=2 "
    "--set training.joint_search_epochs=0",
    "--output checkpoints/mine": "--output checkpoints/mine --set training.num_epochs=2",
}
_BLOCK = re.compile(r"(?:<!-- (?P<marker>[^>]*?) -->\n)?```(?P<language>bash|python)\n(?P<text>.*?)```", re.DOTALL)
_OPTIONAL = ("accelerate", "diffusers", "matplotlib", "sklearn", "transformers")  # packages of extras


class Block(NamedTuple):
    """A fenced block of commands or of Python."""

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


RUNNABLE = [page for page in PAGES if any(block.marker.startswith("run") for block in blocks(page))]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small clone after `make train`: 80 operators, two epochs."""
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
def test_every_block_states_how_it_is_tested(page: str) -> None:
    for block in blocks(page):
        known = block.marker in ("run", "run, shortened") or block.marker.startswith("not run: ")
        assert known, f"{page}:{block.line}: {block.marker!r} before a block of {block.language}"


@pytest.mark.parametrize("page", PAGES)
def test_links_within_the_project_resolve(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (ROOT / page).parent.joinpath(target).exists(), f"{page}: {target}"


# Tags that Markdown and the extensions of mkdocs.yml produce; any other tag is text with unescaped < >.
_MADE_OF_MARKDOWN = {
    *("h1", "h2", "h3", "h4", "h5", "h6", "p", "a", "em", "strong", "code", "pre", "ul", "ol", "li", "br", "hr"),
    *("table", "thead", "tbody", "tr", "th", "td", "img", "blockquote", "span", "div"),
}


class Tags(HTMLParser):
    """Collects tags and the texts of table cells."""

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


@pytest.mark.parametrize("page", DOCS, ids=lambda path: path.stem)
def test_no_text_of_a_page_is_parsed_as_a_tag(page: Path) -> None:
    markdown = pytest.importorskip("markdown", reason="comes with mkdocs, an optional extra")
    html = markdown.markdown(page.read_text(encoding="utf-8"), extensions=["tables", "fenced_code"])
    assert set(Tags(html).tags) <= _MADE_OF_MARKDOWN


def test_formulas_are_rendered_verbatim() -> None:
    from spinlock_fast.descriptors.registry import PER_TRAJECTORY, TEMPORAL

    markdown = pytest.importorskip("markdown", reason="comes with mkdocs, an optional extra")
    page = (ROOT / "docs" / "features.md").read_text(encoding="utf-8")
    cells = Tags(markdown.markdown(page, extensions=["tables", "fenced_code"])).cells
    expected = {feature.formula for groups in (TEMPORAL, PER_TRAJECTORY) for f in groups.values() for feature in f}
    assert set(cells[3::5]) == expected
    assert {len(set(cells[i::5])) > 1 for i in range(5)} == {True}


def script(name: str) -> ModuleType:
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_settings_page_is_current() -> None:
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert page == script("make_settings").markdown(), "run `python docs/make_settings.py`"


def test_the_script_of_the_overview_finds_the_best_code_of_each_parameter(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the extra `report`")
    overview = script("make_overview")
    (tmp_path / "lifts.csv").write_text(
        "codebook,code,condition,value,count,share,lift,p,q\n"
        "a/L0,1,normalization,0,9,0.9,2.7,1e-5,0.01\n"
        "a/L1,2,normalization,1,8,0.8,2.4,1e-4,0.02\n"
        "a/L0,3,kernel_size,5,6,0.6,1.2,0.1,0.4\n"
        "a/L0,1,evolution policy,convex,9,0.9,3.6,1e-9,0.001\n"
    )
    ((text, share, usual),) = overview.clearest_codes(tmp_path, overview.load_generator_config(None))
    assert text == "normalization: none\na/L0 code 1, 10 systems"
    assert (share, usual) == pytest.approx((0.9, 1 / 3))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    for package in ("material", "mkdocstrings"):
        pytest.importorskip(package, reason="the site needs the extra `docs`")
    where = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(where)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return where


@pytest.mark.slow
def test_the_site_contains_every_page(site: Path) -> None:
    markdown = pytest.importorskip("markdown", reason="comes with mkdocs, an optional extra")
    for page in DOCS:
        where = site / ("" if page.stem == "index" else page.stem) / "index.html"
        article = re.search(r"<article.*?</article>", where.read_text(encoding="utf-8"), re.DOTALL)
        assert article is not None
        if page.stem.startswith("api"):
            assert article[0].count("doc-object") > 5
            continue
        added = {"article", "nav", "button", "label", "input", "svg", "path", "iframe", "form", "aside"}  # by the theme
        built = Tags(article[0])
        assert set(built.tags) <= _MADE_OF_MARKDOWN | added, page
        plain = markdown.markdown(page.read_text(encoding="utf-8"), extensions=["tables", "fenced_code"])
        assert built.cells == Tags(plain).cells, page  # no extension takes text for markup


@pytest.mark.slow
def test_pages_fit_a_desktop_and_a_phone(site: Path) -> None:
    if shutil.which("chromium") is None:
        pytest.skip("needs chromium")
    command = [sys.executable, str(ROOT / "docs" / "check_site.py"), str(site)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("page", RUNNABLE)
def test_blocks_run(
    page: str, template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(template, tmp_path / "clone")
    monkeypatch.chdir(tmp_path / "clone")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for block in blocks(page):
        if block.marker.startswith("not run") or not installed(block):
            continue
        text = block.text
        if block.marker == "run, shortened":
            assert any(long in text for long in REPLACED), f"{page}:{block.line}: nothing to shorten"
        for long, short in REPLACED.items():
            text = text.replace(long, short)
        if block.language == "python":
            exec(compile(text, f"{page}:{block.line}", "exec"), {})
            continue
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                assert run_command(words) == 0, f"{page}:{block.line}: {line}\n{capsys.readouterr().err}"


def installed(block: Block) -> bool:
    """Whether the optional packages that a block imports are installed."""
    needed = [name for name in _OPTIONAL if re.search(rf"^(from|import) {name}\b", block.text, re.MULTILINE)]
    if re.search(r"spinlock_fast\.report\b", block.text):
        needed.append("matplotlib")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return all(importlib.util.find_spec(name) is not None for name in needed)


def run_command(words: list[str]) -> int:
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


@pytest.mark.slow
def test_the_tour_runs(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cells of the notebook, as a script, without showing pictures."""
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


def test_the_script_of_the_quickstart_writes_every_marked_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the extra `report`")
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    quickstart = script("make_quickstart")
    (tmp_path / "lifts.csv").write_text(
        "codebook,code,condition,value,count,share,lift,p,q\n"
        "a/L0,1,update_policy,1,9,0.9,3.6,1e-9,0.001\n"
        "a/L0,2,update_policy,1,3,1.0,4.0,1e-19,0.001\n"  # of few operators
    )
    assert quickstart.make_overview.value_text("initial_condition", "9", None) == "localized"
    (tmp_path / "associations.csv").write_text(
        "codebook,condition,ami,q\na/L0,step_size,0.05,0.01\na/L1,step_size,0.07,0.02\na/L0,noise_scale,0.3,0.2\n"
        "a/L0,activation,0.1,0\na/L0,evolution policy,0.2,0\n"
    )
    code, found = quickstart.clearest_code(tmp_path), quickstart.associations(tmp_path)
    assert code == "code 1 of `a/L0` has 10 systems; 90% of them have the update policy convex (25% of all systems do)"
    assert found == (
        "the largest AMI is with activation (0.100) and step_size (0.070); no association was found with noise_scale"
    )
    output = "\nAssociations  1 of 2\n  a\n\nCharacteristic codes\n  b\n    c\n  d\n    e\n\nLevels  l\n"
    assert quickstart.excerpt(output, 1) == "Associations  1 of 2\n  a\n\nCharacteristic codes\n  b\n    c"
    names = {
        name for page in quickstart.PAGES for name in quickstart.parts_of((ROOT / page).read_text(encoding="utf-8"))
    }
    assert names == quickstart.PARTS
    page = "x<!-- code, by make_quickstart.py --> old <!-- end -->y"
    assert quickstart.replaced(page, {"code": " new "}) == "x<!-- code, by make_quickstart.py --> new <!-- end -->y"
