"""A Markdown table over pipeline runs with different seeds: python eval/seed_table.py RUN [RUN ...]

It has one row per run: the average over the conflict and consistent subsets of the model and of
each baseline, in percent with its interval (over speakers), the model's average over the
conflict subsets alone, and whether the model's interval lies above that of every baseline.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmemo.errors import EvaluationError, MmemoError
from mmemo.evaluation.results import EvaluatedRun
from mmemo.formats import percent, span
from mmemo.report.collect import read_run


def column(run: EvaluatedRun) -> str:
    """The name of a run; ``majority`` for the majority baseline, whichever its label."""
    return run.name if run.result is not None else "majority"


def cell(found: Mapping[str, Any]) -> str:
    """A number with its interval, in percent: ``81.7 (78.6–84.8)``."""
    interval = span(found)
    return percent(found["value"]) + (f" ({interval})" if interval else "")


def table(folders: list[Path]) -> str:
    """The table of the runs in ``folders``. Its columns are the models and baselines of the first
    run.

    Raises:
        EvaluationError: a folder has no evaluation, or other baselines than the first one.
    """
    names: list[str] = []
    rows: list[list[str]] = []
    for folder in folders:
        runs = {column(run): run for run in read_run(folder).runs}
        names = names or list(runs)
        if set(runs) != set(names):
            raise EvaluationError(
                f"{folder}: has {', '.join(runs)} where {folders[0]} has {', '.join(names)}; "
                "give runs of one pipeline"
            )
        ours = runs[names[0]].block
        low = ours["average"]["low"]
        baselines = [run.block for run in runs.values() if run.role == "baseline"]
        highs = [block["average"]["high"] for block in baselines]
        apart = None not in (low, *highs) and all(low > high for high in highs)
        numbers = [*(runs[name].block["average"] for name in names), ours.get("conflict_average")]
        cells = ["–" if found is None else cell(found) for found in numbers]
        rows.append([folder.name, *cells, "yes" if apart else "no"])
    header = ["seed", *names, "conflict clips", "apart"]
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(arguments: list[str]) -> None:
    """Print the table."""
    if not arguments:
        raise EvaluationError("no runs given; use python eval/seed_table.py RUN [RUN ...]")
    print(table([Path(name) for name in arguments]))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except MmemoError as error:
        sys.exit(f"error: {error}")
