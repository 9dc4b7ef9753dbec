"""The tables of ``mmemo compare``: two finished evaluations side by side."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from mmemo.console import console
from mmemo.evaluation.metrics import SCALARS
from mmemo.evaluation.results import EvalResult, compare, read_results
from mmemo.evaluation.scoring import SUBSETS, Block, cluster_words
from mmemo.evaluation.tables import COLUMNS
from mmemo.formats import (
    confidence,
    p_value,
    percent,
    plain,
    plain_signed,
    plain_span,
    signed,
    signed_span,
)


def compare_runs(first: Path, second: Path) -> None:
    """Print the paired comparison of two evaluation folders, task by task: the numbers of both on
    the questions that both answered, and the difference with its interval and p. Open questions
    are compared by their scores only.

    Raises:
        EvaluationError: a folder holds no evaluation, or the two cannot be compared.
    """
    a, b = read_results(first), read_results(second)
    for task, block in compare(a, b).items():
        console.print()
        if "differences" in block:
            console.print(comparison_table(task, block, a, b))
        else:
            console.print(f"Open questions: {task}, A {a.name}, B {b.name}", style="bold")
        if block["scores"] or block["unlike_scores"]:
            console.print(score_comparison_table(block))


def comparison_table(task: str, block: Block, a: EvalResult, b: EvalResult) -> Table:
    """A paired comparison with one row per number: run A, run B, and their difference."""
    sides = Text("")
    for letter, result in (("A", a), ("B", b)):
        sides.append(f"{letter}  {result.name}", style="bold").append(f"  {result.folder}\n", "dim")
    sides.append(f"Task: {task}")
    test, boot = block["mcnemar"], a.bootstrap
    # The caption names the clusters of the compared questions alone.
    answered = {row["sample_id"] for row in b.rows(task)}
    paired = [row for row in a.rows(task) if row["sample_id"] in answered]
    caption = (
        f"{block['n']} questions answered by both runs; {block['unpaired']} others left out. "
        f"Percent; differences in points with {confidence([a])} intervals from {boot.resamples} "
        f"resamples of {cluster_words(paired, boot)}; p is two-sided, from the bootstrap. Only A "
        f"is right on {test['only_a']} questions, only B on {test['only_b']} (McNemar's exact p, "
        f"which treats answers as independent: {p_value(test['p'])})."
    )
    table = Table(title=sides, caption=caption, box=box.SIMPLE_HEAD, pad_edge=False, min_width=72)
    table.title_justify = table.caption_justify = "left"
    table.title_style = ""
    table.add_column("", no_wrap=True)
    for name in ("A", "B", "A − B", "Interval", "p", "n"):
        table.add_column(name, justify="right", no_wrap=True)
    names = {**COLUMNS, "none": "No conflict field", **SCALARS}
    order = ["average", *SUBSETS, "conflict_average", *SCALARS]
    for name in (name for name in order if name in block["differences"]):
        one = block["differences"][name]
        cells = (percent(one["a"]), percent(one["b"]), signed(one["value"]), signed_span(one))
        last = name in ("average", "conflict_average")
        table.add_row(
            names[name], *cells, p_value(one["p"]), str(one["n"]), end_section=last,
            style="bold" if name == "average" else "",
        )  # fmt: skip
    return table


def score_comparison_table(block: Block) -> Table:
    """The paired comparison of the scores that both runs have."""
    caption = "Scores on the questions for which both answers have one."
    if block["unlike_scores"]:
        caption += (
            f" Left out because the two runs computed them differently: "
            f"{', '.join(block['unlike_scores'])}."
        )
    table = Table(caption=caption, box=box.SIMPLE_HEAD, pad_edge=False, min_width=72)
    table.caption_justify = "left"
    table.add_column("", no_wrap=True)
    for name in ("A", "B", "A − B", "Interval", "p", "n", "No\nscore"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, one in block["scores"].items():
        cells = (plain(one["a"]), plain(one["b"]), plain_signed(one["value"]), plain_span(one))
        table.add_row(name, *cells, p_value(one["p"]), str(one["n"]), str(one["unscored"]))
    return table
