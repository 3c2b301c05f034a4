"""Draws docs/images/overview.png: nearest systems by their tokens, and what single codes tell about theta.

    python docs/make_overview.py DATA.h5 ANALYSIS_DIR

DATA.h5 is made by `generate` with a seed that the tokenizer was not trained on, ANALYSIS_DIR by `analyze`
(docs/quickstart.md, "What does behaviour reveal?"). Needs the extra `report`.
"""

from __future__ import annotations

import argparse
import csv
import io
from pathlib import Path

import h5py
import matplotlib.pyplot as plt
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from spinlock_fast.simulate.config import GeneratorConfig, load_generator_config
from spinlock_fast.simulate.initial_conditions import INITIAL_TYPES
from spinlock_fast.simulate.parameters import PARAMETER_NAMES, POLICIES, ThetaSequence
from spinlock_fast.simulate.rollout import Rollout

PICTURE = Path(__file__).parent / "images" / "overview.png"
QUERIES, NEIGHBOURS = 5, 5
ALPHA = 0.05  # false discovery rate


def last_state(row: int, config: GeneratorConfig) -> NDArray[np.float32]:
    """[3, G, G]: the last state of the first realization of an operator, simulated again."""
    theta = ThetaSequence(config.parameters, config.random_seed).thetas(row, row + 1)
    *_, block = Rollout(theta, config, torch.device("cpu")).blocks()
    return block[-1, 0, 0].numpy()


def neighbours(directory: Path) -> list[list[int]]:
    """Operators spread evenly over the file, each followed by its nearest ones."""
    lines: dict[int, list[int]] = {}
    with (directory / "neighbours.csv").open(encoding="utf-8") as file:
        for entry in csv.DictReader(file):
            lines.setdefault(int(entry["row"]), []).append(int(entry["neighbour"]))
    rows = sorted(lines)
    return [[row, *lines[row][:NEIGHBOURS]] for row in rows[:: len(rows) // QUERIES][:QUERIES]]


def clearest_codes(directory: Path, config: GeneratorConfig) -> list[tuple[str, float, float]]:
    """(text, share within the code, share of all operators) of the clearest code of each parameter of theta."""
    best: dict[str, dict[str, str]] = {}
    with (directory / "lifts.csv").open(encoding="utf-8") as file:
        for entry in csv.DictReader(file):
            name = entry["condition"]
            tested = name in PARAMETER_NAMES and entry["q"] and float(entry["q"]) <= ALPHA and float(entry["lift"]) > 1
            if tested and (name not in best or float(entry["p"]) < float(best[name]["p"])):
                best[name] = entry
    found = []
    for name, entry in sorted(best.items(), key=lambda item: -float(item[1]["p"])):
        share, total = float(entry["share"]), float(entry["count"]) / float(entry["share"])
        text = f"{name}: {value_text(name, entry['value'], config)}\n"
        text += f"{entry['codebook']} code {entry['code']}, {total:.0f} systems"
        found.append((text, share, share / float(entry["lift"])))
    return found


def value_text(name: str, value: str, config: GeneratorConfig) -> str:
    """The name of a choice that the file stores as its position in a list; other values as they are."""
    choices = {"update_policy": POLICIES, "initial_condition": tuple(INITIAL_TYPES)}.get(name)
    if name in ("activation", "noise_schedule", "normalization"):
        choices = getattr(config.parameters, name)
    return value if choices is None else str(choices[int(value)])


def main() -> None:
    options = argparse.ArgumentParser(description="Draws the picture of the README.")
    options.add_argument("data")
    options.add_argument("analysis", type=Path)
    options.add_argument("--config", default="configs/data/quickstart.yaml", help="settings of the data set")
    options.add_argument("--seed", type=int, default=7, help="seed of the data set")
    options.add_argument("--output", type=Path, default=PICTURE)
    chosen = options.parse_args()
    config = load_generator_config(chosen.config, {"random_seed": chosen.seed})
    with h5py.File(chosen.data) as file:
        expected = ThetaSequence(config.parameters, config.random_seed)
        (theta,) = expected.thetas(0, 1)
        if not np.allclose(file["parameters/params"][0], expected.values(theta)):
            options.error("DATA.h5 was made with other settings or another seed")
    figure = plt.figure(figsize=(11.7, 4.7), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1.1, 1])
    panels = left.subplots(QUERIES, NEIGHBOURS + 1)
    for line, rows in zip(panels, neighbours(chosen.analysis), strict=True):
        for axes, row in zip(line, rows, strict=True):
            state = last_state(row, config)[0]
            limit = float(np.abs(state).max())
            axes.imshow(state, cmap="RdBu_r", vmin=-limit, vmax=limit)
            axes.set(xticks=[], yticks=[])
        for spine in line[0].spines.values():
            spine.set_linewidth(2.5)
    for axes, title in zip(panels[0], ["system", *(f"nearest {i + 1}" for i in range(NEIGHBOURS))], strict=True):
        axes.set_title(title, fontsize=8)
    left.suptitle("Nearest systems by their tokens (last state of each simulation)", fontsize=10)
    codes = clearest_codes(chosen.analysis, config)
    axes = right.subplots()
    texts, shares, usual = zip(*codes, strict=True)
    axes.barh(texts, shares, height=0.6, color="#7a9cc6", label="of the systems with this code")
    axes.plot(usual, range(len(codes)), "k|", markersize=14, markeredgewidth=2, label="of all systems")
    axes.set_xlabel("share with this value", fontsize=8)
    axes.set_xlim(0, 1)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.4, -0.12), ncols=2)
    right.suptitle("What one token of behaviour tells about a parameter it was not given", fontsize=10)
    with io.BytesIO() as png:
        figure.savefig(png, dpi=110)
        Image.open(png).convert("RGB").quantize(128).save(chosen.output, optimize=True)


if __name__ == "__main__":
    main()
