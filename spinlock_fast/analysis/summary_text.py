"""An analysis in words, for the terminal."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Table as Grid

from spinlock_fast.analysis.run import Analysis
from spinlock_fast.analysis.tables import Table, length, select

_ASSOCIATIONS = 8
_CODES = 6
_FEWEST_OPERATORS = 5  # of a code that is worth a sentence
_PAIRS = 3
_FACTS = 2
_SAME_AUC = 2e-3


def print_analysis(analysis: Analysis, console: Console) -> None:
    """The findings that a person wants to see first; the rest is in the files."""
    summary, tables = analysis.summary, analysis.tables
    console.print(
        f"\n{summary['operators']:,} operators, {summary['codebooks']} tokens each; "
        f"{summary['codes_in_use']} of {summary['codes']} codes are used"
    )
    if unused := unused_codes(tables["codes"]):
        console.print(f"[dim]never used: {escape(unused)}[/dim]")
    if mute := mute_codebooks(tables["codes"]):
        console.print(f"say nothing, since every operator has the same code: {escape(', '.join(mute))}")
    if "associations" in tables:
        _print_associations(analysis, console)
    _print_codes(analysis, console)
    _print_levels(tables["refinement"], console)
    if analysis.summary["pairs_of_codes_found"]:
        console.print("\n[bold]Codes of different categories that meet[/bold]")
        for line in pair_lines(tables["cooccurrence"]):
            console.print(f"  {escape(line)}")
    if "agreement" in tables:
        for line in agreement_lines(tables["agreement"]):
            console.print(escape(line))
    if "stability" in tables:
        _print_stability(tables["stability"], console)
    for note in summary["notes"]:
        console.print(f"[dim]note: {escape(note)}[/dim]")


def unused_codes(codes: Table) -> str:
    """Codebooks with the number of their codes that no operator has."""
    unused = codes["codebook"][codes["count"] == 0]
    names, counts = np.unique(unused, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    shown = [f"{counts[i]} of {names[i]}" for i in order[:8]]
    rest = int(counts[order[8:]].sum())
    return ", ".join(shown + ([f"{rest} of others"] if rest else []))


def mute_codebooks(codes: Table) -> list[str]:
    """Codebooks that give every operator the same code."""
    used = codes["codebook"][codes["count"] > 0]
    names, counts = np.unique(used, return_counts=True)
    return [str(name) for name in names[counts == 1]]


def association_grid(table: Table, alpha: float) -> tuple[Table, Table]:
    """For every condition its strongest codebook, strongest first: those found, and those not."""
    best: dict[str, int] = {}
    for i in np.argsort(-table["ami"], kind="stable"):
        best.setdefault(str(table["condition"][i]), int(i))
    significant = [np.nanmin(table["q"][table["condition"] == name], initial=1.0) <= alpha for name in best]
    rows = np.array(list(best.values()))
    # The codebook shown is the strongest of those that are found.
    for k, (name, found) in enumerate(zip(best, significant, strict=True)):
        if found:
            members = np.flatnonzero((table["condition"] == name) & (table["q"] <= alpha))
            rows[k] = members[np.argmax(table["ami"][members])]
    chosen = np.array(significant, bool)
    return select(table, rows[chosen]), select(table, rows[~chosen])


def _print_associations(analysis: Analysis, console: Console) -> None:
    alpha = analysis.summary["settings"]["alpha"] if "settings" in analysis.summary else 0.05
    tests = analysis.summary["found"]["associations"]
    found, not_found = association_grid(analysis.tables["associations"], alpha)
    console.print(
        f"\n[bold]What tokens tell[/bold]  {tests['found']} of {tests['tests']} pairs of codebook and condition, "
        f"at a false discovery rate of {alpha:.0%}"
    )
    if found["ami"].size:
        grid = Grid(box=None, padding=(0, 2, 0, 2), pad_edge=True)
        for name, justify in (("condition", "left"), ("told best by", "left"), ("AMI", "right"), ("chance", "right")):
            grid.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
        grid.add_column("codebooks", justify="right", no_wrap=True)
        whole = analysis.tables["associations"]
        for i in range(min(length(found), _ASSOCIATIONS)):
            mine = whole["condition"] == found["condition"][i]
            known = int((whole["q"][mine] <= alpha).sum())
            grid.add_row(
                escape(str(found["condition"][i])),
                escape(str(found["codebook"][i])),
                f"{found['ami'][i]:.3f}",
                f"< {max(found['null_q95'][i], 0.0005):.3f}",
                f"{known} of {int(mine.sum())}",
            )
        console.print(grid)
        if (more := length(found) - _ASSOCIATIONS) > 0:
            console.print(f"  and {more} more in associations.csv")
    if not_found["ami"].size:
        names = ", ".join(str(name) for name in not_found["condition"])
        console.print(f"  nothing found about: {escape(names)}")


def _print_codes(analysis: Analysis, console: Console) -> None:
    alpha = analysis.summary["settings"]["alpha"] if "settings" in analysis.summary else 0.05
    lines = code_lines(analysis.tables, alpha)
    if lines:
        console.print("\n[bold]Codes that stand for something[/bold]")
        for head, *facts in lines:
            console.print(f"  {escape(head)}")
            for fact in facts:
                console.print(f"    {escape(fact)}", soft_wrap=True)


def code_lines(tables: dict[str, Table], alpha: float) -> list[list[str]]:
    """The codes with the clearest link to a condition that their codebook tells: lines of text, one code for each
    codebook and condition."""
    if "lifts" not in tables:
        return []
    lifts = tables["lifts"]
    tests = tables["associations"]
    told = {pair for pair, q in zip(_pairs(tests), tests["q"], strict=True) if q <= alpha}
    good = np.array([pair in told for pair in _pairs(lifts)])
    good &= (lifts["q"] <= alpha) & (lifts["count"] >= _FEWEST_OPERATORS) & (lifts["lift_low"] > 1)
    rows = np.flatnonzero(good)
    rows = rows[np.argsort(lifts["p"][rows], kind="stable")]
    lines, seen_books, seen_conditions = [], set(), set()
    for i in rows.tolist():
        book, condition = str(lifts["codebook"][i]), str(lifts["condition"][i])
        if book in seen_books or condition in seen_conditions:
            continue
        seen_books.add(book)
        seen_conditions.add(condition)
        code = int(lifts["code"][i])
        mine = (tables["codes"]["codebook"] == book) & (tables["codes"]["code"] == code)
        count = int(tables["codes"]["count"][mine][0])
        fact = (
            f"{condition} {lifts['value'][i]}: {lifts['share'][i]:.0%} of them, {lifts['lift'][i]:.1f} times the "
            f"usual share ({lifts['lift_low'][i]:.1f} to {lifts['lift_high'][i]:.1f})"
        )
        lines.append([f"{book} code {code}, {count:,} operators", fact, *_feature_facts(tables, book, code, alpha)])
        if len(lines) == _CODES:
            break
    return lines


def _pairs(table: Table) -> list[tuple[str, str]]:
    return list(zip(table["codebook"].tolist(), table["condition"].tolist(), strict=True))


def _feature_facts(tables: dict[str, Table], book: str, code: int, alpha: float) -> list[str]:
    features = tables["features"]
    mine = np.flatnonzero((features["codebook"] == book) & (features["code"] == code) & (features["q"] <= alpha))
    # Columns of the file have names; those of an encoder are mixtures.
    named = mine[features["kind"][mine] == "measured"]
    mine = named if named.size else mine
    strength = np.abs(features["auc"][mine] - 0.5)
    mine = mine[np.argsort(-strength, kind="stable")]
    # Columns with one AUC order operators alike: one of them is enough.
    auc = features["auc"][mine]
    fresh = [k for k in range(len(mine)) if k == 0 or abs(auc[k] - auc[k - 1]) > _SAME_AUC]
    return [
        f"{'high' if features['auc'][i] > 0.5 else 'low'} {features['feature'][i]}: median "
        f"{features['median'][i]:.3g}, of all {features['median_all'][i]:.3g} "
        f"(AUC {max(features['auc'][i], 1 - features['auc'][i]):.2f})"
        for i in mine[fresh[:_FACTS]].tolist()
    ]


def _print_levels(table: Table, console: Console) -> None:
    console.print("\n[bold]Levels[/bold]  share of a category's variance told by its tokens so far (epsilon squared)")
    grid = Grid(box=None, padding=(0, 2, 0, 2), pad_edge=True)
    grid.add_column("category", no_wrap=True)
    levels: list[int] = np.unique(table["level"]).tolist()
    for level in levels:
        grid.add_column(f"L{level}" if level == 0 else f"+ L{level}", justify="right")
    if len(levels) > 1:
        grid.add_column("new in " + ", ".join(f"L{level}" for level in levels[1:]), justify="right")
    for category in dict.fromkeys(table["category"].tolist()):
        mine = table["category"] == category
        told = [f"{value:.2f}" for value in table["epsilon_squared"][mine]]
        new = ", ".join(f"{value:.0%}" for value in table["new_share"][mine][1:])
        grid.add_row(escape(category), *told, *[""] * (len(levels) - len(told)), *([new] if len(levels) > 1 else []))
    console.print(grid)


def pair_lines(table: Table) -> list[str]:
    """The clearest pairs of codes that meet more often than chance, one for a pair of categories."""
    lines = []
    seen = set()
    for i in np.flatnonzero(table["lift"] > 1).tolist():  # in order of p
        pair = (table["category_a"][i], table["category_b"][i])
        if pair in seen:
            continue
        seen.add(pair)
        a = f"{table['codebook_a'][i]} code {table['code_a'][i]}"
        b = f"{table['codebook_b'][i]} code {table['code_b'][i]}"
        lines.append(f"{a} and {b}: {table['count'][i]} operators, {table['lift'][i]:.1f} times what chance gives")
        if len(lines) == _PAIRS:
            break
    return lines


def agreement_lines(table: Table) -> list[str]:
    """The condition that neighbours in tokens share most clearly."""
    i = int(np.nanargmax(table["lift"]))
    if not table["lift"][i] > 1:
        return []
    return [
        "",
        f"The operator nearest in tokens has the same {table['condition'][i]} in {table['same_as_nearest'][i]:.0%} of "
        f"cases; any other one in {table['same_as_any'][i]:.0%}",
    ]


def _print_stability(table: Table, console: Console) -> None:
    same = table["level_a"] == table["level_b"]
    for name in dict.fromkeys(table["checkpoint_b"].tolist()):
        mine = same & (table["checkpoint_b"] == name)
        order = np.flatnonzero(mine)
        order = order[np.argsort(-table["ami"][order], kind="stable")]
        best = _stable(table, order[:1])
        console.print(
            f"\n[bold]Against {escape(name)}[/bold]  matched codebooks agree with a mean AMI of "
            f"{table['ami'][mine].mean():.2f}; most: {escape(best)}",
            soft_wrap=True,
        )


def _stable(table: Table, rows: NDArray[Any]) -> str:
    return ", ".join(
        f"{table['category_a'][i]} and {table['category_b'][i]} L{table['level_a'][i]} ({table['ami'][i]:.2f})"
        for i in rows.tolist()
    )
