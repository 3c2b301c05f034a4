"""The page of an analysis for readers: Markdown, and the same as one HTML file without scripts."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from spinlock_fast.analysis.run import Analysis
from spinlock_fast.analysis.summary_text import (
    agreement_lines,
    association_grid,
    code_lines,
    constant_codebooks,
    pair_lines,
    unused_codes,
)
from spinlock_fast.analysis.tables import Table, length
from spinlock_fast.messages import printable

PICTURE = "analysis.png"

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;color:#1a1a1a;background:#fff;max-width:60rem;margin:2rem auto;"
    "padding:0 1rem}"
    "h1{font-size:1.6rem}h2{font-size:1.2rem;margin-top:2rem}img{max-width:100%;height:auto}"
    "table{border-collapse:collapse;display:block;overflow-x:auto}th,td{padding:.2rem .8rem .2rem 0;text-align:left}"
    "th{border-bottom:1px solid #555}td{border-bottom:1px solid #ddd}.n{text-align:right}"
    "@media(prefers-color-scheme:dark){body{color:#e6e6e6;background:#181a1b}img{background:#fff}td{border-color:#444}}"
)
_READING = (
    "AMI: adjusted mutual information, 0 at chance level, 1 where token and condition determine each other.",
    "Shuffled: the AMI that 95 of 100 shuffled conditions stay below.",
    "q: false discovery rate over all tests of a table. Association is not causation.",
    "Explained: share of the variance of the features of a category that its tokens explain, corrected for the number "
    "of cells (epsilon squared). New: share of the entropy of a level that coarser levels do not contain.",
)


@dataclass(frozen=True)
class Block:
    """A part of the page: "h1", "h2", "p", "list", "table" (first row: header) or "picture" (alternative text)."""

    kind: str
    lines: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()


def page_blocks(analysis: Analysis, pictured: bool) -> list[Block]:
    """What was asked, what was found, tables, notes."""
    summary, tables = analysis.summary, analysis.tables
    alpha = float(summary.get("settings", {}).get("alpha", 0.05))
    blocks = [Block("h1", ["What the tokens tell"]), *_asked(summary, alpha), Block("h2", ["What was found"])]
    if "associations" in tables:
        blocks += _associations(analysis, alpha)
    else:
        blocks.append(Block("p", ["The data have no conditions; nothing is known about what the tokens tell of them."]))
    if pictured:
        blocks.append(Block("picture", ["Association of tokens and conditions, characteristic codes, and levels"]))
    if codes := code_lines(tables, alpha):
        blocks += [Block("h2", ["Characteristic codes"]), Block("list", ["; ".join(lines) for lines in codes])]
    blocks += _levels(tables["refinement"])
    blocks += _further(analysis)
    names = [f"{name} ({length(table):,} rows)" for name, table in tables.items()]
    blocks += [Block("h2", ["How to read it"]), Block("list", _READING)]
    blocks.append(Block("p", [f"Tables beside this page: {', '.join(names)}; summary.json."]))
    return blocks


def _asked(summary: dict[str, Any], alpha: float) -> list[Block]:
    data = summary.get("data", "")
    rows = [
        ("checkpoint", f"{summary.get('checkpoint', '')} (sha256 {str(summary.get('checkpoint_sha256', ''))[:16]})"),
        ("data", ", ".join(data) if isinstance(data, list) else str(data)),
        ("operators", f"{summary['operators']:,}"),
        ("tokens of an operator", f"{summary['codebooks']:,}"),
        ("codes in use", f"{summary['codes_in_use']:,} of {summary['codes']:,}"),
        ("conditions", ", ".join(summary["conditions"]) or "none"),
        ("false discovery rate", f"{alpha:.0%}"),
    ]
    if compared := summary.get("compared"):
        rows.append(("compared with", ", ".join(compared)))
    question = (
        "Which conditions of an operator do its tokens tell, which codes tell them, and what does each level add?"
    )
    return [Block("h2", ["What was asked"]), Block("p", [question]), Block("table", rows=[("", ""), *rows])]


def _associations(analysis: Analysis, alpha: float) -> list[Block]:
    table, tests = analysis.tables["associations"], analysis.summary["found"]["associations"]
    found, others = association_grid(table, alpha)
    told = length(found)
    text = f"The tokens tell {told} of {told + length(others)} conditions"
    if told:
        text += f", most about {found['condition'][0]} (AMI {found['ami'][0]:.2f} by {found['codebook'][0]})"
    text += f". {tests['found']:,} of {tests['tests']:,} pairs of codebook and condition are associated."
    blocks = [Block("p", [text])]
    if told:
        rows = [("condition", "best codebook", "AMI", "shuffled", "codebooks")]
        for i in range(told):
            own = table["condition"] == found["condition"][i]
            codebooks = f"{int((table['q'][own] <= alpha).sum())} of {int(own.sum())}"
            numbers = (f"{found['ami'][i]:.3f}", f"{max(found['null_q95'][i], 0.0):.3f}", codebooks)
            rows.append((str(found["condition"][i]), str(found["codebook"][i]), *numbers))
        blocks.append(Block("table", rows=rows))
    if length(others):
        blocks.append(Block("p", [f"No association was found with {', '.join(map(str, others['condition']))}."]))
    return blocks


def _levels(table: Table) -> list[Block]:
    levels: list[int] = np.unique(table["level"]).tolist()
    rows = [("category", *(f"explained to L{n}" for n in levels), *(f"new in L{n}" for n in levels[1:]))]
    for category in dict.fromkeys(table["category"].tolist()):
        own = table["category"] == category
        explained = [f"{value:.2f}" for value in table["epsilon_squared"][own]]
        new = [f"{100 * value:.0f} %" for value in table["new_share"][own][1:]]
        empty = [""] * (len(levels) - len(explained))
        rows.append((str(category), *explained, *empty, *new, *empty))
    return [Block("h2", ["Levels"]), Block("table", rows=rows)]


def _further(analysis: Analysis) -> list[Block]:
    tables, lines = analysis.tables, list[str]()
    if "cooccurrence" in tables:
        lines += [f"Together more often than by chance: {line}." for line in pair_lines(tables["cooccurrence"])]
    if "agreement" in tables:
        lines += [f"{line}." for line in agreement_lines(tables["agreement"]) if line]
    if unused := unused_codes(tables["codes"]):
        lines.append(f"Unused codes: {unused}.")
    if constant := constant_codebooks(tables["codes"]):
        lines.append(f"One code for all operators, so without information: {', '.join(constant)}.")
    if "stability" in tables:
        table = tables["stability"]
        same = table["level_a"] == table["level_b"]
        for name in dict.fromkeys(table["checkpoint_b"].tolist()):
            mean = table["ami"][same & (table["checkpoint_b"] == name)].mean()
            lines.append(f"Against {name}: matched codebooks agree with a mean AMI of {mean:.2f}.")
    lines += [f"Note: {note}." for note in analysis.summary["notes"]]
    return [Block("h2", ["Further"]), Block("list", lines)] if lines else []


def markdown(blocks: Sequence[Block], picture: str = PICTURE) -> str:
    """The page in Markdown; the picture is a file beside it."""
    parts = []
    for block in blocks:
        lines = [_plain(line) for line in block.lines]
        if block.kind in ("h1", "h2"):
            parts.append(f"{'#' * int(block.kind[1])} {lines[0]}")
        elif block.kind == "picture":
            parts.append(f"![{lines[0]}]({picture})")
        elif block.kind == "list":
            parts.append("\n".join(f"- {line}" for line in lines))
        elif block.kind == "table":
            head, *rows = [[_plain(cell) for cell in row] for row in block.rows]
            marks = [":--", *("--:" if _numeric(block.rows, j) else ":--" for j in range(1, len(head)))]
            parts.append("\n".join(f"| {' | '.join(row)} |" for row in (head, marks, *rows)))
        else:
            parts.append(lines[0])
    return "\n\n".join(parts) + "\n"


def html_page(blocks: Sequence[Block], picture: bytes | None) -> str:
    """The page as one HTML file, which makes no request and runs no script."""
    parts = []
    for block in blocks:
        lines = [html.escape(printable(line)) for line in block.lines]
        if block.kind == "picture":
            assert picture is not None
            source = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
            parts.append(f'<img alt="{lines[0]}" src="{source}">')
        elif block.kind == "list":
            parts.append("<ul>" + "".join(f"<li>{line}</li>" for line in lines) + "</ul>")
        elif block.kind == "table":
            parts.append(_html_table(block.rows))
        else:
            parts.append(f"<{block.kind}>{lines[0]}</{block.kind}>")
    title = blocks[0].lines[0]
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style></head>\n"
        f"<body><main>\n{body}\n</main></body></html>\n"
    )


def _html_table(rows: Sequence[Sequence[str]]) -> str:
    classes = [' class="n"' if _numeric(rows, j) else "" for j in range(len(rows[0]))]
    head = "".join(f'<th{c} scope="col">{html.escape(cell)}</th>' for c, cell in zip(classes, rows[0], strict=True))
    body = "".join(
        "<tr>"
        + "".join(f"<td{c}>{html.escape(printable(cell))}</td>" for c, cell in zip(classes, row, strict=True))
        + "</tr>"
        for row in rows[1:]
    )
    return f"<table>{f'<thead><tr>{head}</tr></thead>' if any(rows[0]) else ''}<tbody>{body}</tbody></table>"


def _numeric(rows: Sequence[Sequence[str]], column: int) -> bool:
    """Whether a column with a header holds numbers, which are aligned to the right."""
    return bool(rows[0][column]) and all(re.match(r"-?[\d.,]*( |$)", row[column]) for row in rows[1:])


def _plain(text: str) -> str:
    """Text without meaning in Markdown: names of a file may hold any character."""
    return re.sub(r"([\\`*\[\]<>|#])", r"\\\1", printable(text))
