"""Makes every figure of the quickstart again: the marked parts of README.md and docs/quickstart.md, and pictures.

    python docs/make_quickstart.py

Simulates data/quickstart.h5 and data/unseen.h5 where they are missing, and runs the commands of docs/quickstart.md in
build/quickstart: `train` with and without theta, `evaluate`, `analyze`, `report`. Draws docs/images/overview.png,
engineering.png, topological.png and semantic.png, and runs examples/tour.ipynb. A marked part of a page is between
`<!-- NAME, by make_quickstart.py -->` and `<!-- end -->`. Needs the extra `report`; takes minutes. With
`--trial EPOCHS` it trains for so many epochs, and writes pages and pictures to build/quickstart/trial.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import make_dashboards
import make_overview
import make_tour

from spinlock_fast.simulate.config import load_generator_config
from spinlock_fast.simulate.parameters import PARAMETER_NAMES

ROOT = Path(__file__).parents[1]
WORK = ROOT / "build" / "quickstart"
TOUR = "examples/tour.ipynb"
PAGES = ("README.md", "docs/quickstart.md")
PARTS = {"time", "train output", "analyze output", "reading", "code", "excerpt", "errors"}
ALPHA = 0.05  # false discovery rate
FEWEST = 10  # operators of a code that is an example
_PART = re.compile(r"(<!-- (?P<name>[a-z ]+), by make_quickstart\.py -->)(?P<text>.*?)(<!-- end -->)", re.DOTALL)


def replaced(page: str, parts: Mapping[str, str]) -> str:
    """The text of a page with current parts; raises KeyError for one that is not made."""
    return _PART.sub(lambda found: found[1] + parts[found["name"]] + found[4], page)


def parts_of(page: str) -> list[str]:
    """Names of the marked parts of a page."""
    return [found["name"] for found in _PART.finditer(page)]


def run(*words: str) -> str:
    """Standard output of `python -m spinlock_fast.VERB ...` in the working directory."""
    environment = os.environ | {"COLUMNS": "92"}  # the width of a block on the page
    command = [sys.executable, "-m", f"spinlock_fast.{words[0]}", *words[1:]]
    return subprocess.run(command, cwd=WORK, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout


def rows(path: Path) -> list[dict[str, str]]:
    """The lines of a CSV file."""
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def clearest_code(analysis: Path) -> str:
    """The most significant code of a parameter of theta, in words."""
    config = load_generator_config(None)
    found = [
        entry
        for entry in rows(analysis / "lifts.csv")
        if entry["condition"] in PARAMETER_NAMES and entry["q"] and float(entry["q"]) <= ALPHA
        if float(entry["lift"]) > 1.0 and float(entry["count"]) / float(entry["share"]) >= FEWEST
    ]
    if not found:
        return "no code is associated with a parameter"
    best = min(found, key=lambda entry: float(entry["p"]))
    share, lift, name = float(best["share"]), float(best["lift"]), best["condition"]
    return (
        f"code {best['code']} of `{best['codebook']}` has {float(best['count']) / share:.0f} systems; {share:.0%} of "
        f"them have the {name.replace('_', ' ')} {make_overview.value_text(name, best['value'], config)} "
        f"({share / lift:.0%} of all systems do)"
    )


def associations(analysis: Path) -> str:
    """The parameters of theta with the largest AMI, and those that no token is associated with, in words."""
    best: dict[str, float] = {}
    for entry in rows(analysis / "associations.csv"):
        if entry["condition"] not in PARAMETER_NAMES:
            continue
        significant = bool(entry["q"]) and float(entry["q"]) <= ALPHA
        best[entry["condition"]] = max(best.get(entry["condition"], 0.0), float(entry["ami"]) if significant else 0.0)
    order = sorted((name for name in best if best[name] > 0.0), key=lambda name: -best[name])
    text = f"the largest AMI is with {listed([f'{name} ({best[name]:.3f})' for name in order[:4]])}"
    missing = [name for name in best if best[name] <= 0.0]
    return f"{text}; no association was found with {listed(missing)}" if missing else text


def listed(names: Sequence[str]) -> str:
    """Names as "a, b and c"."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]])) if names else "none"


def excerpt(output: str, codes: int = 3) -> str:
    """The associations and the first characteristic codes that `analyze` prints."""
    sections = {section.split("  ")[0].split("\n")[0]: section for section in output.strip().split("\n\n")}
    lines = sections["Characteristic codes"].splitlines()
    starts = [i for i, line in enumerate(lines) if re.match(r"  \S", line)]
    last = starts[codes] if len(starts) > codes else len(lines)
    return sections["Associations"] + "\n\n" + "\n".join(lines[:last])


def block(text: str) -> str:
    return "\n```text\n" + "\n".join(line.rstrip() for line in text.strip("\n").splitlines()) + "\n```\n"


def machine() -> str:
    """The processor, and the date."""
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    processor = " ".join(found[1].split()[:2]) if found else "unknown CPU"
    return f"{len(os.sched_getaffinity(0))} cores of an {processor}, {time.strftime('%Y-%m-%d')}"


def make_data() -> None:
    """Simulates what is missing."""
    for name, options in (("quickstart", []), ("unseen", ["--seed", "7"])):
        if not (ROOT / "data" / f"{name}.h5").exists():
            config = ["--config", "configs/data/quickstart.yaml", *options]
            run("generate", *config, "--output", f"data/{name}.h5", "--resume")


def make_parts(settings: Sequence[str]) -> dict[str, str]:
    """Runs the commands of the quickstart, trainings with more settings; returns the marked parts by name."""
    first = run("train", "configs/quickstart.yaml", *settings)
    second = ["configs/quickstart.yaml", "--set", "families=auto", "--output", "checkpoints/behaviour", *settings]
    run("train", *second)
    run("evaluate", "checkpoints/behaviour", "data/unseen.h5", "--json", "unseen.json")
    analyzed = run("analyze", "checkpoints/behaviour", "data/unseen.h5", "--output", "analysis")
    metrics = {name: read(f"checkpoints/{name}/metrics.json") for name in ("quickstart", "behaviour")}
    unseen, known = (
        f"{errors['reconstruction_error']:.3f} ({errors['joint']['reconstruction_error']:.3f} with joint search)"
        for errors in (read("unseen.json"), metrics["behaviour"])
    )
    errors = (
        f"The reconstruction error is {unseen} on the unseen systems and {known} on the "
        f"{metrics['behaviour']['val_rows']} that training held out."
    )
    code, found = clearest_code(WORK / "analysis"), associations(WORK / "analysis")
    reading = f"Of the parameters, {found}. A few codes are far more specific than their codebook: {code}. {errors}"
    seconds = metrics["quickstart"]["seconds"]["total"]
    return {
        "time": f" {seconds:.0f} seconds on {machine()}",
        "train output": block(first),
        "analyze output": block(analyzed),
        "reading": "\n" + textwrap.fill(reading, 128, break_on_hyphens=False) + "\n",
        "code": f" {code}",
        "excerpt": block(excerpt(analyzed)),
        "errors": f" {errors}",
    }


def read(path: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((WORK / path).read_text(encoding="utf-8"))
    return found


def draw(images: Path) -> None:
    """The pictures of the README and of docs/dashboards.md."""
    images.mkdir(parents=True, exist_ok=True)
    overview = [sys.executable, str(ROOT / "docs" / "make_overview.py"), "data/unseen.h5", "analysis"]
    overview += ["--output", str(images / "overview.png")]
    subprocess.run(overview, cwd=WORK, check=True)
    make_dashboards.draw_dashboards(
        str(WORK / "checkpoints" / "quickstart"), str(WORK / "data" / "quickstart.h5"), images
    )


def main() -> None:
    """The command."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--trial", type=int, metavar="EPOCHS")
    trial = options.parse_args().trial
    target = ROOT if trial is None else WORK / "trial"
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    (ROOT / "data").mkdir(exist_ok=True)
    for name in ("configs", "data"):
        (WORK / name).symlink_to(ROOT / name)
    make_data()
    parts = make_parts([] if trial is None else ["--set", f"training.num_epochs={trial}"])
    draw(target / "docs" / "images")
    make_tour.write(ROOT / TOUR, target / TOUR, WORK)
    for page in PAGES:
        text = replaced((ROOT / page).read_text(encoding="utf-8"), parts)
        (target / page).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
