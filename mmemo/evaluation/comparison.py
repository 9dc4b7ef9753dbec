"""``mmemo compare``: two finished evaluations side by side."""

from __future__ import annotations

from pathlib import Path

from mmemo.console import console
from mmemo.evaluation.results import compare, read_results
from mmemo.evaluation.tables import comparison_table, score_comparison_table


def compare_runs(first: Path, second: Path) -> None:
    """Print the paired comparison of two evaluation folders, task by task: what both scored on the
    questions that both answered, and the difference with its interval and p. Open questions have
    scores only.

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
