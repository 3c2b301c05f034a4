"""Runs the cells of examples/tour.ipynb and stores what they print and draw, in the directory of a quickstart.

`python docs/make_quickstart.py` calls it.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt

DPI = 100


def executed(notebook: str, directory: Path) -> str:
    """The text of a notebook with the outputs of its cells, run in `directory`."""
    mpl.use("Agg")
    content: dict[str, Any] = json.loads(notebook)
    names: dict[str, Any] = {}
    with contextlib.chdir(directory):
        for number, cell in enumerate(content["cells"]):
            if cell["cell_type"] == "code":
                printed = io.StringIO()
                with contextlib.redirect_stdout(printed):
                    exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
                cell["outputs"] = [*stream(printed.getvalue()), *pictures()]
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def stream(text: str) -> list[dict[str, Any]]:
    """Printed text as outputs."""
    lines = text.splitlines(keepends=True)
    return [{"name": "stdout", "output_type": "stream", "text": lines}] if lines else []


def pictures() -> list[dict[str, Any]]:
    """Open figures as outputs; closes them."""
    outputs = []
    for number in plt.get_fignums():
        figure, png = plt.figure(number), io.BytesIO()
        figure.savefig(png, format="png", dpi=DPI)
        data = {"image/png": base64.b64encode(png.getvalue()).decode()}
        outputs.append({"data": data, "metadata": {}, "output_type": "display_data"})
    plt.close("all")
    return outputs


def write(notebook: Path, target: Path, directory: Path) -> None:
    """Writes a notebook with its outputs."""
    text = executed(notebook.read_text(encoding="utf-8"), directory)
    os.makedirs(target.parent, exist_ok=True)
    target.write_text(text, encoding="utf-8")
