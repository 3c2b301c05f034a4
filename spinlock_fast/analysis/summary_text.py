"""Text summary of an analysis for the terminal."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Table as Grid

from spinlock_fast.analysis.run import Analysis
from spinlock_fast.analysis.tables import Table, length, select

_MAX_ASSOCIATIONS = 8
_MAX_CODES = 6
_MIN_OPERATORS = 5  # codes with fewer operators are not mentioned
_MAX_PAIRS = 3
_MAX_FACTS = 2
_SAME_AUC = 2e-3  # features whose AUC differs by less are taken as one


def print_analysis(analysis: Analysis, console: Console) -> None:
    """Prints the main findings; the tables hold all of them."""
    summary, tables = analysis.summary, analysis.tables
    console.print(
        f"\n{summary['operators']:,} operators, {summary['codebooks']} tokens each; "
        f"{summary['codes_in_use']} of {summary['codes']} codes are in use"
    )
    if unused := unused_codes(tables["codes"]):
        console.print(f"[dim]unused: {escape(unused)}[/dim]")
    if constant := constant_codebooks(tables["codes"]):
        console.print(f"uninformative, with one code for all operators: {escape(', '.join(constant))}")
    if "associations" in tables:
        _print_associations(analysis, console)
    _print_codes(analysis, console)
    _print_levels(tables["refinement"], console)
    if analysis.summary["pairs_of_codes_found"]:
        console.print("\n[bold]Co-occurring codes of different categories[/bold]")
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
    """Number of unused codes of each codebook, as text."""
    unused = codes["codebook"][codes["count"] == 0]
    names, counts = np.unique(unused, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    shown = [f"{counts[i]} of {names[i]}" for i in order[:8]]
    num_others = int(counts[order[8:]].sum())
    return ", ".join(shown + ([f"{num_others} of others"] if num_others else []))


def constant_codebooks(codes: Table) -> list[str]:
    """Codebooks with the same code for every operator."""
    used = codes["codebook"][codes["count"] > 0]
    names, counts = np.unique(used, return_counts=True)
    return [str(name) for name in names[counts == 1]]


def association_grid(table: Table, alpha: float) -> tuple[Table, Table]:
    """The row of the strongest codebook of each condition, by decreasing AMI: significant and other conditions."""
    best: dict[str, int] = {}
    for i in np.argsort(-table["ami"], kind="stable"):
        best.setdefault(str(table["condition"][i]), int(i))
    significant = [np.nanmin(table["q"][table["condition"] == name], initial=1.0) <= alpha for name in best]
    rows = np.array(list(best.values()))
    # A significant condition is shown with its strongest significant codebook.
    for k, (name, is_significant) in enumerate(zip(best, significant, strict=True)):
        if is_significant:
            members = np.flatnonzero((table["condition"] == name) & (table["q"] <= alpha))
            rows[k] = members[np.argmax(table["ami"][members])]
    chosen = np.array(significant, bool)
    return select(table, rows[chosen]), select(table, rows[~chosen])


def _print_associations(analysis: Analysis, console: Console) -> None:
    alpha = analysis.summary["settings"]["alpha"] if "settings" in analysis.summary else 0.05
    tests = analysis.summary["found"]["associations"]
    significant, others = association_grid(analysis.tables["associations"], alpha)
    console.print(
        f"\n[bold]Associations[/bold]  {tests['found']} of {tests['tests']} pairs of codebook and condition "
        f"(false discovery rate {alpha:.0%})"
    )
    if significant["ami"].size:
        grid = Grid(box=None, padding=(0, 2, 0, 2), pad_edge=True)
        for name, justify in (("condition", "left"), ("best codebook", "left"), ("AMI", "right"), ("chance", "right")):
            grid.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
        grid.add_column("codebooks", justify="right", no_wrap=True)
        associations = analysis.tables["associations"]
        for i in range(min(length(significant), _MAX_ASSOCIATIONS)):
            selected = associations["condition"] == significant["condition"][i]
            num_significant = int((associations["q"][selected] <= alpha).sum())
            grid.add_row(
                escape(str(significant["condition"][i])),
                escape(str(significant["codebook"][i])),
                f"{significant['ami'][i]:.3f}",
                f"< {max(significant['null_q95'][i], 0.0005):.3f}",
                f"{num_significant} of {int(selected.sum())}",
            )
        console.print(grid)
        if (more := length(significant) - _MAX_ASSOCIATIONS) > 0:
            console.print(f"  and {more} more in associations.csv")
    if others["ami"].size:
        names = ", ".join(str(name) for name in others["condition"])
        console.print(f"  no association found: {escape(names)}")


def _print_codes(analysis: Analysis, console: Console) -> None:
    alpha = analysis.summary["settings"]["alpha"] if "settings" in analysis.summary else 0.05
    lines = code_lines(analysis.tables, alpha)
    if lines:
        console.print("\n[bold]Characteristic codes[/bold]")
        for head, *facts in lines:
            console.print(f"  {escape(head)}")
            for fact in facts:
                console.print(f"    {escape(fact)}", soft_wrap=True)


def code_lines(tables: dict[str, Table], alpha: float) -> list[list[str]]:
    """Lines of text on the codes most associated with a condition, one code per codebook and condition."""
    lines = []
    for i in characteristic_codes(tables, alpha):
        lifts = tables["lifts"]
        codebook, condition, code = str(lifts["codebook"][i]), str(lifts["condition"][i]), int(lifts["code"][i])
        selected = (tables["codes"]["codebook"] == codebook) & (tables["codes"]["code"] == code)
        count = int(tables["codes"]["count"][selected][0])
        fact = (
            f"{condition} {lifts['value'][i]}: {lifts['share'][i]:.0%} of them, {lifts['lift'][i]:.1f} times the "
            f"usual share ({lifts['lift_low'][i]:.1f} to {lifts['lift_high'][i]:.1f})"
        )
        lines.append(
            [f"{codebook} code {code}, {count:,} operators", fact, *_feature_lines(tables, codebook, code, alpha)]
        )
    return lines


def characteristic_codes(tables: dict[str, Table], alpha: float) -> list[int]:
    """Rows of `lifts`, clearest first: at most one of each codebook and of each condition.

    Only pairs of codebook and condition with a significant association are considered.
    """
    if "lifts" not in tables:
        return []
    lifts = tables["lifts"]
    tests = tables["associations"]
    significant = {pair for pair, q in zip(_codebook_condition_pairs(tests), tests["q"], strict=True) if q <= alpha}
    eligible = np.array([pair in significant for pair in _codebook_condition_pairs(lifts)])
    eligible &= (lifts["q"] <= alpha) & (lifts["count"] >= _MIN_OPERATORS) & (lifts["lift_low"] > 1)
    rows = np.flatnonzero(eligible)
    rows = rows[np.argsort(lifts["p"][rows], kind="stable")]
    chosen, seen_codebooks, seen_conditions = [], set(), set()
    for i in rows.tolist():
        codebook, condition = str(lifts["codebook"][i]), str(lifts["condition"][i])
        if codebook in seen_codebooks or condition in seen_conditions:
            continue
        seen_codebooks.add(codebook)
        seen_conditions.add(condition)
        chosen.append(i)
        if len(chosen) == _MAX_CODES:
            break
    return chosen


def _codebook_condition_pairs(table: Table) -> list[tuple[str, str]]:
    return list(zip(table["codebook"].tolist(), table["condition"].tolist(), strict=True))


def _feature_lines(tables: dict[str, Table], codebook: str, code: int, alpha: float) -> list[str]:
    features = tables["features"]
    selected = np.flatnonzero(
        (features["codebook"] == codebook) & (features["code"] == code) & (features["q"] <= alpha)
    )
    # Columns of the file are preferred: those of an encoder are mixtures.
    named = selected[features["kind"][selected] == "measured"]
    selected = named if named.size else selected
    strength = np.abs(features["auc"][selected] - 0.5)
    selected = selected[np.argsort(-strength, kind="stable")]
    # Columns of nearly equal AUC order operators alike: one of them is shown.
    auc = features["auc"][selected]
    fresh = [k for k in range(len(selected)) if k == 0 or abs(auc[k] - auc[k - 1]) > _SAME_AUC]
    return [
        f"{'high' if features['auc'][i] > 0.5 else 'low'} {features['feature'][i]}: median "
        f"{features['median'][i]:.3g}, of all {features['median_all'][i]:.3g} "
        f"(AUC {max(features['auc'][i], 1 - features['auc'][i]):.2f})"
        for i in selected[fresh[:_MAX_FACTS]].tolist()
    ]


def _print_levels(table: Table, console: Console) -> None:
    console.print(
        "\n[bold]Levels[/bold]  share of a category's variance explained by its tokens up to a level (epsilon squared)"
    )
    grid = Grid(box=None, padding=(0, 2, 0, 2), pad_edge=True)
    grid.add_column("category", no_wrap=True)
    levels: list[int] = np.unique(table["level"]).tolist()
    for level in levels:
        grid.add_column(f"L{level}" if level == 0 else f"+ L{level}", justify="right")
    if len(levels) > 1:
        grid.add_column("new in " + ", ".join(f"L{level}" for level in levels[1:]), justify="right")
    for category in dict.fromkeys(table["category"].tolist()):
        selected = table["category"] == category
        explained = [f"{value:.2f}" for value in table["epsilon_squared"][selected]]
        new = ", ".join(f"{value:.0%}" for value in table["new_share"][selected][1:])
        grid.add_row(
            escape(category), *explained, *[""] * (len(levels) - len(explained)), *([new] if len(levels) > 1 else [])
        )
    console.print(grid)


def pair_lines(table: Table) -> list[str]:
    """The most significant pairs of codes that co-occur more often than by chance, one per pair of categories."""
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
        if len(lines) == _MAX_PAIRS:
            break
    return lines


def agreement_lines(table: Table) -> list[str]:
    """The condition on which nearest neighbours agree most, compared with chance."""
    i = int(np.nanargmax(table["lift"]))
    if not table["lift"][i] > 1:
        return []
    return [
        "",
        f"The operator nearest in tokens has the same {table['condition'][i]} in {table['same_as_nearest'][i]:.0%}; "
        f"any other one in {table['same_as_any'][i]:.0%}",
    ]


def _print_stability(table: Table, console: Console) -> None:
    same = table["level_a"] == table["level_b"]
    for name in dict.fromkeys(table["checkpoint_b"].tolist()):
        selected = same & (table["checkpoint_b"] == name)
        order = np.flatnonzero(selected)
        order = order[np.argsort(-table["ami"][order], kind="stable")]
        best = _pair_text(table, order[:1])
        console.print(
            f"\n[bold]Against {escape(name)}[/bold]  matched codebooks agree with a mean AMI of "
            f"{table['ami'][selected].mean():.2f}; most: {escape(best)}",
            soft_wrap=True,
        )


def _pair_text(table: Table, rows: NDArray[Any]) -> str:
    return ", ".join(
        f"{table['category_a'][i]} and {table['category_b'][i]} L{table['level_a'][i]} ({table['ami'][i]:.2f})"
        for i in rows.tolist()
    )
