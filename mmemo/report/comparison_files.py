"""Comparisons of evaluations as files for papers and spreadsheets: CSV and LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmemo import files
from mmemo.evaluation.metrics import SCALARS
from mmemo.evaluation.results import Comparison, EvalResult, compare_all
from mmemo.evaluation.scorer import specs_of
from mmemo.evaluation.scoring import SUBSETS, Block, score_rows
from mmemo.evaluation.tables import COLUMNS, number
from mmemo.formats import level
from mmemo.statistics import BootstrapConfig

FIELDS = (
    *(
        "task",
        "metric",
        "first",
        "other",
        "first_value",
        "other_value",
        "difference",
        "low",
        "high",
    ),
    *("p", "p_holm", "n", "clusters", "unscored", "unpaired", "tests", "confidence"),
)
"""Columns of the CSV file. Numbers are as in ``results.json``: shares from 0 to 1."""

_ESCAPED = {
    **{char: f"\\{char}" for char in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "−": "$-$",
    "–": "--",
    '"': r"\textquotedbl{}",
    "`": r"\textasciigrave{}",
    "'": r"\textquotesingle{}",
}


def write_csv(path: Path, found: Sequence[Comparison]) -> None:
    """Write one row for each difference of some comparisons."""
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, FIELDS, lineterminator="\r\n")
    writer.writeheader()
    for one in found:
        for row in _rows(one):
            writer.writerow({name: _cell(row.get(name)) for name in FIELDS})
    files.write_whole(path, out.getvalue())


def write_latex(path: Path, found: Sequence[Comparison]) -> None:
    """Write a booktabs table for each task that all runs have: one row for each run, each number
    with its interval. The best number is bold only if it is better than that of every other run
    with Holm's p, corrected over all pairs of runs and all metrics, below one minus the confidence.
    The table needs the packages booktabs and textcomp.

    Raises:
        EvaluationError: two of the runs cannot be compared.
    """
    results = [found[0].first, *(one.other for one in found)]
    config = found[0].config
    pairs, tests = compare_all(results, config)
    tasks = [task for task in results[0].tasks if all(task in run.tasks for run in results)]
    parts = [_tabular(task, results, pairs, tests, config) for task in tasks]
    files.write_whole(path, "\n".join(parts))


def escape(text: str) -> str:
    """A text as LaTeX prints it."""
    return "".join(_ESCAPED.get(char, char) for char in " ".join(text.split()))


def _rows(one: Comparison) -> Iterator[dict[str, Any]]:
    for task, block in one.tasks.items():
        common = {"task": task, "first": one.first.name, "other": one.other.name,
                  "unpaired": block["unpaired"], "tests": one.tests,
                  "confidence": one.config.confidence}  # fmt: skip
        for part in ("differences", "scored", "scores"):
            for metric, gap in block.get(part, {}).items():
                values = {"first_value": gap["a"], "other_value": gap["b"]}
                yield {**gap, **common, **values, "metric": metric, "difference": gap["value"]}


def _cell(value: Any) -> Any:
    """A name that a spreadsheet would take for a formula becomes a text."""
    if isinstance(value, str) and value.lstrip().startswith(("=", "+", "-", "@")):
        return f"'{value}"
    return value


def _tabular(
    task: str,
    results: Sequence[EvalResult],
    pairs: Mapping[tuple[int, int], Mapping[str, Block]],
    tests: int,
    config: BootstrapConfig,
) -> str:
    blocks = [_block(run, task, config) for run in results]
    metrics = _metrics(blocks)
    # Open questions that only scores rate have no metric to print.
    if not metrics:
        return f"% {escape(task)}: open questions without metrics\n"
    unpaired = sum(tasks[task]["unpaired"] for tasks in pairs.values() if task in tasks)
    other = "; the runs answered different questions, and are compared on shared ones"
    lines = [
        f"% Task {escape(task)}, {blocks[0]['n']} questions; {level(config.confidence)} intervals "
        f"in brackets{other if unpaired else ''}.",
        f"% Bold: better than every other run, p < {1 - config.confidence:.3g} after Holm's "
        f"correction of all {tests} tests.",
        rf"\begin{{tabular}}{{l{'r' * len(metrics)}}}",
        r"\toprule",
        " & ".join(["", *(escape(title) for title in metrics.values())]) + r" \\",
        r"\midrule",
    ]
    best = {metric: _best(metric, task, blocks, pairs, config) for metric in metrics}
    for place, (run, block) in enumerate(zip(results, blocks, strict=True)):
        cells = [_number(_find(block, metric), bold=best[metric] == place) for metric in metrics]
        lines.append(" & ".join([escape(run.name), *cells]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _block(run: EvalResult, task: str, config: BootstrapConfig) -> Block:
    """The numbers of a task with intervals of the asked confidence."""
    return score_rows(run.rows(task), config, {task: specs_of(run.tasks[task])})[task]


def _metrics(blocks: Sequence[Block]) -> dict[str, str]:
    """Name and title of the metrics that all runs have."""
    titles = {**COLUMNS, "war": "Accuracy", "none": "No conflict field"}
    order = [*("average", *SUBSETS, "conflict_average"), *SCALARS]
    found = [name for name in order if all(_find(block, name) for block in blocks)]
    if "average" in found and not blocks[0].get("subsets"):
        found.remove("average")  # it is the accuracy, or the first metric of a scorer
    scored = [name for name in blocks[0].get("scored", {}) if name not in found]
    found += [name for name in scored if all(_find(block, name) for block in blocks)]
    return {name: titles.get(name, name) for name in found}


def _find(block: Block, metric: str) -> Mapping[str, Any] | None:
    closed = number(block, metric) if block["labels"] else None
    return closed if closed is not None else block.get("scored", {}).get(metric)


def _best(
    metric: str,
    task: str,
    blocks: Sequence[Block],
    pairs: Mapping[tuple[int, int], Mapping[str, Block]],
    config: BootstrapConfig,
) -> int | None:
    """The place of the run that is better than every other one; None if there is none."""
    sign = -1.0 if (_find(blocks[0], metric) or {}).get("lower_is_better") else 1.0
    for place in range(len(blocks)):
        wins = [
            _wins(place, other, metric, task, sign, pairs, config)
            for other in range(len(blocks))
            if other != place
        ]
        if all(wins):
            return place
    return None


def _wins(
    place: int,
    other: int,
    metric: str,
    task: str,
    sign: float,
    pairs: Mapping[tuple[int, int], Mapping[str, Block]],
    config: BootstrapConfig,
) -> bool:
    block = pairs[min(place, other), max(place, other)].get(task, {})
    gap = block.get("differences", {}).get(metric) or block.get("scored", {}).get(metric)
    if not gap or gap["p_holm"] is None or gap["p_holm"] >= 1 - config.confidence:
        return False
    return sign * gap["value"] * (1 if place < other else -1) > 0


def _number(found: Mapping[str, Any] | None, *, bold: bool) -> str:
    """A number with its interval; shares in percent."""
    if found is None or found["value"] is None:
        return "--"
    share = found.get("share", True)  # metrics of labels have no mark, and are shares

    def one(value: float) -> str:
        text = f"{100 * value:.1f}" if share else f"{value:.3f}"
        return text.replace("-", "$-$")

    value = one(found["value"])
    value = rf"\textbf{{{value}}}" if bold else value
    if found["low"] is None:
        return value
    return rf"{value} {{\scriptsize [{one(found['low'])}, {one(found['high'])}]}}"
